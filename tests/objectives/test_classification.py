"""Classification and distillation losses equal their formulas in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet.errors import UserError
from nestnet.objectives import Targets, objective
from nestnet.objectives.classification import (
  feature_distance, label_cross_entropy, soft_cross_entropy)

RNG = np.random.default_rng(0)
LOGITS, TEACHER = (RNG.normal(0, 2, (6, 5)).astype(np.float32) for _ in range(2))
FEATURES, WIDE = (RNG.normal(size=(6, n)).astype(np.float32) for n in (3, 8))
LABELS = RNG.integers(0, 5, 6)
OUTPUTS = {"logits": LOGITS, "features": FEATURES}
TAUGHT = Targets({"label": LABELS}, {"logits": TEACHER, "features": WIDE})


def softmax(x):
  e = np.exp(x.astype(np.float64))
  return e / e.sum(axis=1, keepdims=True)


def ce(smoothing=0.0):
  """Row by row: minus the log-probability of the label, a share of it spread over all classes."""
  log = np.log(softmax(LOGITS))
  return np.mean([-(1 - smoothing) * log[i, y] - smoothing * log[i].mean()
                  for i, y in enumerate(LABELS)])


def kd(t=1.0):
  return -t ** 2 * np.mean(np.sum(softmax(TEACHER / t) * np.log(softmax(LOGITS / t)), axis=1))


def distance():
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  return np.mean(np.sum((unit(FEATURES) - unit(WIDE[:, :3])) ** 2, axis=1))


def loss(targets=TAUGHT, step=0, **options):
  return objective("classification", **options).loss({}, {}, OUTPUTS, targets, step, None)


def test_the_parts():
  for smoothing in (0.0, 0.1):
    found = label_cross_entropy(LOGITS, LABELS, smoothing)
    np.testing.assert_allclose(found, ce(smoothing), rtol=1e-6)
  for t in (0.5, 1.0, 4.0):
    np.testing.assert_allclose(soft_cross_entropy(LOGITS, TEACHER, t), kd(t), rtol=1e-6)
  np.testing.assert_allclose(feature_distance(FEATURES, WIDE), distance(), rtol=1e-6)


def test_untaught_learns_from_labels_only():
  value, metrics = loss(Targets({"label": LABELS}), label_smoothing=0.2, temperature=3.0)
  np.testing.assert_allclose(value, ce(0.2), rtol=1e-6)
  assert set(metrics) == {"accuracy"}
  np.testing.assert_allclose(metrics["accuracy"], np.mean(LOGITS.argmax(1) == LABELS))


@pytest.mark.parametrize("options, wanted", [
  ({}, kd()),
  ({"temperature": 3.0}, kd(3.0)),
  ({"student_labels": 0.5, "distillation": 0.7, "label_smoothing": 0.1},
   0.5 * ce(0.1) + 0.7 * kd()),
  ({"space": "features"}, distance()),
  ({"space": "features", "student_labels": 1.0, "distillation": 2.0}, ce() + 2 * distance()),
])
def test_taught(options, wanted):
  value, metrics = loss(**options)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  np.testing.assert_allclose(metrics["distillation"], distance() if "space" in options
                             else kd(options.get("temperature", 1.0)), rtol=1e-6)


@pytest.mark.parametrize("delay, ramp, shares", [
  (0, 0, {0: 1, 9: 1}), (3, 0, {0: 0, 2: 0, 3: 1, 9: 1}),
  (0, 3, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 9: 1}), (4, 1, {3: 0, 4: 0.5, 5: 1, 6: 1})])
def test_delay_and_ramp_at_each_point(delay, ramp, shares):
  for step, r in shares.items():
    value, _ = loss(step=step, delay=delay, ramp=ramp, student_labels=0.5)
    np.testing.assert_allclose(value, (1 - r) * ce() + r * (0.5 * ce() + kd()), rtol=1e-6)


def test_kd_is_zero_gradient_where_the_student_agrees():
  """T^2 keeps the scale; agreement leaves the teacher's entropy."""
  entropy = -np.mean(np.sum(softmax(TEACHER) * np.log(softmax(TEACHER)), axis=1))
  np.testing.assert_allclose(soft_cross_entropy(TEACHER, TEACHER), entropy, rtol=1e-5)
  assert feature_distance(WIDE, 3 * WIDE) < 1e-6


def test_half_precision_logits_are_read_in_float32():
  value, _ = objective("classification").loss(
    {}, {}, {"logits": LOGITS.astype(np.float16)}, Targets({"label": LABELS}), 0, None)
  assert value.dtype == np.float32


def test_features_of_zeros_have_a_gradient():
  gradient = jax.grad(feature_distance)(jnp.zeros((2, 3)), WIDE[:2])
  assert np.isfinite(gradient).all()


def test_features_in_half_precision_are_normalised_in_float32():
  features, wide = (jnp.asarray(x, jnp.bfloat16) for x in (FEATURES, WIDE))
  found = feature_distance(features, wide)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, feature_distance(
    features.astype(jnp.float32), wide.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize("name, options, message", [
  ("clasification", {}, "objective 'clasification'; did you mean 'classification'"),
  ("classification", {"temprature": 1.0}, "'temprature'; did you mean 'temperature'"),
  ("classification", {"space": "pixels"}, "'pixels'.*logits, features"),
  ("classification", {"temperature": 0.0}, "temperature=0.0.*above 0"),
  ("classification", {"label_smoothing": 1.0}, "label_smoothing=1.0"),
  ("classification", {"delay": -1}, "delay=-1"),
  ("no_such_module:f", {}, "no module 'no_such_module'"),
  ("math:no_such_name", {}, "no_such_name"),
])
def test_mistakes_are_named(name, options, message):
  with pytest.raises(UserError, match=message):
    objective(name, **options)
