"""nestnet: one weight-shared network that contains a whole family of smaller ones."""

from __future__ import annotations

import importlib

_PUBLIC = {
  "Subnet": "subnet", "Space": "space", "take": "slicing", "axis_names": "axes",
  "extract": "execution", "save": "interop.folder", "load": "interop.folder",
  "count_params": "cost", "flops": "cost",
}

__all__ = ["Space", "Subnet", "axis_names", "count_params", "extract", "flops", "load", "save", "take"]


def __getattr__(name: str):
  # Public names are imported when first used, so that a command line answers a mistyped flag at once.
  if name not in __all__:
    raise AttributeError(f"module 'nestnet' has no attribute {name!r}; public are {', '.join(__all__)}")
  return getattr(importlib.import_module(f"nestnet.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
  return __all__
