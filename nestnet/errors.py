"""Errors that are the user's to mend: one message with what, got and allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class UserError(ValueError):
  """A mistake in what the user asked for; command lines print it without a traceback, exit 2."""

  code = 2


class Failure(RuntimeError):
  """Why a run cannot go on, though nobody asked for anything wrong; printed without a traceback, exit 1."""

  code = 1


class Lost(Failure):
  """Another process of the job is gone; the same command on every host goes on, exit 75."""

  code = 75


def one_of(what: str, got: object, allowed: Iterable[object]) -> UserError:
  """Builds the error for a name that is not among the allowed ones.

  Args:
    what: what the name stands for, such as `"axis"` or `"config key model"`.
    got: the unknown name.
    allowed: the known names, in the order to list them.

  Returns:
    The error, to be raised by the caller: close matches first, then every allowed name.

  Example:
    >>> print(one_of("axis", "emebd", ("layers", "embed")))
    unknown axis 'emebd'; did you mean 'embed'? Allowed: layers, embed
  """
  names = [str(name) for name in allowed]
  close = difflib.get_close_matches(str(got), names, n=2, cutoff=0.6)
  hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
  return UserError(f"unknown {what} {str(got)!r}{hint} Allowed: {', '.join(names) or 'none'}")


def counted(what: str, problems: Mapping[str, Sequence[str]], listed: int = 8) -> UserError:
  """Builds the error for many things of which some are wrong.

  Args:
    what: what is said of the whole.
    problems: the names of what is wrong, by the kind of problem.
    listed: how many of each kind are named.

  Example:
    >>> print(counted("2 files were looked at", {"missing": [], "damaged": ["a", "b"]}, listed=1))
    2 files were looked at: 2 damaged
      damaged: a
      ... and 1 more damaged
  """
  lines = [f"{what}: " + ", ".join(f"{len(names)} {kind}" for kind, names in problems.items() if names)]
  for kind, names in problems.items():
    lines += [f"  {kind}: {name}" for name in names[:listed]]
    lines += [f"  ... and {len(names) - listed} more {kind}"] if len(names) > listed else []
  return UserError("\n".join(lines))


class MissingFileError(UserError, FileNotFoundError):
  """A file or folder that the user named, or that a command needs, is not there."""
