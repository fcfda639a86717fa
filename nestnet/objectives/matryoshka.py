"""Matryoshka representation learning: classifiers on nested prefixes of one representation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nestnet.errors import UserError
from nestnet.objectives.base import Objective, Targets
from nestnet.objectives.classification import label_cross_entropy


def matryoshka(sizes: Sequence[int], tied: bool = False, weights: Sequence[float] = (),
               label_smoothing: float = 0.0, head: str = "head") -> Objective:
  """Sum over sizes m of c_m * CE(W_m z[:m] + b_m, labels), one backbone forward (MRL, 2205.13147, eq. 1).

  Args:
    sizes: The nesting list m, the choices of `features` in the space.
    tied: One matrix whose leading rows serve each size, with one bias (MRL-E); otherwise one head
      for each size.
    weights: c_m, one for each size; 1 by default. A sum, not a mean.
    label_smoothing: As in `classification`.
    head: Key of the model's own classifier, which the sub-network's head replaces when it is
      evaluated or extracted.
  """
  sizes = tuple(sizes)
  weights = tuple(weights) or (1.0,) * len(sizes)
  if len(weights) != len(sizes):
    raise UserError(f"matryoshka: got {len(weights)} weights for the {len(sizes)} sizes {sizes}")

  def init(rng, model, space):
    nested = space.choices("features") if "features" in space.axes else ()
    if set(nested) != set(sizes):
      raise UserError(f"matryoshka: sizes {sizes} must be the space's choices of features, {nested}")
    classes = model.classes

    def one(key, size):
      kernel = jax.nn.initializers.lecun_normal()(key, (size, classes))
      return {"kernel": kernel, "bias": jnp.zeros((classes,))}

    if tied:
      return one(rng, max(sizes)), {"kernel": "features -> classes", "bias": "-> classes"}, {}
    params = {str(m): one(jax.random.fold_in(rng, m), m) for m in sizes}
    return params, {m: {"kernel": "prefix -> classes", "bias": "-> classes"} for m in params}, {}

  def head_of(params, size):
    return {"kernel": params["kernel"][:size], "bias": params["bias"]} if tied else params[str(size)]

  def loss(params, state, outputs, targets: Targets, step, rng):
    features, labels = outputs["features"].astype(jnp.float32), targets.batch["label"]
    total, metrics = 0.0, {}
    for size, weight in zip(sizes, weights):
      own = head_of(params, size)
      logits = features[:, :size] @ own["kernel"] + own["bias"][None]
      total += weight * label_cross_entropy(logits, labels, label_smoothing)
      metrics[f"accuracy_{size}"] = jnp.mean(logits.argmax(-1) == labels)
    return total, metrics

  def attach(variables, params, subnet):
    own = head_of(params, subnet["features"])
    return variables | {"params": variables["params"] | {head: own}}

  return Objective(loss=loss, init=init, attach=attach, needs=("image", "label"))
