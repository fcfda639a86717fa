"""Distillation by the larger of two α-divergences (AlphaNet, 2102.07954)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nestnet.errors import UserError
from nestnet.objectives.base import Objective
from nestnet.objectives.classification import distilled

# Differences of logits past this stay finite in float32, and have long been probabilities of 0 and 1.
_LIMIT = 1e30


def alpha_divergence(alphas: Sequence[float] = (-1.0, 1.0), clamp: float = 5.0, label_smoothing: float = 0.0,
                     student_labels: float = 0.0, distillation: float = 1.0, delay: int = 0, ramp: int = 0
                     ) -> Objective:
  """As `classification`, with the adaptive α-divergence from the teacher for KD.

  Example by example, the α of `alphas` counts whose divergence is largest: a negative α punishes a
  student that is sure where its teacher is not, a positive one the reverse. What is minimised has the
  divergence's gradient (`divergence`); its value can be negative.

  Args:
    alphas: Which α compete.
    clamp: Largest (teacher / student)^α that counts; for α = 1 nothing is clamped.
    label_smoothing: As in `classification`.
    student_labels: As in `classification`.
    distillation: As in `classification`.
    delay: As in `classification`.
    ramp: As in `classification`.
  """
  if not alphas or clamp <= 0:
    raise UserError(f"alpha_divergence: alphas={list(alphas)}, clamp={clamp}; allowed: at least one α, and "
                    "a clamp above 0")

  def relation(outputs, teacher):
    values, terms = zip(*(divergence(outputs["logits"], teacher["logits"], alpha, clamp) for alpha in alphas))
    # Of equal ones the last counts.
    largest = len(alphas) - 1 - jnp.stack(values[::-1]).argmax(0)
    return jnp.take_along_axis(jnp.stack(terms), largest[None], axis=0).mean()

  return distilled(relation, label_smoothing, student_labels, distillation, delay, ramp)


def divergence(logits: jax.Array, teacher: jax.Array, alpha: float, clamp: float
               ) -> tuple[jax.Array, jax.Array]:
  """The α-divergence of each example from its teacher, and a term that has its gradient.

  With probabilities q of the student and p of the teacher, r = p / q and w = min(r^α, clamp):

      value = sum q (w - 1) / (α (α - 1))              term = - sum sg(q w / α) log q + const
      α = 1: value = sum p log r                       term = - sum sg(p) log q
      α = 0: value = - sum q log w, w = min(r, clamp)  term = - sum sg(q (log w - 1)) log q

  where sg stops gradients, and const = sg(sum q log q) / (α (1 - α)), as AlphaNet reports it, has none.
  Both are finite for all finite logits.

  Args:
    logits: The student's, `[batch, classes]`.
    teacher: The teacher's.
    alpha: The α.
    clamp: Largest w.

  Returns:
    Two arrays `[batch]`.

  Example:
    >>> same = jnp.array([[1.0, 2.0]])
    >>> [round(float(divergence(same, same, alpha, 5.0)[0][0]), 6) for alpha in (-1.0, 0.0, 1.0)]
    [0.0, 0.0, 0.0]
  """
  student, teacher = (jax.nn.log_softmax(jnp.clip(x.astype(jnp.float32), -_LIMIT, _LIMIT))
                      for x in (logits, teacher))
  log_q, log_p = jax.lax.stop_gradient((student, teacher))
  q, p, log_r = jnp.exp(log_q), jnp.exp(log_p), log_p - log_q
  log_clamp = jnp.log(jnp.float32(clamp))
  if alpha == 1.0:
    value, weight = p * log_r, p
  elif alpha == 0.0:
    log_w = jnp.minimum(log_r, log_clamp)
    value, weight = -q * log_w, q * (log_w - 1)
  else:
    base = 1 / (alpha * (alpha - 1))
    # Clamped before the exponential, which thus cannot overflow.
    w = jnp.exp(jnp.minimum(alpha * log_r, log_clamp))
    value, weight = q * (w - 1) * base, q * (w / alpha + base)
  return value.sum(-1), -(weight * student).sum(-1)
