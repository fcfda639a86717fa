"""Projections in mixed precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet.models.layers import FEW, Linear, attention, grouped_attention, project


@pytest.mark.parametrize("use_bias", [True, False])
def test_derivatives_of_weights_are_summed_in_the_weights_type(use_bias):
  """bfloat16 factors, float32 sums: a sum in bfloat16 would lose 3 of 7 digits."""
  rng = np.random.default_rng(0)
  x, ct = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((64, 8), (64, 4, 2)))
  layer = Linear("embed -> heads head_dim", (4, 2), dtype=jnp.bfloat16, use_bias=use_bias)
  params = meta.unbox(layer.init(jax.random.key(0), x))["params"]
  y, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
  grads, of_x = pull(ct)
  assert y.dtype == of_x.dtype == jnp.bfloat16
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
  flat = np.asarray(ct, np.float32).reshape(64, 8)
  np.testing.assert_allclose(grads["kernel"].reshape(8, 8), np.asarray(x, np.float32).T @ flat, rtol=1e-5, atol=1e-5)
  if use_bias:
    np.testing.assert_allclose(grads["bias"].reshape(8), flat.sum(0), rtol=1e-5, atol=1e-5)
  plain = Linear("embed -> heads head_dim", (4, 2), use_bias=use_bias)
  wide = lambda a: a.astype(jnp.float32)
  expected = jax.vjp(lambda x: plain.apply({"params": params}, x), wide(x))[1](wide(ct))[0]
  np.testing.assert_allclose(wide(of_x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_is_the_library_s(dtype, tolerance):
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 8), dtype) for i in range(3))
  found, wanted = attention(q, k, v), jax.nn.dot_product_attention(q, k, v)
  assert found.dtype == dtype
  np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, wanted)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_of_groups_is_the_library_s(dtype, tolerance):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, 130, *heads, 8)).astype(dtype) for heads in ((2, 3), (2,), (2,)))
  visible = np.tri(130, dtype=bool)[None]
  *found, wanted = jax.jit(lambda q, k, v: (
    grouped_attention(q, k, v, visible), grouped_attention(q, k, v),
    jax.nn.dot_product_attention(q.reshape(2, 130, 6, 8), k, v, is_causal=True).reshape(q.shape)))(q, k, v)
  for own in found:
    assert own.dtype == dtype
    pair = (np.asarray(x, np.float32) for x in (own, wanted))
    np.testing.assert_allclose(*pair, rtol=tolerance, atol=tolerance)


def test_a_query_that_sees_nothing_has_a_derivative():
  q, k = np.ones((1, 2, 1, 1, 4), np.float32), np.ones((1, 2, 1, 4), np.float32)
  visible = np.array([[[False, False], [True, False]]])
  loss = lambda *args: grouped_attention(*args, visible).sum()
  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k)
  assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("count", [1, 3, FEW, FEW + 1])
def test_few_rows_are_what_they_would_be_alone(count):
  """On CPU bit for bit, so that tokens checked together are those of single steps."""
  rng = np.random.default_rng(0)
  x, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((count, 48), (48, 80), (1, 80)))

  @jax.jit
  def run(x, kernel, bias):
    alone = [project(x[i:i + 1], kernel, bias) for i in range(count)]
    return jnp.concatenate(alone), project(x, kernel, bias, by_row=True)

  alone, together = run(x, kernel, bias)
  np.testing.assert_allclose(together, x @ kernel + bias, rtol=1e-5, atol=1e-5)
  if count <= FEW and jax.default_backend() == "cpu":
    np.testing.assert_array_equal(alone, together)
