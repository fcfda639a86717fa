"""The published methods as data: which sub-networks train, on what, taught by whom.

Each function gives the `recipe` group of a config with the paper's defaults; every entry can be
overridden on the command line, such as `--config.recipe.sampler.random=4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nestnet.errors import one_of


def recipe(name: str, **options: Any) -> dict[str, Any]:
  """The recipe called `name`.

  Raises:
    ValueError: An unknown name, with the known ones.

  Example:
    >>> recipe("sandwich")["sampler"]["random"]
    2
  """
  if name not in RECIPES:
    raise one_of("recipe", name, RECIPES)
  return RECIPES[name](**options)


def separate(subnet: str = "") -> dict[str, Any]:
  """A baseline: one size, trained alone from its own initial values.

  Args:
    subnet: Which member of the space; the largest by default.
  """
  return _recipe("separate", {"name": "largest"}) | {"subnet": subnet}


def truncate() -> dict[str, Any]:
  """A baseline: the whole network trained without nesting, its slices evaluated all the same."""
  return _recipe("truncate", {"name": "largest"})


def sandwich() -> dict[str, Any]:
  """Largest, smallest and two random ones, taught in place by the largest (US-Nets; BigNAS)."""
  sampler = {"name": "sandwich", "random": 2, "candidates": 1, "reduce": "sum", "by": "choices",
             "regularise": "largest"}
  return _recipe("sandwich", sampler)


def sorted_() -> dict[str, Any]:
  """Random nested members whose gradients accumulate, labels only (SortedNet)."""
  return _recipe("sorted", {"name": "sorted_nested", "n": 4, "reduce": "sum", "by": "choices"})


def matformer_joint() -> dict[str, Any]:
  """Every granularity at every step, losses summed (MatFormer, first version)."""
  return _recipe("matformer_joint", {"name": "joint", "members": (), "reduce": "sum"})


def matformer_sampled() -> dict[str, Any]:
  """One granularity a step, uniform by default (MatFormer, NeurIPS version)."""
  return _recipe("matformer_sampled", {"name": "sampled", "members": (), "probabilities": ()})


def matryoshka(sizes: Sequence[int] = (8, 16, 32, 64), tied: bool = False) -> dict[str, Any]:
  """Classifiers on nested prefixes of the features of one backbone (MRL; tied: MRL-E)."""
  objective = {"name": "matryoshka", "sizes": tuple(sizes), "tied": tied, "weights": (),
               "label_smoothing": 0.0}
  return _recipe("matryoshka_tied" if tied else "matryoshka", {"name": "largest"}) | {
    "objective": objective}


def matryoshka_tied(sizes: Sequence[int] = (8, 16, 32, 64)) -> dict[str, Any]:
  """MRL-E: one matrix whose leading rows serve every size."""
  return matryoshka(sizes, tied=True)


def _recipe(name: str, sampler: dict[str, Any]) -> dict[str, Any]:
  return {
    "name": name, "sampler": sampler,
    "objective": {
      "name": "classification", "label_smoothing": 0.0, "student_labels": 0.0, "distillation": 1.0,
      "temperature": 1.0, "space": "logits", "delay": 0, "ramp": 0},
    "teacher": "largest", "ema": 0.999, "select": "lowest", "untouched": "update"}


RECIPES = {
  "separate": separate, "truncate": truncate, "sandwich": sandwich, "sorted": sorted_,
  "matformer_joint": matformer_joint, "matformer_sampled": matformer_sampled,
  "matryoshka": matryoshka, "matryoshka_tied": matryoshka_tied,
}
