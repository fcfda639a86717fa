"""Exits along the depth of one network: what several of its leading parts predict, from one forward pass."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError, one_of
from nestnet.objectives.base import Objective, Targets
from nestnet.objectives.language import counted_mean, inputs_of, next_token_losses, targets_of

WEIGHTS = ("even", "rising")
CURRICULA = ("none", "rotational", "gradual")


def exits(depths: Sequence[int] = (), weights: str = "even", scale: float = 1.0, curriculum: str = "none",
          interval: int = 1) -> Objective:
  """The weighted mean, over depths d, of the next token's cross-entropy by the first d layers.

  One forward pass of the sub-network gives them all, through its own last norm and head; gradients of every
  exit go all the way down, and labels alone teach. At step t it minimises

      sum over d of C(t, d) e(d) CE(d)  /  sum over d of C(t, d) e(d)

  The exit at depth d is the member that keeps `layers=d`. Those beyond the depth of a sub-network are left
  out for it.

  Args:
    depths: Where exits are; by default behind every layer.
    weights: `"even"`: e is 1, the plain mean (SoFT, 2309.08968, section 3). `"rising"`: of the deepest exit D
      it is D - 1 + `scale` * (0 + 1 + ... + D - 2), and of another `scale` * (0 + 1 + ... + d - 1)
      (LayerSkip, 2404.16710, section 4.1.2), so that nothing is asked of the first layer.
    scale: Of earlier exits' weights where they rise.
    curriculum: Which exits count, C being 1 for these; the deepest always does. `"none"`: all.
      `"rotational"`: every `interval`-th, moving on by one a step. `"gradual"`: from the deepest down, one
      more every `interval` steps (in LayerSkip half of the steps divided by the layers). Those that do not
      count are computed all the same.
    interval: Of the curriculum.

  Raises:
    ValueError: Unknown names, depths that do not rise from at least 1, a scale outside [0, 1], or an interval
      below 1.
  """
  depths = tuple(depths)
  for option, value, allowed in (("weights", weights, WEIGHTS), ("curriculum", curriculum, CURRICULA)):
    if value not in allowed:
      raise one_of(f"{option} of exits", value, allowed)
  if any(b <= a for a, b in zip((0, *depths), depths)):
    raise UserError(f"exits: depths={list(depths)}; allowed are rising numbers of layers, from 1")
  if not 0 <= scale <= 1 or interval < 1:
    raise UserError(f"exits: scale={scale}, interval={interval}; allowed: a scale in [0, 1], an interval of "
                    "at least 1")

  def init(rng, model, space):
    name = type(model).__name__
    if "exits" not in inspect.signature(type(model).__call__).parameters:
      raise UserError("the objective exits needs a network that is called with exits=..., which "
                      f"{name} is not; allowed: Decoder")
    if depths and depths[-1] > model.layers:
      raise UserError(f"exits: depths={list(depths)} of {name} with layers={model.layers}; allowed are "
                      f"depths up to {model.layers}")
    return {}, {}, {}

  def forward(apply, batch):
    return apply(inputs_of(batch), exits=depths or "all")

  def loss(params, state, outputs, targets: Targets, step, rng):
    if targets.teacher is not None:
      raise UserError("exits learn from labels alone; allowed are samplers whose terms are not taught: "
                      "largest, joint, sampled, sorted_nested")
    if not outputs.get("exits"):
      raise UserError(f"exits: no depth of {list(depths)} is within a sub-network that trains; allowed are "
                      "members with at least as many layers as the first")
    known = targets_of(targets.batch)
    mean = functools.partial(counted_mean, targets=known)
    losses = {depth: mean(next_token_losses(logits, known)) for depth, logits in outputs["exits"].items()}
    share = shares(tuple(losses), step, weights, scale, curriculum, interval)
    metrics = {f"bits_per_token_{depth}": ce / math.log(2) for depth, ce in losses.items()}
    deepest = outputs["exits"][max(losses)]
    return jnp.sum(share * jnp.stack([*losses.values()])), metrics | {
      "accuracy": mean(deepest.argmax(-1) == known)}

  return Objective(loss=loss, init=init, forward=forward, needs=("tokens",))


def shares(depths: Sequence[int], step: jax.Array | int, weights: str = "even", scale: float = 1.0,
           curriculum: str = "none", interval: int = 1) -> jax.Array:
  """What each exit contributes to the loss, `[exits]`, 1 in all.

  Args:
    depths: Of the exits, rising.
    step: Number of the step.
    weights: As in `exits`.
    scale: As in `exits`.
    curriculum: As in `exits`.
    interval: As in `exits`.

  Example:
    >>> shares((1, 2, 3), 0, "rising").tolist()
    [0.0, 0.25, 0.75]
    >>> shares((1, 2, 3, 4), 3, curriculum="rotational", interval=2).tolist()
    [0.0, 0.5, 0.0, 0.5]
  """
  count, last = len(depths), depths[-1]
  below = lambda depth: depth * (depth - 1) / 2
  rising = [scale * below(depth) for depth in depths[:-1]]
  # A single layer has no others to weigh it against.
  e = [*rising, max(1, last - 1 + scale * below(last - 1))] if weights == "rising" else [1.0] * count
  place, on = np.arange(count), True
  if curriculum == "rotational":
    on = (place - step) % interval == 0
  elif curriculum == "gradual":
    on = count - 1 - place <= step // interval
  e = jnp.where(on | (place == count - 1), jnp.asarray(e, jnp.float32), 0.0)
  return e / e.sum()
