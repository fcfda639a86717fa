"""What a collapse of representations shows in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet.objectives import health

RNG = np.random.default_rng(0)
feature_std, effective_rank, entropies = map(
  jax.jit, (health.feature_std, health.effective_rank, health.entropies))


def test_effective_rank_is_the_number_of_equal_directions():
  orthogonal = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
  assert float(effective_rank(orthogonal[:, :5])) == pytest.approx(5, rel=1e-4)
  # The length of all together is of no effect.
  assert float(effective_rank(1e-3 * orthogonal)) == pytest.approx(8, rel=1e-4)
  one = np.outer(RNG.normal(size=16), RNG.normal(size=8))
  assert float(effective_rank(one)) == pytest.approx(1, abs=1e-3)
  values = np.array([3.0, 1.0])
  shares = values / 4
  assert float(effective_rank(orthogonal[:, :2] * values)) == pytest.approx(
    np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
  assert float(effective_rank(np.zeros((4, 3)))) == 1


def test_feature_std_is_that_of_directions():
  features = RNG.normal(size=(4000, 16))
  assert float(feature_std(features)) == pytest.approx(1 / 4, rel=0.02)
  # Lengths are of no effect; one direction is a collapse.
  assert float(feature_std(features * RNG.uniform(1, 9, (4000, 1)))) == pytest.approx(1 / 4, rel=0.02)
  assert float(feature_std(np.outer(RNG.uniform(1, 9, 8), RNG.normal(size=4)))) < 1e-6
  assert float(feature_std(np.zeros((4, 3)))) == 0


def test_entropies_tell_the_two_collapses_apart():
  size = np.log(4)
  for probabilities, expected in (
      (np.full((8, 4), 0.25), (size, size)), (np.eye(4)[[2] * 8], (0, 0)),
      (np.tile(np.eye(4), (2, 1)), (0, size))):
    np.testing.assert_allclose(entropies(probabilities), expected, atol=1e-6)


def test_a_loss_may_report_them():
  """In training: traced, in any float type, and without effect on the gradient."""
  def loss(features, measured):
    found = (feature_std(features), effective_rank(features),
             *entropies(jax.nn.softmax(features)))
    return jnp.sum(features ** 2) + measured * sum(found), found

  # Equal singular values have no derivatives of vectors.
  features = jnp.eye(4, dtype=jnp.bfloat16)
  (plain, _), with_them = (jax.jit(jax.value_and_grad(loss, has_aux=True))(features, m)[::-1] for m in (0.0, 1.0))
  np.testing.assert_array_equal(plain, with_them[0])
  assert all(x.dtype == jnp.float32 and np.isfinite(x) for x in with_them[1][1])
