"""Costs against closed forms worked out by hand."""

from __future__ import annotations

import doctest

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import cost


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


class Mlp(nn.Module):
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    for width in self.widths:
      x = nn.gelu(nn.Dense(width)(x))
    return {"logits": nn.Dense(3)(x), "features": x}


class Layer(nn.Module):

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(x.shape[-1], use_bias=False)(x)), None


class Stack(nn.Module):
  layers: int
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
    scan = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
    return {"logits": scan()(x, None)[0]}


class Normed(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x))


def test_params_exclude_statistics_and_equal_the_initialised_model():
  x = jnp.ones((2, 4))
  variables = Normed().init(jax.random.key(0), x)
  assert cost.count_params(Normed(), spec(2, 4)) == 4 * 5 + 5 + 2 * 5
  assert cost.count_tree(variables) == 4 * 5 + 5 + 4 * 5


def test_params_of_a_model_too_large_to_allocate():
  huge = nn.Dense(10**7, use_bias=False)
  assert cost.count_params(huge, spec(1, 10**6)) == 10**13
  assert cost.weight_bytes(huge.clone(param_dtype=jnp.bfloat16), spec(1, 10**6)) == 2 * 10**13
  assert cost.flops(huge, spec(1, 10**6)) == 2 * 10**13


def test_scanned_params_count_every_layer():
  assert cost.count_params(Stack(7), spec(2, 4)) == 7 * 16


def test_mlp_forward():
  products = 8 * 16 + 16 * 32 + 32 * 3
  assert cost.flops(Mlp((16, 32)), spec(5, 8)) == 2 * 5 * products


def test_backward_is_twice_the_forward_but_once_for_the_first_layer():
  first, rest = 2 * 5 * 8 * 16, 2 * 5 * (16 * 32 + 32 * 3)
  assert cost.flops(Mlp((16, 32)), spec(5, 8), train=True) == 2 * first + 3 * rest


@pytest.mark.parametrize(("remat", "passes"), [(False, 3), (True, 4)])
def test_training_counts_the_recomputation_of_remat(remat, passes):
  assert cost.flops(Stack(4, remat), spec(5, 8), train=True) == 4 * passes * (2 * 5 * 8 * 8)


def test_training_without_logits_differentiates_every_output():
  assert cost.flops(nn.Dense(3), spec(5, 8), train=True) == 2 * (2 * 5 * 8 * 3)


def test_training_ignores_a_head_that_the_logits_do_not_read():
  class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
      return {"logits": nn.Dense(3)(x), "projected": nn.Dense(64)(x)}
  assert cost.flops(TwoHeads(), spec(5, 8)) == 2 * 5 * 8 * (3 + 64)
  assert cost.flops(TwoHeads(), spec(5, 8), train=True) == 2 * (2 * 5 * 8 * 3)


def test_a_scan_counts_every_layer():
  assert cost.flops(Stack(7), spec(5, 8)) == 7 * 2 * 5 * 8 * 8


def test_nested_scans_multiply():
  def inner(carry, _):
    return carry @ carry, None
  def outer(carry, _):
    return lax.scan(inner, carry, length=3)[0], None
  assert cost.count_flops(lambda x: lax.scan(outer, x, length=5)[0], spec(4, 4)) == 15 * 2 * 4**3


def test_attention():
  batch, heads, length, dim = 2, 3, 7, 5
  qkv = spec(batch, length, heads, dim)
  def attention(query, key, value):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)
  expected = 2 * (2 * batch * heads * length**2 * dim)
  assert cost.count_flops(attention, qkv, qkv, qkv) == expected
  assert cost.count_flops(jax.nn.dot_product_attention, qkv, qkv, qkv) == expected


@pytest.mark.parametrize(
    ("padding", "strides", "groups", "dilation", "side"),
    [("SAME", 1, 1, 1, 8), ("VALID", 1, 1, 1, 6), ("SAME", 2, 1, 1, 4), ("SAME", 1, 4, 1, 8),
     ("SAME", 2, 2, 1, 4), ("VALID", 1, 1, 2, 4)])
def test_convolution(padding, strides, groups, dilation, side):
  conv = nn.Conv(12, (3, 3), strides, padding, kernel_dilation=dilation, feature_group_count=groups)
  forward = 2 * 5 * side**2 * 12 * 9 * (4 // groups)
  assert cost.flops(conv, spec(5, 8, 8, 4)) == forward
  assert cost.flops(conv, spec(5, 8, 8, 4), train=True) == 2 * forward
  kernel = spec(3, 3, 4 // groups, 12)
  def both(x, kernel):
    return jax.vjp(lambda *a: conv.apply({"params": {"kernel": a[1], "bias": jnp.zeros(12)}}, a[0]),
                   x, kernel)[1](jnp.ones((5, side, side, 12)))
  assert cost.count_flops(both, spec(5, 8, 8, 4), kernel) == 2 * forward


def test_patches_and_transposed_convolution():
  patches = nn.Conv(6, (4, 4), 4, "VALID")
  assert cost.flops(patches, spec(2, 8, 8, 3)) == 2 * 2 * 4 * 6 * 16 * 3
  assert cost.flops(patches, spec(2, 8, 8, 3), train=True) == 2 * (2 * 2 * 4 * 6 * 16 * 3)
  upsample = nn.ConvTranspose(6, (2, 2), (2, 2))
  assert cost.flops(upsample, spec(2, 8, 8, 3)) == 2 * 2 * 64 * 6 * 4 * 3


def with_jvp(fn):
  wrapped = jax.custom_jvp(fn)
  wrapped.defjvp(lambda primals, tangents: (wrapped(*primals), tangents[0]))
  return wrapped


def with_vjp(fn):
  wrapped = jax.custom_vjp(fn)
  wrapped.defvjp(lambda x: (wrapped(x), x), lambda x, g: (g @ x @ x,))
  return wrapped


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_jvp, with_vjp])
def test_wrapped_calls_count_once(wrap):
  assert cost.count_flops(wrap(lambda x: jnp.sin(x @ x)), spec(4, 4)) == 2 * 4**3


def test_a_hand_written_backward_pass_counts_as_written():
  fn = with_vjp(lambda x: jnp.sin(x @ x))
  count = cost.count_flops(jax.value_and_grad(lambda x: jnp.sum(fn(x))), spec(4, 4))
  assert count == 3 * (2 * 4**3)


def test_the_most_expensive_branch_counts():
  branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
  switch = lambda i, x: lax.switch(i, branches, x)
  assert cost.count_flops(switch, spec(dtype=jnp.int32), spec(4, 4)) == 2 * (2 * 4**3)


def test_unused_products_are_not_counted():
  @jax.jit
  def two(x):
    return x @ x, x @ x @ x
  assert cost.count_flops(lambda x: two(x)[0], spec(4, 4)) == 2 * 4**3


def test_a_loop_of_unknown_length_is_an_error_only_around_a_product():
  def loop(body):
    return lambda x: lax.while_loop(lambda x: jnp.sum(x) < 1, body, x)
  assert cost.count_flops(loop(lambda x: x + 1), spec(4, 4)) == 0
  with pytest.raises(ValueError, match="while.*unknown"):
    cost.count_flops(loop(lambda x: x @ x), spec(4, 4))
  constant = lambda x: lax.fori_loop(0, 6, lambda _, x: x @ x, x)
  assert cost.count_flops(constant, spec(4, 4)) == 6 * 2 * 4**3


def test_a_shard_map_counts_all_devices():
  mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.PartitionSpec("data")
  whole = jax.sharding.PartitionSpec()
  product = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  assert cost.count_flops(product, spec(8, 3), spec(3, 5)) == 2 * 8 * 3 * 5


def test_latency_orders_quartiles_and_excludes_compilation():
  traces = []
  def fn(x):
    traces.append(x)
    return x @ x
  result = cost.latency(fn, np.ones((64, 64), np.float32), repeats=9)
  assert len(traces) == 1
  assert 0 < result.lower <= result.median <= result.upper


def test_latency_waits_for_the_result():
  x = np.ones((512, 512), np.float32)
  once = cost.latency(lambda x: x @ x, x, repeats=5).median
  often = cost.latency(lambda x: lax.fori_loop(0, 30, lambda _, y: y @ x, x), x, repeats=5).median
  assert often > 5 * once


def test_latency_refuses_what_it_cannot_run():
  with pytest.raises(ValueError, match="abstract"):
    cost.latency(jnp.sin, spec(3))
  with pytest.raises(ValueError, match="repeats=0"):
    cost.latency(jnp.sin, jnp.ones(3), repeats=0)


def test_examples():
  assert doctest.testmod(cost).failed == 0
