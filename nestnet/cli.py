"""Command lines: flags in, one message and an exit code out.

Exit codes: 0 done, 1 a failed run (one message) or a bug (with its traceback), 2 a mistake of the
user (one message: what, got, allowed), 75 the job lost a process and the same command goes on (EX_TEMPFAIL
of <sysexits.h>), 130 interrupted by Ctrl-C. Nothing here imports JAX, so that a mistyped flag answers
at once; scripts should import what is heavy inside `main`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import pathlib
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app
from absl import flags
from absl import logging
import ml_collections
from ml_collections import config_flags

from nestnet import errors, memory, options

FLAGS = flags.FLAGS
_NUMBERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Parses the flags of `sys.argv`, runs `main` and exits; never returns.

  Args:
    main: called with the program's name as its only argument; what it returns is the exit code,
      None being 0. A `nestnet.errors.UserError` that it raises is printed without a traceback.
  """
  quiet = False

  def parse(argv: Sequence[str]) -> list[str]:
    nonlocal quiet
    arguments = _parse(argv)
    quiet = FLAGS["verbosity"].using_default_value
    return arguments

  def start(argv: Sequence[str]) -> Any:
    # absl turns to INFO where --verbosity is not given.
    if quiet:
      logging.set_verbosity(logging.WARNING)
    memory.keep_freed()
    return main(argv)

  warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
  with reported():
    app.run(start, flags_parser=parse)


@contextlib.contextmanager
def reported() -> Iterator[None]:
  """Turns what the user should read in one message into that message and `SystemExit`."""
  try:
    yield
  except (errors.UserError, errors.Failure) as error:
    sys.exit(report(str(error), error.code))
  except KeyboardInterrupt:
    sys.exit(report("interrupted", 130))


def define_config(default: str | None = None) -> flags.FlagHolder:
  """Defines `--config=FILE.py[:ARGUMENT]` and its overrides `--config.x.y=value`.

  Args:
    default: the file used where the flag is not given; None makes the flag required.

  Returns:
    The flag; its `.value` is the locked `ConfigDict` that the file's `get_config` returned.
  """
  flags.disclaim_key_flags()
  holder = config_flags.DEFINE_config_file(
      "config", None, "config file, FILE.py or FILE.py:ARGUMENT; --config.x.y=value overrides")
  FLAGS["config"].parser = _ConfigParser(default)
  return holder


def check_fields(config: Mapping[str, Any], allowed: Any, where: str = "model") -> None:
  """Checks that every key of a config group is known.

  Args:
    config: the group.
    allowed: the known keys, or the dataclass (a Flax module too) whose fields they are.
    where: the group's name, for the message.

  Raises:
    ValueError: a key is not among the allowed ones.

  Example:
    >>> check_fields({"embde": 3}, {"embed": int, "heads": int}, "model")
    Traceback (most recent call last):
    ...
    nestnet.errors.UserError: unknown key of config.model 'embde'; did you mean 'embed'? \
Allowed: embed, heads
  """
  if dataclasses.is_dataclass(allowed):
    allowed = options.fields(allowed)
  for key in config:
    if key not in allowed:
      raise errors.one_of(f"key of config{'.' * bool(where)}{where}", key, allowed)


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Runs the `get_config` of a config file.

  Args:
    spec: the file's path, followed by `:ARGUMENT` where its `get_config` takes one.

  Returns:
    The config, locked; its phases are a tuple of `ConfigDict`s, so that each key of theirs can be overridden.

  Raises:
    ValueError: the file fails, takes no or needs an argument, or returns no `ConfigDict`.
    FileNotFoundError: there is no such file.
  """
  name, _, argument = spec.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    known = sorted(map(str, path.parent.glob("*.py")))
    raise errors.MissingFileError(str(errors.one_of("config file", name, known)))
  try:
    source = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
      raise errors.UserError(f"{path} defines no function get_config()")
    parameters = inspect.signature(module.get_config).parameters.values()
    if argument and not parameters:
      raise errors.UserError(f"{path} takes no argument, got {argument!r}; use {path}")
    if not argument and any(p.default is p.empty for p in parameters):
      raise errors.UserError(f"{path} needs an argument: {path}:ARGUMENT")
    config = module.get_config(*([argument] if argument else []))
  except errors.UserError:
    raise
  except Exception as error:  # The file is the user's program: it may raise anything.
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if pathlib.Path(frame.filename) == path.absolute()]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
    raise errors.UserError(
        f"{path}, line {line}: {type(error).__name__}: {_first_line(error)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
        f"get_config of {path} returned {type(config).__name__}, allowed: ConfigDict")
  if isinstance(phases := config.get("phases"), (list, tuple)):
    with config.unlocked():
      # Of the type of what stands there, it would be made a list.
      del config.phases
      config.phases = tuple(
        ml_collections.ConfigDict(phase) if isinstance(phase, Mapping) else phase for phase in phases)
  return config.lock()


class _ConfigParser(flags.ArgumentParser):
  """Loads the file and checks every override, before ml_collections raises its own errors."""

  def __init__(self, default: str | None):
    self.default = default

  def parse(self, path: str) -> ml_collections.ConfigDict:
    config = load_config(path)
    overrides = list(_overrides(sys.argv))
    keys = [key for key, _ in overrides]
    if "phases" in keys and (inside := [key for key in keys if key.startswith("phases[")]):
      raise errors.UserError(f"config keys 'phases' and {inside[0]!r}: allowed is either")
    for key, value in overrides:
      check_override(config, key, value)
    return config


def _overrides(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Lists the `--config.key=value`, `--config.key value` and `--[no]config.key` of a command."""
  for argument, after in zip(argv, [*argv[1:], "-"]):
    if match := re.match(r"--?(no)?config\.([^=]+)(=?)(.*)", argument, re.DOTALL):
      no, key, equals, value = match.groups()
      yield key, value if equals else "false" if no else "true" if after[:1] == "-" else after


def check_override(config: ml_collections.ConfigDict, key: str, value: str) -> None:
  """Checks that a config may have a key and that a text is a value of its type.

  A key that the config may have and does not list is added to it, without a value.

  Args:
    config: the config to override.
    key: the names of the groups and of the field, joined by dots; `phases[0]` is the first phase.
    value: the text from the command line.

  Raises:
    ValueError: an unknown key, a group in place of a field, or a value of another type.

  Example:
    >>> config = ml_collections.ConfigDict({"train": {"steps": 3}})
    >>> check_override(config, "train.accumulate", "2")
    >>> config.train.get_type("accumulate")
    <class 'int'>
  """
  if not re.fullmatch(r"(phases\[\d+\]\.)?\w+(\.\w+)*", key):
    raise errors.UserError(f"config key {key!r}; allowed: names joined by dots, and of phases a number, "
                           "as in phases[0].share")
  names, group, seen = key.split("."), config, []
  if in_phase := "[" in names[0]:
    phases, number = config.get("phases") or (), int(names[0][len("phases["):-1])
    if number >= len(phases):
      raise errors.UserError(f"config key {key!r}: the config has {len(phases)} phases; allowed: numbers "
                             "below that, from 0")
    group = phases[number]
    seen.append(names.pop(0))
  for name in names:
    if not isinstance(group, ml_collections.ConfigDict):
      raise errors.UserError(f"config key {'.'.join(seen)!r} is a value, no group; got {key!r}")
    if name not in group:
      _add(group, name, seen, seen[1:] if in_phase else seen, config)
    seen.append(name)
    holder, group = group, group[name]
  if isinstance(group, ml_collections.ConfigDict) and not value.startswith("{"):
    raise errors.UserError(f"config key {key!r} is a group, got {value!r}; allowed: "
                           + ", ".join(f"--config.{key}.{name}=..." for name in group.keys()))
  if key == "recipe.name" and value != group:
    raise errors.UserError(
      f"config key {key!r}: got {value!r}; it only labels what the config trains, here {group!r}. A method "
      "is chosen by the config's argument, --config=FILE.py:METHOD; a label of your own, in the file")
  kind = holder.get_type(seen[-1])
  if not _is_value(value, kind, group):
    example = "" if group is None else f", such as {textwrap.shorten(str(group), 100)}"
    raise errors.UserError(
        f"config key {key!r}: got {value!r}, allowed: {kind.__name__}{example}")


def _add(group: ml_collections.ConfigDict, name: str, seen: Sequence[str], path: Sequence[str],
         config: ml_collections.ConfigDict) -> None:
  """Adds a key that a group may have, without a value.

  Args:
    group: the group.
    name: the key.
    seen: where the group is, for the message.
    path: the same without the phase; what the config itself says there, a phase may say too.
    config: the whole config.
  """
  whole = config
  for part in path:
    whole = whole.get(part) if isinstance(whole, ml_collections.ConfigDict) else None
  if seen and not path:
    known = options.PHASE | dict.fromkeys(options.GROUPS, dict)
  else:
    listed = whole if isinstance(whole, ml_collections.ConfigDict) else ml_collections.ConfigDict()
    known = options.keys(".".join(path), config) | {key: listed.get_type(key) for key in listed.keys()}
  kind = known.get(name)
  if kind is None:
    raise errors.one_of(f"key of {'.'.join(['config', *seen])}", name, dict.fromkeys((*group.keys(), *known)))
  with group.unlocked():
    group[name] = (ml_collections.ConfigDict() if issubclass(kind, (dict, ml_collections.ConfigDict))
                   else ml_collections.config_dict.placeholder(kind))


def _is_value(text: str, kind: type, current: Any) -> bool:
  """Whether a text is a value of a type; a tuple's elements are of the types it has now."""
  try:
    if kind in _NUMBERS:
      _NUMBERS[kind].parse(text)
    elif kind is tuple and current:
      value = ast.literal_eval(text)
      elements = value if isinstance(value, (tuple, list)) else (value,)
      of = lambda x: dict if isinstance(x, ml_collections.ConfigDict) else type(x)
      return set(map(of, elements)) <= set(map(of, current))
  except (ValueError, SyntaxError):
    return kind is tuple and str in {type(x) for x in current}
  return True


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; every mistake becomes a UserError."""
  argv = list(argv)
  needs_config = "config" in FLAGS and not any(re.match(r"--?config(=|$)", x) for x in argv)
  if needs_config and (default := FLAGS["config"].parser.default) is not None:
    argv.insert(1, f"--config={default}")
    needs_config = False
  no_config = errors.UserError("flag --config is required: --config=configs/NAME.py")
  try:
    arguments = FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    if needs_config and error.flagname.startswith("config."):
      raise no_config from None
    known = [f"--{flag.name}" for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    raise errors.one_of("flag", f"--{error.flagname}", known) from None
  except flags.Error as error:
    if match := re.match(r"flag --(\w+)=None: .*other than None", str(error)):
      raise errors.UserError(f"flag --{match[1]} is required") from None
    raise errors.UserError(str(error)) from None
  if needs_config:
    raise no_config
  if len(arguments) > 1:
    raise errors.UserError(
        f"unexpected argument {arguments[1]!r}; allowed: flags only, as --name=value")
  return arguments


def _first_line(error: Exception) -> str:
  text = error.msg if isinstance(error, SyntaxError) else str(error)
  return text.split("\n")[0]


def report(message: str, code: int) -> int:
  """Prints a message after the program's name, to standard error; gives back the exit code."""
  print(f"{pathlib.Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)
  return code
