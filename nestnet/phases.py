"""Runs in several phases as data: which sizes open when, for which share of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestnet.errors import UserError, one_of
from nestnet.space import volume
from nestnet.subnet import INPUTS, Subnet, is_depth, kind_of

SORT = "nestnet.importance:Sort"
_OPTIONS = ("couple", "per_layer", "groups", "constraint", "pool")


def lengths(phases: Sequence[Mapping[str, Any]], steps: int) -> list[int]:
  """The steps of each phase of a run of so many.

  Args:
    phases: Each with its `steps`; or each with a `share`, in any unit, such as epochs.
    steps: All steps of the run.

  Raises:
    ValueError: Neither, or steps that do not add up, or fewer steps than phases.

  Example:
    >>> lengths([{"share": 180}, {"share": 125}, {"share": 25}], 1000)
    [545, 379, 76]
  """
  given = [phase.get("steps") for phase in phases]
  if all(phase.get("share") is None for phase in phases):
    if not all(isinstance(n, int) and n > 0 for n in given) or sum(given) != steps:
      raise UserError(f"the steps of config.phases must add up to train.steps={steps}, got {given}; allowed "
                      "instead is a share for each, which follows train.steps")
    return given
  shares = [phase.get("share") for phase in phases]
  if any(given) or not all(isinstance(s, (int, float)) and s > 0 for s in shares):
    raise UserError(f"config.phases: shares {shares} and steps {given}; allowed is a share above 0 for each, "
                    "or steps for each")
  if steps < len(phases):
    raise UserError(f"train.steps={steps}: allowed is at least one for each of the {len(phases)} phases")
  ends = [0]
  for number, _ in enumerate(phases, 1):
    wanted = round(steps * sum(shares[:number]) / sum(shares))
    # None is empty, those that follow included.
    ends.append(min(max(wanted, ends[-1] + 1), steps - len(phases) + number))
  return [end - start for start, end in zip(ends, ends[1:])]


def opened(space: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
  """The options of a space in which only the largest choices of some axes are open.

  Its pool, which may have members outside, is left out.

  Args:
    space: Options of `nestnet.Space`.
    limits: How many of the largest choices, by axis; `layers` stands for `layers_1` and so on too, where
      these are not named themselves.

  Raises:
    ValueError: A name that is no axis, less than one choice, or coupled choices of which none is left.

  Example:
    >>> opened({"layers_1": (2, 3, 4), "kernel_1": (3, 5, 7), "pool": ("layers_1=2",)}, {"layers": 2})
    {'layers_1': (3, 4), 'kernel_1': (3, 5, 7), 'pool': ()}
  """
  if not limits:
    return dict(space)
  if not isinstance(limits, Mapping):
    raise UserError(f"open: got {limits}, allowed is a number of choices by axis, such as {{'layers': 2}}")
  known = dict.fromkeys((*kinds(space), *_axes(space)))
  for axis, count in limits.items():
    if axis not in known:
      raise one_of("axis in open", axis, known)
    if not isinstance(count, int) or count < 1:
      raise UserError(f"open: {axis}={count}; allowed is a number of choices, at least 1")
  choices = _choices(space, limits)
  for names, rows in choices.get("couple", {}).items():
    if not rows:
      raise UserError(f"open: {dict(limits)} leaves no row of the coupled choices of {names!r}: "
                      f"{space['couple'][names]}")
  return dict(space) | choices | {"pool": ()}


def _choices(space: Mapping[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
  """The choices that are open, axis by axis, and the coupled ones."""
  limit = lambda axis: limits.get(axis, limits.get(kind_of(axis)))
  choices = {axis: _largest(axis, values, limit(axis))
             for axis, values in space.items() if axis not in _OPTIONS and values is not None}
  couple = {}
  for names, rows in (space.get("couple") or {}).items():
    columns = [_largest(axis, [row[i] for row in rows], limit(axis))
               for i, axis in enumerate(names.split())]
    couple[names] = tuple(tuple(row) for row in rows if all(map(_among, row, columns)))
  return choices | ({"couple": couple} if couple else {})


def kinds(space: Mapping[str, Any]) -> list[str]:
  """The axes of a space by what they are, such as `layers` for all of `layers_1`, `layers_2`.

  Example:
    >>> kinds({"layers_1": (1, 2), "layers_2": (1, 2), "couple": {"embed heads": ((8, 2),)}})
    ['layers', 'embed', 'heads']
  """
  return list(dict.fromkeys(map(kind_of, _axes(space))))


def widened(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
  """The kinds of axes that have more choices in one space than in another.

  Args:
    before: Options of a space, as from `opened`.
    after: Options of the other.

  Example:
    >>> widened({"layers_1": (2,), "layers_2": (2,), "mlp": (8,)}, {"layers_1": (1, 2), "mlp": (8,)})
    ['layers']
  """
  here, there = _columns(before), _columns(after)
  return list(dict.fromkeys(kind_of(axis) for axis in there if there[axis] - here.get(axis, set())))


def _columns(space: Mapping[str, Any]) -> dict[str, set]:
  """All choices of each axis, coupled ones too."""
  columns = {axis: set(map(_plain, space[axis])) for axis in _axes(space) if axis in space}
  for names, rows in (space.get("couple") or {}).items():
    columns |= {axis: {_plain(row[i]) for row in rows} for i, axis in enumerate(names.split())}
  return columns


def _axes(space: Mapping[str, Any]) -> list[str]:
  axes = [axis for axis, values in space.items() if axis not in _OPTIONS and values is not None]
  return axes + [axis for names in space.get("couple") or {} for axis in names.split()]


def shrinking(space: Mapping[str, Any], enter: str = SORT) -> list[dict[str, Any]]:
  """Progressive shrinking of Once-for-All (1908.09791, section 3.3; epochs, rates and numbers of
  sub-networks of its code): the whole network, then kernels, depths in two steps, widths in two.

  Shares are the 605 epochs, those of warm-up included. Kinds of axes that the space has not, and stages
  that would open nothing, are left out: with two depths there is no first of the two steps. Kinds that
  are coupled open together, when the last of them would. Resolutions are open from the second phase on.

  Args:
    space: The `space` group of a config.
    enter: The transition each time that widths open, by the import path of what makes it; `""`: none.
  """
  closed = _closed(space)
  phases = [_whole(180, closed)]
  stage_of = {kind: max(map(_stage_of, together)) for kind, together in _coupled(space).items()}
  for stage, few, number in ((0, False, 1), (1, True, 2), (1, False, 2), (2, True, 4), (2, False, 4)):
    every = {kind: count for kind, count in closed.items() if stage_of[kind] != stage}
    opens = closed | dict.fromkeys(closed.keys() - every.keys(), 2) if few else every
    if every == closed or (few and _choices(space, opens) in (_choices(space, closed), _choices(space, every))):
      continue
    phases.append({
      "share": 25 if few else 125, "open": opens, "recipe": {"sampler": {"n": number}},
      "optim": _stage(few, 0.24 if stage else 0.96)} | ({"enter": enter} if enter and stage == 2 else {}))
    closed = opens
  return phases


def one_stage(space: Mapping[str, Any], enter: str = SORT) -> list[dict[str, Any]]:
  """CompOFA (2104.12642): the whole network, then all of a coupled space at once.

  Args:
    space: The `space` group of a config.
    enter: As in `shrinking`, before the space opens.
  """
  entered = {"enter": enter} if enter else {}
  return [_whole(180, _closed(space)), {"share": 25, "optim": _stage(True, 0.24)} | entered,
          {"share": 125, "optim": _stage(False, 0.24)}]


def delayed(space: Mapping[str, Any], enter: str = SORT) -> list[dict[str, Any]]:
  """DεpS (ECCV 2024): 145 of 270 epochs of the whole network, then the recipe's sandwich, whose `ramp` is
  the warm-up of the others; one learning-rate schedule over both.

  Args:
    space: Of no effect: all of it opens at once.
    enter: As in `shrinking`, before the space opens.
  """
  del space
  return [{"share": 145, "recipe": {"sampler": {"name": "largest"}}},
          {"share": 125} | ({"enter": enter} if enter else {})]


def _closed(space: Mapping[str, Any]) -> dict[str, int]:
  """Only the largest of each kind that has several, resolutions apart."""
  return {kind: 1 for kind in kinds(space)
          if kind not in INPUTS and _choices(space, {kind: 1}) != _choices(space, {})}


def _coupled(space: Mapping[str, Any]) -> dict[str, set[str]]:
  """For each kind, those that open together with it."""
  together = {kind: {kind} for kind in kinds(space)}
  for names in space.get("couple") or {}:
    joined = set().union(*(together[kind_of(axis)] for axis in names.split()))
    together |= dict.fromkeys(joined, joined)
  return together


def _stage_of(kind: str) -> int:
  """Kernels open first, then depths, then widths."""
  return 0 if kind == "kernel" else 1 if is_depth(kind) else 2


def _whole(share: int, closed: dict[str, int]) -> dict[str, Any]:
  """The largest network, which has no teacher, under the config's own optimizer."""
  return {"share": share, "open": closed, "recipe": {"sampler": {"name": "largest"}, "teacher": "largest"}}


def _stage(few: bool, rate: float) -> dict[str, Any]:
  """A stage of Once-for-All: its learning rate relative to that of the whole network, which is 2.6."""
  # The short first of two stages: 25 epochs; otherwise 120 and 5 of warm-up.
  return {"factor": (0.08 if few else rate) / 2.6, "warmup_steps": 0, "warmup_share": 0.0 if few else 5 / 125}


def _largest(axis: str, values: Any, count: int | None) -> tuple:
  """The largest choices, in their order."""
  values = tuple(map(_plain, values))
  size = lambda value: volume(Subnet(**{axis: value}))
  kept = sorted(dict.fromkeys(values), key=size)[-count:] if count else values
  return tuple(v for v in values if v in kept)


def _among(value: Any, column: tuple) -> bool:
  return _plain(value) in column


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, (list, tuple)) else value
