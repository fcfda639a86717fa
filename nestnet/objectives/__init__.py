"""What is minimised: records of pure functions, one kind in each file."""

from __future__ import annotations

import inspect
from typing import Any

from nestnet.errors import one_of
from nestnet.imports import by_path
from nestnet.objectives.base import Objective, Targets

__all__ = ["Objective", "Targets", "objective"]

# The module of each.
_BUILT_IN = {"classification": "classification", "alpha_divergence": "alpha_divergence",
             "matryoshka": "matryoshka", "language_modelling": "language", "exits": "exits",
             "self_distillation": "self_distillation"}


def objective(name: str, **options: Any) -> Objective:
  """The objective called `name` with its options; a user's own by import path.

  Args:
    name: `"classification"`, `"alpha_divergence"`, `"matryoshka"`, `"language_modelling"`, `"exits"`,
      `"self_distillation"`, or `package.module:function`.
    **options: Passed to the function that makes the `Objective`.

  Raises:
    ValueError: An unknown name or option, with the known ones.
  """
  module, _, function = name.partition(":")
  if not function:
    if name not in _BUILT_IN:
      raise one_of("objective", name, (*_BUILT_IN, "package.module:function"))
    module, function = f"nestnet.objectives.{_BUILT_IN[name]}", name
  make = by_path(f"{module}:{function}", "objective")
  accepted = inspect.signature(make).parameters
  for option in options:
    if option not in accepted:
      raise one_of(f"option of the objective {name}", option, accepted)
  return make(**options)
