"""The published methods as data: which sub-networks train, on what, taught by whom.

Each function gives the `recipe` group of a config with the paper's defaults; every entry can be
overridden on the command line, such as `--config.recipe.sampler.random=4`. `phases` gives the phases of
a method that has several, `optim` the optimizer of its paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestnet.errors import one_of
from nestnet.phases import SORT, delayed, one_stage, shrinking


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


def phases(name: str, space: Mapping[str, Any], enter: str = SORT) -> list[dict[str, Any]]:
  """The `phases` of a config for the recipe called `name`, as shares of the steps; none where it has one.

  Args:
    name: Of the recipe.
    space: The `space` group of the config.
    enter: What makes the transition where widths open, by import path: OFA and DεpS sort channels by
      importance there. `""`: none.

  Example:
    >>> [phase["share"] for phase in phases("ofa", dict(layers_1=(2, 3, 4), expand_1=(3, 4, 6)))]
    [180, 25, 125, 25, 125]
  """
  return PHASES[name](space, enter) if name in PHASES else []


def optim(name: str) -> dict[str, Any]:
  """The `optim` group of the paper of a recipe, for ImageNet at its batch size.

  Raises:
    ValueError: A name that has none, with those that have.

  Example:
    >>> optim("bignas")["name"], optim("bignas")["floor"]
    ('rmsprop', 0.05)
  """
  if name not in OPTIM:
    raise one_of("recipe with an optimizer", name, OPTIM)
  return dict(OPTIM[name])


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
  return _recipe("sandwich", _sandwich())


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


def soft(depths: Sequence[int] = ()) -> dict[str, Any]:
  """Exits behind several layers of one forward pass, labels only, losses averaged (SoFT, 2309.08968).

  Args:
    depths: Where they are; by default behind every layer. In the paper behind every fourth of 40, from 12.
  """
  return _exits("soft", depths, "even", 1.0, "none", 1)


def layerskip(depths: Sequence[int] = ()) -> dict[str, Any]:
  """Exits whose weights rise with depth, in rotation, on a network that drops layers (LayerSkip, 2404.16710).

  That it drops them is the model's: `model.layer_dropout=0.1`.

  Args:
    depths: As in `soft`.
  """
  return _exits("layerskip", depths, "rising", 0.2, "rotational", 8)


def _exits(name: str, depths: Sequence[int], weights: str, scale: float, curriculum: str, interval: int
           ) -> dict[str, Any]:
  return _recipe(name, {"name": "largest"}) | {"objective": {
    "name": "exits", "depths": tuple(depths), "weights": weights, "scale": scale, "curriculum": curriculum,
    "interval": interval}}


def ofa() -> dict[str, Any]:
  """Random members taught by the frozen whole network and by labels (Once-for-All, 1908.09791).

  With `phases("ofa", space)`, the first of which trains that network; each later one says how many members
  a step has. Unlike there each member draws a resolution of its own, as in BigNAS, and the teacher sees
  images at the largest.
  """
  return _taught(_recipe("ofa", {"name": "uniform", "taught": True, "reduce": "sum", "by": "choices",
                                 "whole": False}, 0.1), 1.0) | {"teacher": "frozen"}


def compofa() -> dict[str, Any]:
  """OFA on a space whose depths and widths are coupled, opened at once (CompOFA, 2104.12642).

  With `phases("compofa", space)`.
  """
  made = ofa()
  return made | {"name": "compofa", "sampler": made["sampler"] | {"n": 4}}


def rss() -> dict[str, Any]:
  """One random member a step, labels only, no phases (RSS, CVPR workshops 2022)."""
  return _recipe("rss", {"name": "uniform", "n": 1, "taught": False, "reduce": "sum", "by": "choices",
                         "whole": False})


def bignas() -> dict[str, Any]:
  """A sandwich taught in place, only the largest regularised (BigNAS, 2003.11142).

  Its weight decay too is only the largest one's with `optim.coupled`: once a step. The zero scales of the
  last normalisation of a block, at which it starts, are the model's.
  """
  return _recipe("bignas", _sandwich(), 0.1)


def deps() -> dict[str, Any]:
  """A sandwich on a supernet whose largest member is half trained, its others warmed up (DεpS, ECCV 2024).

  With `phases("deps", space)`, the first of which trains the largest alone: 5 of the other's 125 epochs
  are the warm-up.
  """
  return _recipe("deps", _sandwich() | {"ramp": 5 / 125}, 0.1)


def attentive_nas() -> dict[str, Any]:
  """A sandwich whose random members have the lowest label loss of three of about the same FLOPs: best-up
  (AttentiveNAS, 2011.09011)."""
  sampler = {"name": "attentive", "random": 2, "candidates": 3, "buckets": 64, "table": 2000,
             "reduce": "sum", "regularise": "largest", "whole": False}
  return _recipe("attentive_nas", sampler, 0.1) | {"judge": "labels"}


def attentive_nas_worst_up() -> dict[str, Any]:
  """The same with the highest loss: worst-up."""
  return attentive_nas() | {"name": "attentive_nas_worst_up", "select": "highest"}


def alphanet() -> dict[str, Any]:
  """A sandwich whose members follow the largest by adaptive α-divergence (AlphaNet, 2102.07954)."""
  objective = {"name": "alpha_divergence", "alphas": (-1.0, 1.0), "clamp": 5.0, "label_smoothing": 0.1,
               "student_labels": 0.0, "distillation": 1.0, "delay": 0, "ramp": 0}
  return _recipe("alphanet", _sandwich()) | {"objective": objective}


def poa(n: int = 1) -> dict[str, Any]:
  """An average of the whole network teaches it and `n` elastic students on several crops, without labels (POA,
  2408.01031).

  Members are evaluated and extracted from the average. The sampling is that of its ViT and, by its paper, Swin;
  its code has biases of 2 for Swin, 1 and 2 for ResNets.
  """
  objective = {
    "name": "self_distillation", "prototypes": (8192, 16384, 32768, 65536), "hidden": 2048, "bottleneck": 256,
    "intact_weight": 0.8, "same_view": 1.0, "pairs": "joint", "koleo": 0.1, "koleo_reduce": "mean",
    "centering": "sinkhorn", "iterations": 3, "center_momentum": 0.9, "student_temperature": 0.1,
    "teacher_temperature": 0.07, "warmup_temperature": 0.04, "warmup_steps": 0, "frozen_steps": 0, "patches": 0.0,
    "patch_delay": 0, "told_after": 200}
  sampler = {"name": "intact", "n": n, "width_bias": 3.0, "depth_bias": 3.0, "whole_first": True,
             "whole": False}
  return _recipe("poa", sampler) | {
    "objective": objective, "teacher": "ema", "ema": 0.992, "ema_end": 0.9999, "hands_out": "teacher"}


def poa_no_same_view() -> dict[str, Any]:
  """POA without the terms of elastic students against the intact one (an ablation of its table 3)."""
  made = poa()
  return made | {"name": "poa_no_same_view", "objective": made["objective"] | {"same_view": 0.0}}


def self_distillation(subnet: str = "", name: str = "self_distillation") -> dict[str, Any]:
  """One network without elastic students: DINO's training (2104.14294) with the heads and terms of POA.

  Args:
    subnet: Which member of the space; the largest by default.
    name: `"separate"` and `"truncate"` make it the baseline of that name.
  """
  made = poa(n=0)
  objective = made["objective"] | {"intact_weight": 1.0, "koleo_reduce": "sum"}
  return made | {"name": name, "objective": objective} | (
    {"subnet": subnet} if subnet or name == "separate" else {})


def _sandwich() -> dict[str, Any]:
  return {"name": "sandwich", "random": 2, "candidates": 1, "reduce": "sum", "by": "choices",
          "regularise": "largest", "whole": False}


def _taught(made: dict[str, Any], student_labels: float) -> dict[str, Any]:
  return made | {"objective": made["objective"] | {"student_labels": student_labels}}


def _recipe(name: str, sampler: dict[str, Any], label_smoothing: float = 0.0) -> dict[str, Any]:
  return {
    "name": name, "sampler": sampler,
    "objective": {
      "name": "classification", "label_smoothing": label_smoothing, "student_labels": 0.0,
      "distillation": 1.0, "temperature": 1.0, "space": "logits", "delay": 0, "ramp": 0},
    "teacher": "largest", "ema": 0.999, "select": "lowest", "judge": "own", "untouched": "update"}


RECIPES = {
  "separate": separate, "truncate": truncate, "sandwich": sandwich, "sorted": sorted_,
  "matformer_joint": matformer_joint, "matformer_sampled": matformer_sampled,
  "matryoshka": matryoshka, "matryoshka_tied": matryoshka_tied,
  "soft": soft, "layerskip": layerskip,
  "ofa": ofa, "compofa": compofa, "rss": rss, "bignas": bignas, "deps": deps,
  "attentive_nas": attentive_nas, "attentive_nas_worst_up": attentive_nas_worst_up, "alphanet": alphanet,
  "poa": poa, "poa_no_same_view": poa_no_same_view, "self_distillation": self_distillation,
}
PHASES = {"ofa": shrinking, "compofa": one_stage, "deps": delayed}

# SGD with Nesterov momentum on batches of 2,048 images, cosine.
_SGD = {"name": "sgd", "learning_rate": 2.6, "schedule": "cosine", "warmup_steps": 0, "momentum": 0.9,
        "weight_decay": 3e-5, "coupled": True, "clip_norm": 0.0}
# 0.1 for every 256 images; 5 of 360 epochs of warm-up.
_ATTENTIVE = _SGD | {"learning_rate": 0.8, "weight_decay": 1e-5, "clip_value": 1.0, "warmup_share": 5 / 360}
OPTIM = {
  "ofa": _SGD, "compofa": _SGD, "deps": _SGD, "attentive_nas": _ATTENTIVE,
  "attentive_nas_worst_up": _ATTENTIVE, "alphanet": _ATTENTIVE,
  # On batches of 4,096 images; 0.97 every 2.4 epochs, of which 355 follow the warm-up. b2 and epsilon are MnasNet's.
  "bignas": {"name": "rmsprop", "learning_rate": 0.256, "schedule": "exponential", "warmup_steps": 0,
             "warmup_share": 5 / 360, "decay_rate": 0.97, "decay_share": 2.4 / 355, "floor": 0.05,
             "momentum": 0.9, "b2": 0.9, "epsilon": 1e-3, "weight_decay": 1e-5, "coupled": True,
             "clip_norm": 0.0},
}
