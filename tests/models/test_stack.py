"""The stack: scanned and unrolled are one function, and stages have depths of their own."""

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


class Block(nn.Module):
  """A residual MLP with a constant of its layer, and noise when it trains."""

  mlp: int
  names: str

  @nn.compact
  def __call__(self, x, constants, noise=0.0):
    init = nn.initializers.normal(0.5)
    up = self.param("up", axes(init, f"embed -> {self.names}"), (x.shape[-1], self.mlp))
    down = self.param("down", axes(init, f"{self.names} -> embed"), (self.mlp, x.shape[-1]))
    rate = constant(self, "rate", constants) if constants else 1.0
    if noise:
      x += noise * jax.random.uniform(self.make_rng("dropout"), x.shape)
    return x + rate * jnp.tanh(x @ up) @ down


class Net(nn.Module):
  """Two stages and nothing beside them."""

  layers_1: int
  layers_2: int
  expand_1: int | tuple[int, ...]
  expand_2: int | tuple[int, ...]
  remat: bool = False
  unroll: int = 1

  @nn.compact
  def __call__(self, x, noise=0.0):
    outputs = []
    for k, layers, sizes in ((1, self.layers_1, self.expand_1), (2, self.layers_2, self.expand_2)):
      block = lambda name, mlp, k=k: Block(mlp, f"expand_{k}", name=name)
      x, taps = stack(block, x, layers=layers, sizes={"mlp": sizes}, name=f"stage_{k}",
                      depth=f"layers_{k}", constants={"rate": np.arange(1.0, layers + 1)},
                      remat=self.remat, unroll=self.unroll, taps=True, noise=noise)
      outputs.append(taps)
    return {"logits": x, "taps": outputs}


NET = Net(2, 3, 4, 4)
X = jnp.linspace(-1, 1, 6).reshape(2, 3)
SUPERNET = Supernet(NET, Space(
  layers_1=(1, 2), layers_2=(1, 2, 3), expand_1=(2, 4), expand_2=(2, 4),
  per_layer=("expand_1", "expand_2")), (jax.ShapeDtypeStruct(X.shape, X.dtype),))


@pytest.fixture(scope="module")
def variables():
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
                        SUPERNET.shapes["params"])
  constants = jax.jit(lambda key: SUPERNET.init(key)["constants"])(jax.random.key(0))
  return {"params": params, "constants": constants}


def by_hand(variables, subnet):
  """The network as a loop over the layers that a subnet keeps, in numpy."""
  x, taps = np.asarray(X), []
  for k in (1, 2):
    weights = variables["params"][f"stage_{k}"]
    rates = variables["constants"][f"stage_{k}"]["rate"]
    ids = subnet.chosen[f"layers_{k}"]
    ids = range(ids) if isinstance(ids, int) else ids
    sizes = np.broadcast_to(subnet.chosen[f"expand_{k}"], len(ids))
    stage = []
    for i, mlp in zip(ids, sizes):
      up, down = weights["up"][i][:, :mlp], weights["down"][i][:mlp]
      x = x + rates[i] * np.tanh(x @ up) @ down
      stage.append(x)
    taps.append(np.stack(stage))
  return x, taps


@pytest.mark.parametrize("text, options", [
  ("", {}), ("layers_2=+1,expand_1=2", {}), ("layers_1=1,layers_2=0+2,expand_2=4:2", {}),
  ("expand_1=2:4", {"remat": True}), ("", {"unroll": 2})], ids=str)
def test_a_stack_is_a_loop_over_its_layers(variables, text, options):
  subnet = SUPERNET.space.subnet(text)
  module = SUPERNET.module(subnet).clone(**options)
  cut = SUPERNET.cut(variables, subnet)
  outputs = jax.jit(module.apply)(cut, X)
  logits, taps = by_hand(jax.tree.map(np.asarray, variables), subnet)
  np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-4, atol=1e-5)
  for got, expected in zip(outputs["taps"], taps):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["layers_1=1", "expand_2=4:2:2", "layers_2=0+2,expand_1=2:4"])
def test_parameters_and_constants_of_a_slice_are_those_of_the_module(text):
  SUPERNET.check(SUPERNET.space.subnet(text))


def test_constants_travel_with_their_layer(variables):
  rates = lambda text: SUPERNET.cut(variables, Subnet.parse(text))["constants"]
  assert rates("layers_2=0+2")["stage_2"]["rate"].tolist() == [1, 3]
  unrolled = rates("layers_2=0+2,expand_2=2:4")["stage_2"]
  assert {k: float(v["rate"]) for k, v in unrolled.items()} == {"layers_2_0": 1, "layers_2_1": 3}


@pytest.mark.parametrize("text", ["", "expand_1=2:4,expand_2=4:2:2"])
def test_without_stored_constants_the_initial_ones_hold(variables, text):
  subnet = SUPERNET.space.subnet(text)
  cut, apply = SUPERNET.cut(variables, subnet), jax.jit(SUPERNET.module(subnet).apply)
  np.testing.assert_array_equal(apply({"params": cut["params"]}, X)["logits"],
                                apply(cut, X)["logits"])


class Single(nn.Module):
  """One stage, alone in its tree."""

  layers: int
  mlp: int | tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    block = lambda name, mlp: Block(mlp, "mlp", name=name)
    return stack(block, x, layers=self.layers, sizes={"mlp": self.mlp},
                 constants={"rate": range(self.layers)})[0]


def test_a_stack_alone_in_its_tree_is_found():
  net = Supernet(Single(3, 4), Space(layers=(1, 2, 3), mlp=(2, 4)), SUPERNET.inputs)
  net.check(Subnet(layers=(0, 2), mlp=(2, 4)))


def test_remat_has_the_gradient_and_the_noise_of_the_plain_stack(variables):
  def gradient(remat):
    module = NET.clone(remat=remat)
    loss = lambda v: jnp.sum(module.apply(v, X, noise=0.5, rngs={"dropout": jax.random.key(1)})[
      "logits"] ** 2)
    return jax.jit(jax.value_and_grad(loss))(variables)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
               gradient(False), gradient(True))


def test_layers_draw_noise_of_their_own(variables):
  still = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
  taps = jax.jit(lambda v: NET.apply(v, X, noise=1.0, rngs={"dropout": jax.random.key(1)}))(still)
  added = np.diff(taps["taps"][1], axis=0)
  assert not np.allclose(added[0], added[1])


def test_a_list_of_another_length_is_refused():
  with pytest.raises(ValueError, match=r"mlp=\(2, 4, 4\) lists 3 sizes for layers_1=2"):
    jax.eval_shape(NET.clone(expand_1=(2, 4, 4)).init, jax.random.key(0), X)
