"""An extracted network as a folder: `model.safetensors` and `config.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import safetensors.flax
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from nestnet.errors import MissingFileError, UserError, one_of
from nestnet.files import atomic_folder, written
from nestnet.interop import hugging_face
from nestnet.interop.ours import FORMAT, check_replaceable
from nestnet.models import ARCHITECTURES, architecture


def save(folder: str | os.PathLike[str], module: nn.Module, variables: Mapping[str, Any],
         provenance: Mapping[str, Any] | None = None,
         beside: Mapping[str, Mapping[str, Any]] | None = None,
         check: Callable[[pathlib.Path], None] | None = None) -> None:
  """Writes a network as `model.safetensors` and `config.json`, whole or not at all.

  Args:
    folder: Where; an extracted network that stands there is replaced.
    module: The network.
    variables: Its variables, `{"params": ..., ...}`.
    provenance: What else to record: parent run and step, costs, metrics.
    beside: Further trees by file name, such as the weights of an objective.
    check: Called with the folder, complete but under a hidden name; what it raises leaves `folder`
      as it was.

  Raises:
    ValueError: `folder` holds something else than an extracted network, or a field of the module
      is nothing that JSON can hold.
  """
  folder, fields = pathlib.Path(folder), module_fields(module)
  check_replaceable(folder)
  with atomic_folder(folder) as hidden:
    config = {"format": FORMAT, "architecture": _name(type(module)), "fields": fields,
              **(provenance or {})}
    (hidden / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, tree in {"model": variables, **(beside or {})}.items():
      flat = {"/".join(path): jnp.asarray(leaf)
              for path, leaf in flatten_dict(dict(meta.unbox(tree))).items()}
      safetensors.flax.save_file(flat, hidden / f"{name}.safetensors")
      # That makes files which their owner alone may read, whatever the umask says.
      shutil.copymode(hidden / "config.json", hidden / f"{name}.safetensors")
    if check:
      check(hidden)


def load(folder: str | os.PathLike[str], module: type[nn.Module] | None = None
         ) -> tuple[nn.Module, dict[str, Any]]:
  """Reads a network: `module, variables = load(folder)`, ready for `module.apply`.

  Args:
    folder: What `save` or `experiments.extract` wrote, or a decoder in Hugging Face's form
      (`nestnet.interop.hugging_face`).
    module: The class of a network that is not one of nestnet's own. Nothing is imported by a name
      that the folder gives.

  Raises:
    ValueError: The folder is damaged, or its fields are not those of its architecture.
    FileNotFoundError: There is no extracted network.
  """
  folder = written(folder)
  if hugging_face.is_folder(folder):
    made, variables = hugging_face.read_folder(folder)
    return _checked(made, module, folder), variables
  made = peek(folder, module)
  try:
    flat = safetensors.flax.load_file(folder / "model.safetensors")
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} is damaged: {error}") from error
  return made, unflatten_dict({tuple(key.split("/")): leaf for key, leaf in flat.items()})


def peek(folder: str | os.PathLike[str], module: type[nn.Module] | None = None) -> nn.Module:
  """The network of `load`, whose weights are not read, but for the names and shapes of Hugging Face's.

  Raises:
    ValueError: As `load`.
    FileNotFoundError: As `load`.
  """
  folder = written(folder)
  if hugging_face.is_folder(folder):
    return _checked(hugging_face.peek(folder), module, folder)
  if not (folder / "config.json").is_file():
    raise MissingFileError(f"no extracted network in {folder}: config.json is missing")
  try:
    config = json.loads((folder / "config.json").read_text())
    name, fields = str(config["architecture"]), dict(config["fields"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{folder} is damaged: {error}") from error
  if module is None and name not in ARCHITECTURES:
    raise UserError(f"{folder} holds a {name}, which is not nestnet's own "
                    f"({', '.join(ARCHITECTURES)}); pass its class: load(folder, MyModule)")
  if module is not None and _name(module) != name:
    raise UserError(f"{folder} holds a {name}, got the class {_name(module)}")
  return make_module(module or architecture(name), fields)


def _checked(made: nn.Module, wanted: type[nn.Module] | None, folder: pathlib.Path) -> nn.Module:
  if wanted not in (None, type(made)):
    raise UserError(f"{folder} holds a {_name(type(made))}, got the class {_name(wanted)}")
  return made


def make_module(module: type[nn.Module], fields: Mapping[str, Any]) -> nn.Module:
  """A module from JSON fields: lists become tuples, names of dtypes dtypes.

  Raises:
    ValueError: A field that the module lacks, or one that it needs and did not get.
  """
  known = _known(module)
  for name in fields:
    if name not in known:
      raise one_of(f"field of {module.__name__}", name, known)
  missing = [n for n, f in known.items() if n not in fields and f.default is dataclasses.MISSING
             and f.default_factory is dataclasses.MISSING]
  if missing:
    raise UserError(f"{module.__name__} needs the fields {', '.join(missing)}")
  return module(**{n: _value(n, v) for n, v in fields.items()})


def _value(name: str, value: Any) -> Any:
  if name.endswith("dtype") and isinstance(value, str):
    try:
      return jnp.dtype(value)
    except TypeError as error:
      raise UserError(
        f"{name}: {value!r} is no data type; allowed are float32, bfloat16, ...") from error
  return tuple(_value("", v) for v in value) if isinstance(value, (list, tuple)) else value


def _known(module: nn.Module | type[nn.Module]) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(module)
          if f.init and f.name not in ("parent", "name")}


def module_fields(module: nn.Module) -> dict[str, Any]:
  """The fields of a module as JSON holds them: dtypes by name; `make_module` makes it from them again.

  Raises:
    ValueError: A field is nothing that JSON can hold, such as a function.

  Example:
    >>> module_fields(nn.Dropout(0.1, broadcast_dims=(1,)))
    {'rate': 0.1, 'broadcast_dims': (1,), 'deterministic': None, 'rng_collection': 'dropout'}
  """
  fields = {}
  for name in _known(module):
    value = getattr(module, name)
    try:
      fields[name] = str(jnp.dtype(value)) if name.endswith("dtype") and value is not None else value
      json.dumps(fields[name])
    except (TypeError, ValueError):
      raise UserError(
        f"field {name} of {type(module).__name__} is {value!r}, which config.json cannot hold; allowed "
        "are numbers, text, booleans, None, tuples of these, and in a field ...dtype a data type. Name "
        "a function by text and look it up in the module") from None
  return fields


def _name(module: type[nn.Module]) -> str:
  own = {v: k for k, v in ARCHITECTURES.items()}
  path = f"{module.__module__}:{module.__qualname__}"
  return own.get(path, path)
