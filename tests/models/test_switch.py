"""Layers whose sizes are data: the same function as the layers themselves, whatever a block holds."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet
from nestnet.axes import axes
from nestnet.execution import Supernet
from nestnet.models.stack import constant, stack
from nestnet.one_program import OneProgram
from nestnet.slicing import scatter


class Widen(nn.Module):
  """A part with all that a part may have: noise, statistics, a constant, inputs beside `x`."""

  mlp: int

  @nn.compact
  def __call__(self, x, constants, bias=0.0, keep=None, noise=None):
    init = nn.initializers.normal(0.5)
    up = self.param("up", axes(init, "embed -> mlp"), (x.shape[-1], self.mlp))
    down = self.param("down", axes(init, "mlp -> embed"), (self.mlp, x.shape[-1]))
    hidden = jnp.tanh(x @ up + bias)
    mean = self.variable("statistics", "mean", axes(lambda: jnp.zeros(self.mlp), "-> mlp"))
    calls = self.variable("statistics", "calls", axes(lambda: jnp.zeros((), jnp.int32), ""))
    if self.is_mutable_collection("statistics"):
      mean.value = hidden.mean(0)
      calls.value += 1
    if not self.is_initializing():
      self.sow("seen", "largest", jnp.abs(hidden).max(0))
    if keep is not None:
      hidden = jnp.where(keep[:, None] > 0, hidden, 0.0)
    y = x + constant(self, "rate", constants) * hidden @ down
    return y + noise * jax.random.normal(self.make_rng("dropout"), x.shape) if noise is not None else y


class Scale(nn.Module):
  """A part with a size of its own along another axis."""

  heads: int

  @nn.compact
  def __call__(self, x, constants, **unused):
    weight = self.param("weight", axes(nn.initializers.normal(0.5), "embed -> heads"),
                        (x.shape[-1], self.heads))
    return x + jnp.sin(x @ weight).sum(-1, keepdims=True)


class Net(nn.Module):
  layers: int
  embed: int
  mlp: int | tuple[int, ...]
  heads: int | tuple[int, ...]

  @nn.compact
  def __call__(self, x, *, taps=False, **kwargs):
    x = x @ self.param("stem", axes(nn.initializers.normal(0.5), "pixels -> embed"), (x.shape[-1], self.embed))
    x, outputs = stack({"widen": lambda name, mlp: Widen(mlp, name=name),
                        "scale": lambda name, heads: Scale(heads, name=name)}, x,
                       layers=self.layers, sizes={"widen": {"mlp": self.mlp}, "scale": {"heads": self.heads}},
                       constants={"rate": np.arange(1.0, self.layers + 1)}, taps=taps, **kwargs)
    return {"logits": x.sum(-1), "taps": outputs}


X = jnp.linspace(-1, 1, 10).reshape(5, 2)
KEEP = jnp.array([1, 0, 1, 1, 0])
SPACE = Space(layers=(1, 2, 3), embed=(3, 4), mlp=(2, 4, 6), heads=(2, 4), per_layer=("mlp", "heads"),
              groups={"mlp": 2})
NET = Supernet(Net(3, 4, 6, 4), SPACE, (jax.ShapeDtypeStruct(X.shape, X.dtype),))
ONE = OneProgram(NET)
MEMBERS = ("layers=1,embed=3,mlp=2,heads=2", "layers=+2,embed=4,mlp=4,heads=2",
           "layers=0+2,embed=3,mlp=6:2,heads=2:4", "layers=3,embed=4,mlp=6,heads=4",
           "layers=3,embed=3,mlp=2:4:6,heads=4")


@pytest.fixture(scope="module")
def variables():
  rng = np.random.default_rng(0)
  draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
  kept = {k: v for k, v in NET.shapes.items() if k in ("params", "constants", "statistics")}
  return jax.tree.map(draw, kept)


def outcome(runnable, variables, bias):
  """Loss, its derivatives and the updated collections of what runs, in the supernet's shapes."""
  def loss(params, bias):
    cut = runnable.cut({**variables, "params": params})
    cut |= {} if runnable.choice is None else {"choice": runnable.choice}
    outputs, updates = runnable.module.apply(cut, X, bias=bias, keep=KEEP, mutable=["statistics"])
    return jnp.sum(jnp.sin(outputs["logits"])), updates["statistics"]

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], bias)


@jax.jit
def as_data(vector, variables, bias):
  def run(runnable, variables, bias):
    (loss, statistics), grads = outcome(runnable, variables, bias)
    return loss, grads, scatter(statistics, NET.axes["statistics"], runnable.subnet,
                                NET.shapes["statistics"], SPACE.groups)
  return ONE.switch(run, vector, variables, bias)


@pytest.mark.parametrize("text", MEMBERS)
def test_a_member_as_data_is_the_member(variables, text):
  """Loss, gradients of weights and of an input, statistics."""
  subnet, bias = SPACE.subnet(text), jnp.float32(0.3)
  (loss, statistics), (grads, of_bias) = jax.jit(
    lambda v, b: outcome(NET.runnable(subnet), v, b))(variables, bias)
  found, (found_grads, found_bias), found_statistics = as_data(ONE.vector(subnet), variables, bias)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  np.testing.assert_allclose(found_bias, of_bias, rtol=1e-4, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found_grads, grads)
  spread = scatter(statistics, NET.axes["statistics"], subnet, NET.shapes["statistics"], SPACE.groups)
  ones = jax.tree.map(jnp.ones_like, statistics)
  used = scatter(ones, NET.axes["statistics"], subnet, NET.shapes["statistics"], SPACE.groups)
  assert any(leaf.any() for leaf in jax.tree.leaves(used))
  for new, whole, own, old in zip(*map(jax.tree.leaves, (
      found_statistics, spread, used, variables["statistics"]))):
    np.testing.assert_allclose(new, np.where(own > 0, whole, old), rtol=1e-5, atol=1e-6)


def test_one_program_serves_all_members(variables, compiled):
  for text in MEMBERS:
    as_data(ONE.vector(SPACE.subnet(text)), variables, jnp.float32(0.3))
  assert compiled.count("jit(as_data)") <= 1


def run_one(text, variables, mutable):
  module_of = lambda runnable: lambda v: runnable.module.apply(
    {**runnable.cut(v), "choice": runnable.choice}, X, mutable=mutable)
  return jax.jit(lambda vector, v: ONE.switch(lambda r, v: module_of(r)(v), vector, v))(
    ONE.vector(SPACE.subnet(text)), variables)


def test_taps_of_absent_layers_repeat_the_one_before(variables):
  net = NET.space.subnet("layers=0+2")
  own = NET.module(net).apply(NET.cut(variables, net), X, taps=True)["taps"]
  all_layers = jax.jit(lambda vector, v: ONE.switch(
    lambda r, v: jnp.pad(r.module.apply({**r.cut(v), "choice": r.choice}, X, taps=True)["taps"],
                         ((0, 0), (0, 0), (0, 4 - r.subnet["embed"]))), vector, v))(ONE.vector(net), variables)
  np.testing.assert_allclose(all_layers[np.array([0, 2])], own, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(all_layers[1], all_layers[0])


def test_what_a_part_sows_has_the_shapes_of_its_largest(variables):
  seen = run_one("layers=+1,embed=4,mlp=4", variables, mutable=["seen"])[1]["seen"]["blocks"]
  largest = seen["widen"]["largest"][0]
  assert largest.shape == (3, 6)
  largest = np.asarray(largest)
  assert not largest[[0, 2]].any() and largest[1, :4].all() and not largest[1, 4:].any()


def test_noise_is_of_the_layer_and_the_same_in_both_passes(variables):
  """With still weights, the derivative by the noise's factor is the noise that was added."""
  still = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}

  def added(vector, factor):
    def run(runnable, factor):
      def total(factor):
        y = runnable.module.apply({**runnable.cut(still), "choice": runnable.choice}, X, taps=True,
                                  noise=factor, rngs={"dropout": jax.random.key(3)})["taps"]
        return y[-1].sum(), y.sum((1, 2))
      (value, taps), slope = jax.value_and_grad(total, has_aux=True)(factor)
      return value, slope, taps
    return ONE.switch(run, vector, factor)

  value, slope, taps = jax.jit(added)(ONE.vector(SPACE.subnet("layers=2,embed=4")), jnp.float32(0.5))
  np.testing.assert_allclose(value, 0.5 * slope, rtol=1e-5)
  steps = np.diff(taps, prepend=0)
  assert abs(steps[0] - steps[1]) > 1e-3 and steps[2] == 0


def test_sizes_outside_the_space_are_refused():
  with pytest.raises(ValueError, match="mlp=5 is outside the space"):
    ONE.vector(Subnet(layers=3, embed=4, mlp=5, heads=4))
