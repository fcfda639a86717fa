"""Optimizers and learning-rate schedules by name, from Optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from nestnet.errors import UserError, one_of


def schedule(name: str, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
  """A learning rate for each step: linear warm-up, then `"cosine"` to 0, `"linear"` to 0 or `"constant"`.

  Example:
    >>> float(schedule("cosine", 0.1, warmup_steps=10, steps=100)(10))
    0.1...
  """
  if not 0 <= warmup_steps < max(steps, 1) or learning_rate <= 0:
    raise UserError(f"learning_rate={learning_rate}, warmup_steps={warmup_steps}: allowed are a rate "
                    f"above 0 and fewer warm-up steps than the {steps} steps of training")
  after = steps - warmup_steps
  decay = {
    "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after),
    "linear": lambda: optax.linear_schedule(learning_rate, 0.0, after),
    "constant": lambda: optax.constant_schedule(learning_rate),
  }
  if name not in decay:
    raise one_of("schedule", name, decay)
  warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
  return optax.join_schedules([warmup, decay[name]()], [warmup_steps]) if warmup_steps else decay[name]()


def optimizer(name: str, rate: optax.Schedule, weight_decay: float = 0.0, clip_norm: float = 0.0,
              momentum: float = 0.9, b1: float = 0.9, b2: float = 0.999
              ) -> Callable[[Any], optax.GradientTransformation]:
  """Makes an optimizer from a mask of the weights that decay (kernels; no biases, norms, positions).

  Args:
    name: `"adamw"` or `"sgd"`, with Nesterov momentum; weight decay is decoupled in both, the rate
      times `weight_decay` a step (Loshchilov and Hutter, 1711.05101).
    rate: The learning-rate schedule.
    weight_decay: Of the masked weights.
    clip_norm: Largest global norm of the gradient; 0: no limit.
    momentum: Of SGD.
    b1: First decay of Adam.
    b2: Second decay of Adam.
  """
  if min(weight_decay, clip_norm) < 0 or not all(0 <= b < 1 for b in (b1, b2, momentum)):
    raise UserError(f"optim: weight_decay={weight_decay}, clip_norm={clip_norm}, momentum={momentum}, "
                    f"b1={b1}, b2={b2}; allowed: at least 0, and [0, 1) for the last three")

  def make(mask):
    rules = {
      "adamw": lambda: [optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)],
      "sgd": lambda: [optax.trace(momentum, nesterov=True) if momentum else optax.identity(),
                      optax.add_decayed_weights(weight_decay, mask=mask),
                      optax.scale_by_learning_rate(rate)],
    }
    if name not in rules:
      raise one_of("optimizer", name, rules)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, *rules[name]())
  return make
