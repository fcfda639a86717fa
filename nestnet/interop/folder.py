"""An extracted network as a folder: `model.safetensors` and `config.json`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import safetensors.flax
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from nestnet.errors import MissingFileError, UserError, one_of
from nestnet.models import ARCHITECTURES, architecture

FORMAT = "nestnet"


def save(folder: str | os.PathLike[str], module: nn.Module, variables: Mapping[str, Any],
         provenance: Mapping[str, Any] | None = None,
         beside: Mapping[str, Mapping[str, Any]] | None = None) -> None:
  """Writes a network as `model.safetensors` and `config.json`, whole or not at all.

  Args:
    folder: Where; an extracted network that stands there is replaced.
    module: The network.
    variables: Its variables, `{"params": ..., ...}`.
    provenance: What else to record: parent run and step, costs, metrics.
    beside: Further trees by file name, such as the weights of an objective.

  Raises:
    ValueError: `folder` holds something else than an extracted network.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
    raise UserError(
      f"{folder} exists and is no extracted network; name another folder or remove it")
  folder.parent.mkdir(parents=True, exist_ok=True)
  written = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  written.mkdir()
  try:
    for name, tree in {"model": variables, **(beside or {})}.items():
      flat = {"/".join(path): jnp.asarray(leaf)
              for path, leaf in flatten_dict(dict(meta.unbox(tree))).items()}
      safetensors.flax.save_file(flat, written / f"{name}.safetensors")
    config = {"format": FORMAT, "architecture": _name(type(module)), "fields": _fields(module),
              **(provenance or {})}
    (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    replaced = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
    if folder.exists():
      os.rename(folder, replaced)
    os.rename(written, folder)
    shutil.rmtree(replaced, ignore_errors=True)
  finally:
    shutil.rmtree(written, ignore_errors=True)


def load(folder: str | os.PathLike[str], module: type[nn.Module] | None = None
         ) -> tuple[nn.Module, dict[str, Any]]:
  """Reads an extracted network: `module, variables = load(folder)`, ready for `module.apply`.

  Args:
    folder: What `save` or `experiments.extract` wrote.
    module: The class of a network that is not one of nestnet's own. Nothing is imported by a name
      that the folder gives.

  Raises:
    ValueError: The folder is damaged, or its fields are not those of its architecture.
    FileNotFoundError: There is no extracted network.
  """
  folder = pathlib.Path(folder)
  if not (folder / "config.json").is_file():
    raise MissingFileError(f"no extracted network in {folder}: config.json is missing")
  try:
    config = json.loads((folder / "config.json").read_text())
    flat = safetensors.flax.load_file(folder / "model.safetensors")
    name, fields = str(config["architecture"]), dict(config["fields"])
  except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
    raise UserError(f"{folder} is damaged: {error}") from error
  if module is None and name not in ARCHITECTURES:
    raise UserError(f"{folder} holds a {name}, which is not nestnet's own "
                    f"({', '.join(ARCHITECTURES)}); pass its class: load(folder, MyModule)")
  if module is not None and _name(module) != name:
    raise UserError(f"{folder} holds a {name}, got the class {_name(module)}")
  made = make_module(module or architecture(name), fields)
  return made, unflatten_dict({tuple(key.split("/")): leaf for key, leaf in flat.items()})


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
  return tuple(value) if isinstance(value, (list, tuple)) else value


def _known(module: nn.Module | type[nn.Module]) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(module)
          if f.init and f.name not in ("parent", "name")}


def _fields(module: nn.Module) -> dict[str, Any]:
  values = {name: getattr(module, name) for name in _known(module)}
  return {n: str(jnp.dtype(v)) if n.endswith("dtype") else v for n, v in values.items()}


def _name(module: type[nn.Module]) -> str:
  own = {v: k for k, v in ARCHITECTURES.items()}
  path = f"{module.__module__}:{module.__qualname__}"
  return own.get(path, path)


def _is_ours(folder: pathlib.Path) -> bool:
  try:
    return json.loads((folder / "config.json").read_text())["format"] == FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    return False
