"""AlphaNet's objective: the divergences and their gradients in numpy, and finite numbers at any logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet.errors import UserError
from nestnet.objectives import Targets, objective
from nestnet.objectives.alpha_divergence import divergence
from nestnet.objectives.classification import soft_cross_entropy

RNG = np.random.default_rng(0)
# Far enough apart that ratios are clamped in some places and not in others.
LOGITS, TEACHER = (RNG.normal(0, 1.5, (6, 5)) for _ in range(2))
LABELS = RNG.integers(0, 5, 6)
ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
CLAMP = 5.0


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def parts(logits, teacher, alpha, clamp=CLAMP):
  """f - f_base and ρ of every class, as AlphaNet states them."""
  r = softmax(teacher) / softmax(logits)
  if alpha == 1:
    return r * np.log(r), r
  if alpha == 0:
    r = np.minimum(r, clamp)
    return -np.log(r), np.log(r) - 1
  w, base = np.minimum(r ** alpha, clamp), 1 / (alpha * (alpha - 1))
  return w * base - base, w / alpha + base


def value(logits, teacher, alpha, clamp=CLAMP):
  return (softmax(logits) * parts(logits, teacher, alpha, clamp)[0]).sum(axis=1)


def term(logits, weight):
  """Minus the sum of q ρ log q, with q ρ held."""
  return -(weight * np.log(softmax(logits))).sum(axis=1)


def slope(function, logits, width=1e-6):
  """Central differences of a sum over examples."""
  found = np.zeros_like(logits)
  for place in np.ndindex(logits.shape):
    step = np.zeros_like(logits)
    step[place] = width
    found[place] = (function(logits + step).sum() - function(logits - step).sum()) / (2 * width)
  return found


def gradient(logits, teacher, alpha, clamp=CLAMP):
  return jax.grad(lambda x: divergence(x, jnp.asarray(teacher, jnp.float32), alpha, clamp)[1].sum())(
    jnp.asarray(logits, jnp.float32))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_term_and_gradient_are_the_formula(alpha, clamp=2.0):
  found, terms = divergence(jnp.float32(LOGITS), jnp.float32(TEACHER), alpha, clamp)
  np.testing.assert_allclose(found, value(LOGITS, TEACHER, alpha, clamp), rtol=2e-5, atol=1e-6)
  weight = softmax(LOGITS) * parts(LOGITS, TEACHER, alpha, clamp)[1]
  np.testing.assert_allclose(terms, term(LOGITS, weight), rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(
    gradient(LOGITS, TEACHER, alpha, clamp), slope(lambda x: term(x, weight), LOGITS), atol=2e-6)
  clamped = (softmax(TEACHER) / softmax(LOGITS)) ** (alpha or 1) > clamp
  assert clamped.any() and not clamped.all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_that_of_the_divergence_where_nothing_is_clamped(alpha):
  wanted = slope(lambda x: value(x, TEACHER, alpha, np.inf), LOGITS)
  np.testing.assert_allclose(gradient(LOGITS, TEACHER, alpha, 1e30), wanted, atol=1e-5, rtol=1e-4)


def test_alpha_of_one_is_plain_distillation():
  wanted = jax.grad(lambda x: soft_cross_entropy(x, jnp.float32(TEACHER)) * len(x))(jnp.float32(LOGITS))
  np.testing.assert_allclose(gradient(LOGITS, TEACHER, 1.0), wanted, atol=1e-6)


def loss(targets, **options):
  outputs = {"logits": jnp.float32(LOGITS)}
  return objective("alpha_divergence", **options).loss({}, {}, outputs, targets, 0, None)


def test_each_example_has_its_own_alpha():
  values = np.stack([value(LOGITS, TEACHER, alpha) for alpha in (-1.0, 1.0)])
  terms = np.stack([term(LOGITS, softmax(LOGITS) * parts(LOGITS, TEACHER, alpha)[1])
                    for alpha in (-1.0, 1.0)])
  taught = Targets({"label": LABELS}, {"logits": jnp.float32(TEACHER)})
  found, metrics = loss(taught)
  wanted = terms[values.argmax(0), np.arange(6)].mean()
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics["distillation"], wanted, rtol=1e-5)
  assert len(set(values.argmax(0))) == 2
  ce = -np.log(softmax(LOGITS))[np.arange(6), LABELS].mean()
  np.testing.assert_allclose(loss(taught, student_labels=0.5)[0], wanted + 0.5 * ce, rtol=1e-5)
  np.testing.assert_allclose(loss(Targets({"label": LABELS}))[0], ce, rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_finite_at_any_logits(alpha):
  extremes = [0.0, 1e-30, 90.0, -1e3, 1e4, -1e20, 3e38, -3e38]
  rows = np.array([(a, b, 0.0) for a in extremes for b in extremes], np.float32)
  for logits in (rows, rows[::-1]):
    for other in (rows, rows[:, ::-1], np.roll(rows, 5, axis=0)):
      found, slopes = jax.value_and_grad(lambda x: divergence(x, jnp.asarray(other), alpha, CLAMP)[1].mean())(
        jnp.asarray(logits))
      values = divergence(jnp.asarray(logits), jnp.asarray(other), alpha, CLAMP)[0]
      assert np.isfinite(found) and np.isfinite(slopes).all() and np.isfinite(values).all()


def test_a_student_that_is_sure_and_wrong_still_learns():
  """Its gradient is that of plain distillation, though its probability underflows."""
  sure, teacher = jnp.array([[200.0, 0.0, 0.0]]), jnp.array([[0.0, 9.0, 0.0]])
  np.testing.assert_allclose(gradient(sure, teacher, 1.0), softmax(sure) - softmax(teacher), atol=1e-6)


@pytest.mark.parametrize("options", [{"alphas": ()}, {"clamp": 0.0}, {"label_smoothing": 1.0}, {"delay": -1}])
def test_mistakes_are_named(options):
  with pytest.raises(UserError, match=next(iter(options))):
    objective("alpha_divergence", **options)
