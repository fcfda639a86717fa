"""Optimizers and learning-rate schedules by name, from Optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestnet.axes import Axes, is_axes
from nestnet.errors import UserError, one_of


def schedule(name: str, learning_rate: float, warmup_steps: int, steps: int, *, floor: float = 0.0,
             decay_rate: float = 0.97, decay_share: float = 1 / 150, milestones: Sequence[float] = (0.5, 0.75),
             until: float = 1.0) -> optax.Schedule:
  """A learning rate for each step: linear warm-up, then what is named, up to the last step.

  `"cosine"` and `"linear"` fall to `floor`, `"constant"` stays. `"exponential"` is multiplied by
  `decay_rate` again and again and stays at `floor` once it is there: the constant ending of BigNAS
  (2003.11142, section 3.2), with 0.05. `"step"` is multiplied by `decay_rate` at each of `milestones`.

  Args:
    name: One of these.
    learning_rate: The highest.
    warmup_steps: Steps over which it rises from 0.
    steps: All steps.
    floor: The lowest, as a share of the highest.
    decay_rate: Factor of the exponential and of the step schedule.
    decay_share: Share of the steps behind the warm-up from one fall of the exponential to the next, such
      as 2.4 / 355 for 2.4 epochs of 360 of which 5 are warm-up.
    milestones: Shares of all steps.
    until: How much of the fall of the cosine and the linear schedule the steps make; below 1 they end above
      `floor` (`iter_num_scale` in the code of POA).

  Example:
    >>> float(schedule("cosine", 0.1, warmup_steps=10, steps=100)(10))
    0.1...
  """
  if not 0 <= warmup_steps < max(steps, 1) or learning_rate <= 0:
    raise UserError(f"optim: learning_rate={learning_rate}, warmup_steps={warmup_steps}, steps={steps}: "
                    "allowed are a rate above 0 and fewer steps of warm-up than of training; warmup_share in "
                    "place of warmup_steps is a share of these")
  if not 0 < until <= 1:
    raise UserError(f"optim: until={until}; allowed is a share of the fall above 0, up to 1")
  if not 0 <= floor <= 1 or min(decay_rate, decay_share) <= 0 or any(not 0 < m < 1 for m in milestones):
    raise UserError(f"optim: floor={floor}, decay_rate={decay_rate}, decay_share={decay_share}, milestones="
                    f"{list(milestones)}; allowed: floor in [0, 1], rate and share above 0, milestones in "
                    "(0, 1)")
  after, lowest = steps - warmup_steps, floor * learning_rate
  falls: dict[int, float] = {}
  for milestone in milestones:
    at = max(round(milestone * steps) - warmup_steps, 0)
    falls[at] = falls.get(at, 1.0) * decay_rate
  decay = {
    "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after / until, alpha=floor),
    "linear": lambda: optax.linear_schedule(learning_rate, lowest, after / until),
    "constant": lambda: optax.constant_schedule(learning_rate),
    "exponential": lambda: optax.exponential_decay(
      learning_rate, max(decay_share * after, 1), decay_rate, staircase=True, end_value=lowest),
    "step": lambda: optax.piecewise_constant_schedule(learning_rate, falls),
  }
  if name not in decay:
    raise one_of("schedule", name, decay)
  warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
  return optax.join_schedules([warmup, decay[name]()], [warmup_steps]) if warmup_steps else decay[name]()


def rising(start: float, end: float | None, first: int, steps: int) -> float | optax.Schedule:
  """From `start` to `end` along half a cosine, over `steps` steps from the `first` on; `start` where there is
  no end. Weight decay and the decay of a teacher's average rise so in DINO (2104.14294, section 3.2).

  Example:
    >>> [round(float(rising(0.0, 1.0, 10, 20)(step)), 3) for step in (0, 10, 20, 30, 40)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
  """
  if end is None:
    return start
  return lambda step: end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((step - first) / steps, 0, 1)))


def optimizer(name: str, rate: optax.Schedule, weight_decay: float = 0.0, clip_norm: float = 0.0,
              momentum: float = 0.9, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8,
              coupled: bool = False, clip_value: float = 0.0, weight_decay_end: float | None = None,
              steps: int = 1, layer_decay: float = 1.0, multipliers: Mapping[str, float] | None = None
              ) -> Callable[[Any], optax.GradientTransformation]:
  """Makes an optimizer from the axis names of what trains; kernels decay, and no biases, norms, positions.

  Args:
    name: `"adamw"`; `"sgd"`, with Nesterov momentum; `"rmsprop"`, with momentum.
    rate: The learning-rate schedule.
    weight_decay: Of the masked weights. By default it is decoupled: the rate times `weight_decay` a step
      (Loshchilov and Hutter, 1711.05101).
    clip_norm: Largest global norm of the gradient; 0: no limit.
    momentum: Of SGD and RMSProp.
    b1: First decay of Adam.
    b2: Decay of the mean square, of Adam and RMSProp.
    epsilon: Added to the root of the mean square (Adam), or to the mean square (RMSProp).
    coupled: Whether `weight_decay` times the weight is added to the gradient instead, before momentum,
      as the convolutional papers and PyTorch's SGD do. That is once a step, however many sub-networks
      train: the gradient of an L2 term in the largest one's loss alone.
    clip_value: Largest absolute value in the gradient; 0: no limit.
    weight_decay_end: What weight decay becomes over `steps` steps, along half a cosine; None: it stays.
    steps: Over which it does.
    layer_decay: Factor of the rate from one layer of a stack to the one before it (BEiT, 2106.08254); what
      stands outside of stacks has `multipliers` for that.
    multipliers: Factors of the rate by place in the tree, such as `{"model/patch": 0.2}`: of all below it.
  """
  known = min(weight_decay, weight_decay if weight_decay_end is None else weight_decay_end)
  if min(known, clip_norm, clip_value) < 0 or not all(0 <= b < 1 for b in (b1, b2, momentum)):
    raise UserError(f"optim: weight_decay={weight_decay}, clip_norm={clip_norm}, clip_value={clip_value}, "
                    f"momentum={momentum}, b1={b1}, b2={b2}; allowed: at least 0, and [0, 1) for the last "
                    "three")
  if coupled and name == "adamw":
    raise UserError("optim: coupled weight decay with adamw, whose decay is decoupled; allowed: sgd, rmsprop")

  if not 0 < layer_decay <= 1 or any(factor < 0 for factor in (multipliers or {}).values()):
    raise UserError(f"optim: layer_decay={layer_decay}, multipliers={dict(multipliers or {})}; allowed: a decay "
                    "in (0, 1], factors of at least 0")
  weight_decay = rising(weight_decay, weight_decay_end, 0, steps)

  def make(axes):
    mask = jax.tree.map(lambda names: bool(Axes.of(names).contracted), axes, is_leaf=is_axes)
    decay = [optax.add_decayed_weights(weight_decay, mask=mask)]
    moved = lambda nesterov: [optax.trace(momentum, nesterov=nesterov) if momentum else optax.identity()]

    def rule(*moments):
      ordered = [*decay, *moments] if coupled else [*moments, *decay]
      return [*ordered, optax.scale_by_learning_rate(rate)]

    rules = {
      "adamw": lambda: [optax.adamw(rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask)],
      "sgd": lambda: rule(*moved(True)),
      "rmsprop": lambda: rule(optax.scale_by_rms(b2, epsilon), *moved(False)),
    }
    if name not in rules:
      raise one_of("optimizer", name, rules)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    clip += [optax.clip(clip_value)] if clip_value else []
    factors = [_scaled(axes, layer_decay, multipliers or {})] if layer_decay < 1 or multipliers else []
    return optax.chain(*clip, *rules[name](), *factors)
  return make


def _scaled(axes: Any, layer_decay: float, multipliers: Mapping[str, float]) -> optax.GradientTransformation:
  """Updates times the factors of their places, and of their layers."""
  places = [(jax.tree_util.keystr(path, simple=True, separator="/"), Axes.of(names))
            for path, names in jax.tree.leaves_with_path(axes, is_leaf=is_axes)]
  under = lambda place, key: place == key or place.startswith(f"{key}/")
  for key in multipliers:
    if not any(under(place, key) for place, _ in places):
      raise one_of("place in optim.multipliers", key, sorted({"/".join(p.split("/")[:2]) for p, _ in places}))

  def scaled(place, names, update):
    for key, factor in multipliers.items():
      update = update * factor if under(place, key) else update
    if not names.stacked or layer_decay == 1:
      return update
    layers = update.shape[0]
    powers = layer_decay ** (layers - jnp.arange(layers, dtype=update.dtype))
    return update * powers.reshape(-1, *(1,) * (update.ndim - 1))

  def apply(updates):
    leaves, structure = jax.tree.flatten(updates)
    return jax.tree.unflatten(structure, [scaled(*place, leaf) for place, leaf in zip(places, leaves)])

  return optax.stateless(lambda updates, _: apply(updates))
