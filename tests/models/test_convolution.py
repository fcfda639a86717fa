"""Convolutions against sums by hand, elastic kernels, batch normalisation with statistics of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Subnet, count_params, flops, take
from nestnet.axes import variable_axes
from nestnet.models import convolution as c
from nestnet.models import convolve

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 5, 6, 3)).astype(np.float32)


def by_hand(x, kernel, stride):
  """Sums over the positions that a kernel covers, with `k // 2` zeros around."""
  k = kernel.shape[0]
  full = kernel if kernel.ndim == 4 else np.einsum("ijc,cd->ijcd", kernel, np.eye(kernel.shape[-1]))
  x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  rows, columns = range(0, x.shape[1] - k + 1, stride), range(0, x.shape[2] - k + 1, stride)
  return np.stack([np.stack([np.einsum("bijc,ijcd->bd", x[:, r:r + k, s:s + k], full) for s in columns], 1)
                   for r in rows], 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3, 3, 4), (5, 5, 3), (3, 3, 3), (1, 1, 3)])
def test_a_convolution_is_the_sum_by_hand(shape, stride):
  kernel = RNG.normal(size=shape).astype(np.float32)
  expected = by_hand(IMAGES, kernel, stride)
  np.testing.assert_allclose(c.convolution(IMAGES, kernel, stride), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(5, 6), (9, 12)], ids=["small", "large"])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_of_a_depthwise_convolution_have_one_derivative(stride, sides):
  """The one that other devices take is not lowered here, so it is called by its name."""
  kernel = RNG.normal(size=(5, 3, 3)).astype(np.float32)
  images = RNG.normal(size=(2, *sides, 3)).astype(np.float32)
  loss = lambda f: jax.jit(jax.value_and_grad(lambda x, k: jnp.sin(f(x, k, stride)).sum(), (0, 1)))
  ours, other = (loss(f)(images, kernel) for f in (c.convolution, convolve._grouped))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, other)


@pytest.mark.parametrize("sides", [(5, 6), (1, 1)], ids=["image", "one position"])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_of_the_derivative_on_small_images_are_one(stride, sides):
  kernel = RNG.normal(size=(5, 3, 3, 4)).astype(np.float32)
  images = RNG.normal(size=(2, *sides, 3)).astype(np.float32)

  @jax.jit
  def derivatives(x, k):
    y, pull = jax.vjp(lambda x, k: c.convolution(x, k, stride), x, k)
    plain = jax.vjp(lambda x, k: convolve._convolve(x, k, stride), x, k)[1]
    return pull(jnp.cos(y)), convolve._transposed(x, k, jnp.cos(y), stride), plain(jnp.cos(y))

  ours, *others = derivatives(images, kernel)
  for other in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, other)


def test_derivatives_on_small_images_are_as_exact_in_bfloat16():
  """What the taps of a position add up to is rounded once, as a convolution does."""
  images, kernel = (jnp.asarray(RNG.normal(size=shape), jnp.bfloat16) for shape in ((4, 8, 8, 32), (3, 3, 32, 32)))

  @jax.jit
  def derivatives(x, k):
    g = jnp.cos(c.convolution(x, k))
    exact = convolve._transposed(*(v.astype(jnp.float32) for v in (x, k, g)), 1)
    return convolve._by_patches(x, k, g, 1), convolve._transposed(x, k, g, 1), exact

  ours, xla, exact = derivatives(images, kernel)
  error = lambda found: [float(jnp.sqrt(jnp.square(a.astype(jnp.float32) - e).mean())) for a, e in zip(found, exact)]
  assert all(own < 1.2 * other for own, other in zip(error(ours), error(xla)))


def test_a_kernel_with_an_even_side_is_refused():
  with pytest.raises(ValueError, match="a kernel of 2 x 3; allowed are odd sides"):
    c.convolution(IMAGES, np.ones((2, 3, 3), np.float32))


def test_training_on_small_images_costs_what_it_costs_on_large_ones():
  """As many FLOPs at a position, though a device may take products."""
  block = c.Convolution("channels", "hidden", 7, 3)
  small, large = (jax.ShapeDtypeStruct((1, n, n, 3), np.float32) for n in (8, 16))
  assert 4 * flops(block, small, train=True) == flops(block, large, train=True)


def test_flops_are_those_of_the_convolution():
  block = c.Convolution(None, "hidden", 3, 5, 2)
  assert flops(block, IMAGES) == 2 * 2 * 3 * 3 * 3 * 25
  dense = c.Convolution("channels", "hidden", 7, 1, 2)
  assert flops(dense, IMAGES) == 2 * 2 * 3 * 3 * 3 * 7 and count_params(dense, IMAGES) == 21


def test_a_smaller_kernel_is_the_centre():
  block = c.Convolution(None, "hidden", 3, 7, choice="kernel")
  names = variable_axes(block, IMAGES)["params"]
  kernel = RNG.normal(size=(7, 7, 3)).astype(np.float32)
  for tree in ({"kernel": kernel}, {"kernel": jnp.asarray(kernel)}):
    small = take(tree, names, Subnet(kernel=3, hidden=2))["kernel"]
    np.testing.assert_array_equal(small, kernel[2:5, 2:5, :2])
  assert take({"kernel": kernel}, names, Subnet(hidden=2))["kernel"].shape == (7, 7, 2)
  with pytest.raises(ValueError, match="kernel=4 has no centre in one of 7; allowed are odd sizes up to 7"):
    take({"kernel": kernel}, names, Subnet(kernel=4))


def test_learned_transforms_are_chained():
  block = c.Convolution(None, "hidden", 3, 7, choice="kernel", transforms=True)
  names = variable_axes(block, IMAGES)["params"]
  shapes = {"kernel": (7, 7, 3), "to_5": (25, 25), "to_3": (9, 9)}
  tree = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  five = np.einsum("ij,jc->ic", tree["to_5"], tree["kernel"][1:6, 1:6].reshape(25, 3)).reshape(5, 5, 3)
  three = np.einsum("ij,jc->ic", tree["to_3"], five[1:4, 1:4].reshape(9, 3)).reshape(3, 3, 3)
  for size, expected in ((7, tree["kernel"]), (5, five), (3, three)):
    for source in (tree, jax.tree.map(jnp.asarray, tree)):
      small = take(source, names, Subnet(kernel=size))
      assert set(small) == {"kernel"}
      np.testing.assert_allclose(small["kernel"], expected, rtol=1e-4, atol=1e-5)
  abstract = take(jax.eval_shape(lambda: tree), names, Subnet(kernel=3, hidden=2))
  assert abstract["kernel"].shape == (3, 3, 2)
  assert set(take(tree, names, Subnet(hidden=2))) == set(tree)


def test_transforms_start_as_centres():
  block = c.Convolution(None, "hidden", 3, 7, choice="kernel", transforms=True)
  made = meta.unbox(block.init(jax.random.key(0), IMAGES)["params"])
  small = take(made, variable_axes(block, IMAGES)["params"], Subnet(kernel=3))["kernel"]
  np.testing.assert_allclose(small, made["kernel"][2:5, 2:5], rtol=1e-6)


class TestBatchNorm:
  """Statistics of the batch, or calibrated ones."""

  NORM = c.BatchNorm("hidden", 1e-3)
  PARAMS = {"scale": np.array([1.0, -2, 0.5], np.float32), "bias": np.array([0.3, 1, 2], np.float32)}

  def expected(self, mean, var):
    return (IMAGES - mean) / np.sqrt(var + 1e-3) * self.PARAMS["scale"] + self.PARAMS["bias"]

  def check(self, got, mean, var):
    with jax.numpy_rank_promotion("allow"):
      np.testing.assert_allclose(got, self.expected(mean, var), rtol=1e-4, atol=1e-4)

  def test_without_statistics_those_of_the_batch(self):
    for train in (False, True):
      got = self.NORM.apply({"params": self.PARAMS}, IMAGES, train)
      self.check(got, IMAGES.mean((0, 1, 2)), IMAGES.var((0, 1, 2)))

  def test_calibrated_statistics_unless_it_trains(self):
    stats = {"mean": np.array([1.0, 2, 3], np.float32), "var": np.array([0.5, 2, 1], np.float32)}
    variables = {"params": self.PARAMS, "batch_stats": stats}
    self.check(self.NORM.apply(variables, IMAGES, False), stats["mean"], stats["var"])
    self.check(self.NORM.apply(variables, IMAGES, True), IMAGES.mean((0, 1, 2)), IMAGES.var((0, 1, 2)))

  def test_moments_are_returned_where_they_are_asked_for(self):
    got, moments = self.NORM.apply({"params": self.PARAMS}, IMAGES, False, mutable=["batch_stats"])
    np.testing.assert_allclose(moments["batch_stats"]["mean"], IMAGES.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments["batch_stats"]["var"], IMAGES.var((0, 1, 2)), rtol=1e-4)
    assert set(self.NORM.init(jax.random.key(0), IMAGES, True)) == {"params"}


def test_activations():
  x = np.array([-4.0, -1, 0, 2, 7], np.float32)
  np.testing.assert_allclose(c.activation("h_swish")(x), x * np.clip(x + 3, 0, 6) / 6, rtol=1e-6)
  np.testing.assert_allclose(c.activation("relu6")(x), np.clip(x, 0, 6))
  with pytest.raises(ValueError, match="unknown activation 'h_swich'; did you mean 'h_swish'"):
    c.activation("h_swich")


def test_squeeze_excite_weighs_channels_by_their_means():
  block = c.SqueezeExcite("hidden", "squeeze", 2)
  params = {"reduce": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
            "expand": {"kernel": RNG.normal(size=(2, 3)), "bias": RNG.normal(size=3)}}
  params = jax.tree.map(lambda p: p.astype(np.float32), params)
  y = np.maximum(IMAGES.mean((1, 2)) @ params["reduce"]["kernel"] + params["reduce"]["bias"][None], 0)
  y = np.clip(y @ params["expand"]["kernel"] + params["expand"]["bias"][None] + 3, 0, 6) / 6
  np.testing.assert_allclose(block.apply({"params": params}, IMAGES), IMAGES * y[:, None, None], rtol=1e-4)
