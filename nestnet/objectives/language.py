"""The next token, and distillation from a teacher's distribution over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestnet.errors import UserError, one_of
from nestnet.objectives.base import Objective, Targets
from nestnet.objectives.classification import check_ramp, mixed

DIVERGENCES = ("forward", "reverse")


def language_modelling(student_labels: float = 0.0, distillation: float = 1.0, temperature: float = 1.0,
                       divergence: str = "forward", delay: int = 0, ramp: int = 0) -> Objective:
  """Cross-entropy of the next token; for taught sub-networks, with a teacher's distribution over it.

  A taught sub-network minimises, with `r` going from 0 to 1 over `ramp` steps after step `delay`,

      (1 - r) * CE(tokens) + r * (student_labels * CE(tokens) + distillation * T^2 * KL)

  Both terms are means over the targets that count: those that are not -1. Of a batch in parts, or on
  devices that train sub-networks of their own, they are means of the parts' means.

  Args:
    student_labels: Weight of the tokens for taught sub-networks.
    distillation: Weight of the distillation term.
    temperature: T, of both softmaxes (Hinton et al., 1503.02531).
    divergence: `"forward"`: KL(teacher || student), which wants the student to cover what its teacher
      does; `"reverse"`: KL(student || teacher), which wants it to say nothing that the teacher would not
      (MiniLLM, 2306.08543).
    delay: Step at which distillation begins.
    ramp: Number of steps over which it grows to full weight.
  """
  if divergence not in DIVERGENCES:
    raise one_of("divergence of distillation", divergence, DIVERGENCES)
  if temperature <= 0:
    raise UserError(f"language_modelling: temperature={temperature}; allowed is a temperature above 0")
  check_ramp("language_modelling", delay, ramp)

  def loss(params, state, outputs, targets: Targets, step, rng):
    logits, known = outputs["logits"].astype(jnp.float32), targets_of(targets.batch)
    ce = counted_mean(next_token_losses(logits, known), known)
    right = counted_mean(logits.argmax(-1) == known, known)
    metrics = {"bits_per_token": ce / math.log(2), "accuracy": right}
    if targets.teacher is None:
      return ce, metrics
    kl = temperature ** 2 * counted_mean(
      divergences(logits / temperature, targets.teacher["logits"] / temperature, divergence), known)
    loss = mixed(ce, kl, step, student_labels, distillation, delay, ramp)
    return loss, metrics | {"distillation": kl}

  return Objective(loss=loss, forward=_forward, teach=_teach, needs=("tokens",))


def inputs_of(batch: Mapping[str, Any]) -> jax.Array:
  """What a network reads of `tokens` `[batch, length + 1]`: all but the last, `[batch, length]`.

  Behind the end of a text stands some token in place of -1: no counted target attends to it.
  """
  return jnp.maximum(batch["tokens"][:, :-1], 0)


def targets_of(batch: Mapping[str, Any]) -> jax.Array:
  """What follows each input, `[batch, length]`; -1 does not count."""
  return batch["tokens"][:, 1:]


def next_token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy in nats of logits `[..., vocab]` with the next tokens `[...]`; 0 where they are -1.

  Example:
    >>> [round(float(x), 4) for x in next_token_losses(jnp.zeros((2, 4)), jnp.array([3, -1]))]
    [1.3863, 0.0]
  """
  logits, labels = logits.astype(jnp.float32), jnp.maximum(targets, 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.where(targets >= 0, losses, 0.0)


def divergences(logits: jax.Array, teacher: jax.Array, direction: str) -> jax.Array:
  """KL of each token's distribution from its teacher's, `[...]`, in nats.

  Args:
    logits: Of the student, `[..., vocab]`.
    teacher: Of the teacher.
    direction: `"forward"`: KL(teacher || student); `"reverse"`: KL(student || teacher).

  Example:
    >>> same = jnp.array([1.0, 2.0])
    >>> float(divergences(same, same + 3, "reverse"))
    0.0
  """
  log_q, log_p = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, teacher))
  first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
  return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def counted_mean(values: jax.Array, targets: jax.Array) -> jax.Array:
  """The mean of values `[...]` over the targets `[...]` that are not -1; 0 where none is."""
  counted = targets >= 0
  return jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


def _forward(apply, batch):
  return apply(inputs_of(batch))


def _teach(params, state, outputs, batch, step):
  return {"logits": outputs["logits"]}
