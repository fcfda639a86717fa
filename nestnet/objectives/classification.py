"""Labels, and distillation from a teacher in logits or features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestnet.errors import UserError, one_of
from nestnet.objectives.base import Objective, Targets


def classification(label_smoothing: float = 0.0, student_labels: float = 0.0,
                   distillation: float = 1.0, temperature: float = 1.0, space: str = "logits",
                   delay: int = 0, ramp: int = 0) -> Objective:
  """Cross-entropy with the labels; for taught sub-networks, with a teacher.

  A taught sub-network minimises, with `r` going from 0 to 1 over `ramp` steps after step `delay`,

      (1 - r) * CE(labels) + r * (student_labels * CE(labels) + distillation * KD)

  so before the delay it learns from the labels. The defaults are in-place distillation of BigNAS
  (2003.11142, section 3.1) and US-Nets (1903.05134, section 3.3): the teacher's outputs alone.

  Args:
    label_smoothing: Share of the label's probability that is spread over all classes.
    student_labels: Weight of the labels for taught sub-networks.
    distillation: Weight of the distillation term KD.
    temperature: T, of both softmaxes in logit space; KD is multiplied by T^2 (Hinton et al.,
      1503.02531).
    space: `"logits"`: KD is the cross-entropy with the teacher's softmax. `"features"`: KD is the
      mean squared distance between unit-length features, the teacher's cut to the student's width.
    delay: Step at which distillation begins.
    ramp: Number of steps over which it grows to full weight.
  """
  if space not in ("logits", "features"):
    raise one_of("space of distillation", space, ("logits", "features"))
  if temperature <= 0:
    raise UserError(f"classification: temperature={temperature}; allowed is a temperature above 0")

  def relation(outputs, teacher):
    if space == "logits":
      return soft_cross_entropy(outputs["logits"].astype(jnp.float32), teacher["logits"], temperature)
    if "features" not in outputs:
      raise UserError("distillation in features: this network gives none where their number is data to one "
                      "program; allowed: recipe.objective.space=logits, or train.execution=slice")
    return feature_distance(outputs["features"], teacher["features"])

  return distilled(relation, label_smoothing, student_labels, distillation, delay, ramp)


def distilled(relation: Callable[[Any, Any], jax.Array], label_smoothing: float, student_labels: float,
              distillation: float, delay: int, ramp: int) -> Objective:
  """The objective of `classification` with a KD of its own: `relation(outputs, teacher) -> scalar`.

  Raises:
    ValueError: A share of smoothing outside [0, 1), or a negative number of steps.
  """
  if not 0 <= label_smoothing < 1:
    raise UserError(f"classification: label_smoothing={label_smoothing}; allowed: smoothing in [0, 1)")
  check_ramp("classification", delay, ramp)

  def loss(params, state, outputs, targets: Targets, step, rng):
    logits, labels = outputs["logits"].astype(jnp.float32), targets.batch["label"]
    ce = label_cross_entropy(logits, labels, label_smoothing)
    metrics = {"accuracy": jnp.mean(logits.argmax(-1) == labels)}
    if targets.teacher is None:
      return ce, metrics
    kd = relation(outputs, targets.teacher)
    return mixed(ce, kd, step, student_labels, distillation, delay, ramp), metrics | {"distillation": kd}

  return Objective(loss=loss, needs=("image", "label"))


def mixed(ce: jax.Array, kd: jax.Array, step: jax.Array | int, student_labels: float, distillation: float,
          delay: int, ramp: int) -> jax.Array:
  """`(1 - r) * CE + r * (student_labels * CE + distillation * KD)`, `r` growing from 0 to 1 at a step."""
  r = jnp.clip((step - delay + 1) / (ramp + 1), 0.0, 1.0)
  return (1 - r) * ce + r * (student_labels * ce + distillation * kd)


def check_ramp(name: str, delay: int, ramp: int) -> None:
  """Raises `ValueError` for a negative number of steps."""
  if min(delay, ramp) < 0:
    raise UserError(f"{name}: delay={delay}, ramp={ramp}; allowed: delay and ramp of at least 0")


def label_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Mean cross-entropy of logits `[batch, classes]` with labels `[batch]`, smoothed."""
  one_hot = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  return optax.softmax_cross_entropy(logits, one_hot).mean()


def soft_cross_entropy(logits: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Mean cross-entropy with the teacher's softmax at a temperature T, times T^2."""
  targets = jax.nn.softmax(teacher.astype(jnp.float32) / temperature)
  return temperature ** 2 * optax.softmax_cross_entropy(logits / temperature, targets).mean()


def feature_distance(features: jax.Array, teacher: jax.Array) -> jax.Array:
  """Mean squared distance of unit vectors `[batch, features]`; the teacher's leading features count."""
  student, teacher = (_unit(f) for f in (features, teacher[:, :features.shape[-1]]))
  return jnp.mean(jnp.sum((student - teacher) ** 2, axis=-1))


def _unit(features: jax.Array) -> jax.Array:
  features = features.astype(jnp.float32)
  # Inside the root, lest the gradient of a vector of zeros be no number.
  return features * jax.lax.rsqrt(jnp.sum(features ** 2, axis=-1, keepdims=True) + 1e-12)
