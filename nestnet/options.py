"""What a config may say: the keys of its groups, and the types of their values.

Nothing here imports JAX before a model is asked about, so that a mistyped flag answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from nestnet.imports import by_path
from nestnet.subnet import INPUTS

# What a schedule may be told beside its rate and its warm-up; the same names as in `optim.schedule`.
SCHEDULE = {"floor": float, "decay_rate": float, "decay_share": float, "milestones": tuple, "until": float}
RATE = {"learning_rate": float, "factor": float, "schedule": str, "warmup_steps": int, "warmup_share": float,
        **SCHEDULE}
# `model` has the fields of its model too, `space` these as axes.
GROUPS: dict[str, dict[str, type]] = {
  "model": {"name": str},
  "space": {"couple": dict, "per_layer": tuple, "groups": dict, "constraint": str, "pool": tuple},
  "recipe": {"name": str, "sampler": dict, "objective": dict, "teacher": str, "ema": float, "ema_end": float,
             "hands_out": str, "select": str, "judge": str, "untouched": str, "subnet": str},
  "data": {"name": str, "data_dir": str, "augment": str, "crops": dict, "shape": tuple, "classes": int,
           "length": int, "tokenizer": str, "vocab": int, "sha256": str, "tokenizer_sha256": str},
  "optim": {"name": str, **RATE, "weight_decay": float, "weight_decay_end": float, "coupled": bool,
            "layer_decay": float, "multipliers": dict, "clip_norm": float, "clip_value": float,
            "momentum": float, "b1": float, "b2": float, "epsilon": float},
  "train": {"steps": int, "batch_size": int, "checkpoint_every": int, "log_every": int, "eval_every": int,
            "execution": str, "per_shard_subnets": bool, "accumulate": int},
  "mesh": {"data": int, "fsdp": int, "model": int},
  "eval": {"calibrate_images": int, "calibrate_batch_size": int, "examples": int, "members": tuple,
           "mix": str, "bank": int, "knn_k": tuple, "knn_labels": int, "readouts": tuple},
}
# Groups inside of groups: the dataclasses whose fields are their keys.
INSIDE = {"data.crops": "nestnet.data.crops:Crops"}
# Groups whose keys depend on the model.
OF_MODEL = ("model", "space")
TOP = {"seed": int, "phases": tuple, "init_from": str} | dict.fromkeys(GROUPS, dict)
OPTIONAL = ("eval",)
# What a phase says beside overrides of groups.
PHASE = {"steps": int, "share": float, "enter": str, "open": dict}
REQUIRED = {
  "model": ("name",), "recipe": ("sampler", "objective"), "data": ("name",),
  "optim": ("name", "learning_rate"),
}
_PLAIN = {kind.__name__: kind for kind in (bool, int, float, str, tuple)}


def model_class(name: str) -> type:
  """The module of `config.model.name`: nestnet's own, or by import path.

  Raises:
    ValueError: There is none of that name.
  """
  from nestnet.models import architecture
  return by_path(name, "model") if ":" in name else architecture(name)


def fields(made: Any) -> dict[str, type | None]:
  """The fields of a dataclass (a Flax module too) that a config may set, with the types of their values.

  The type is that of the default, or the first in the annotation; None where that is no plain one.

  Example:
    >>> @dataclasses.dataclass
    ... class Net:
    ...   embed: int | None = None
    ...   rate: float = 0.5
    >>> fields(Net)
    {'embed': <class 'int'>, 'rate': <class 'float'>}
  """
  # Flax gives every module these two; no config sets them.
  return {field.name: _type(field) for field in dataclasses.fields(made)
          if field.init and field.name not in ("parent", "name")}


def _type(field: dataclasses.Field) -> type | None:
  if field.name.endswith("dtype"):
    return str
  if type(field.default) in _PLAIN.values():
    return type(field.default)
  text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
  return _PLAIN.get(re.match(r"\w*", text)[0])


def keys(group: str, config: Mapping[str, Any]) -> dict[str, type | None]:
  """The keys that a group may have, whether a config lists them or not, with the types of their values.

  Args:
    group: Its name; `""` for the config itself. Of groups inside of groups those in `INSIDE` are known.
    config: The config, which names the model.

  Raises:
    ValueError: The config names a model that is not there.
  """
  if not group:
    return TOP
  if group in INSIDE:
    return fields(by_path(INSIDE[group], group))
  known = GROUPS.get(group, {})
  name = config.get("model", {}).get("name") if group in OF_MODEL else None
  if not name:
    return known
  of_model = fields(model_class(name))
  return known | (of_model if group == "model" else dict.fromkeys((*of_model, *INPUTS), tuple))
