"""Names of axes: their text, their roles, and that no leaf goes without."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet.axes import Axes, axes, axis_names, is_axes, variable_axes
from nestnet.models.stack import constant, stack

ones, zeros = nn.initializers.ones, nn.initializers.zeros


class Dense(nn.Module):
  """A bare kernel with names of the test's choosing."""

  names: str
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    return x + self.param("kernel", axes(ones, self.names), self.shape).sum()


def dense(names):
  return nn.Dense(8, kernel_init=axes(ones, names), bias_init=axes(zeros, "-> mlp"))


@pytest.mark.parametrize("text, names, contracted, stacked", [
  ("embed -> mlp", ("embed", "mlp"), {"embed"}, set()),
  ("-> mlp", ("mlp",), set(), set()),
  ("mlp <- embed", ("mlp", "embed"), {"embed"}, set()),
  ("layers: embed -> 3 heads head_dim", ("layers", "embed", "3", "heads", "head_dim"), {"embed"},
   {"layers"}),
  ("layers: mlp <- embed", ("layers", "mlp", "embed"), {"embed"}, {"layers"}),
  ("layers: ->", ("layers",), set(), {"layers"}),
  ("heads head_dim -> embed", ("heads", "head_dim", "embed"), {"heads", "head_dim"}, set()),
  ("(heads head_dim=16) -> embed", ((("heads", None), ("head_dim", 16)), "embed"),
   {"heads", "head_dim"}, set()),
  ("(3 heads head_dim=4) <- embed", ((("3", 3), ("heads", None), ("head_dim", 4)), "embed"),
   {"embed"}, set()),
  ("->", (), set(), set()),
])
def test_arrow_text_parses_and_prints_back(text, names, contracted, stacked):
  parsed = Axes.parse(text)
  assert (parsed.names, parsed.contracted, parsed.stacked) == (names, contracted, stacked)
  assert str(parsed) == text
  assert Axes.parse(str(parsed)) == parsed


def test_roles():
  parsed = Axes.parse("layers: embed -> 3 heads")
  assert [parsed.role(n) for n in parsed.names] == ["stack", "in", "out", "out"]
  assert str(parsed.without("layers")) == "embed -> 3 heads"


@pytest.mark.parametrize("text", ["a -> b -> c", "a -> b <- c", "x: y: a -> b", "(a b) -> c",
                                  "(a b=wide) -> c"])
def test_bad_text_is_refused(text):
  with pytest.raises(ValueError, match="expected 'stacked: in -> out'|name=size"):
    Axes.parse(text)


def test_leaves_of_an_axes_tree_are_told_from_containers():
  assert all(map(is_axes, ["-> mlp", Axes(()), (), ("embed", "mlp"),
                           ((("heads", None), ("head_dim", 4)), "embed")]))
  adam = optax.adam(0.1).init({"a": jnp.ones(2)})
  assert not any(map(is_axes, [{}, ["embed"], adam, adam[0], (Axes(()), Axes(()))]))


def test_names_come_from_the_annotations_of_third_party_modules():
  tree = axis_names(dense("embed -> mlp"), jax.ShapeDtypeStruct((1, 4), jnp.float32))
  assert jax.tree.map(str, tree, is_leaf=is_axes) == {"kernel": "embed -> mlp", "bias": "-> mlp"}
  conv = nn.Conv(4, (3, 3), use_bias=False, kernel_init=axes(ones, "3 3 channels -> embed"))
  tree = axis_names(conv, jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))
  assert str(tree["kernel"]) == "3 3 channels -> embed"


def test_annotated_modules_compute_what_bare_ones_do():
  x = jax.random.normal(jax.random.key(1), (2, 4))
  named, bare = dense("embed -> mlp"), nn.Dense(8, kernel_init=ones)
  given = nn.unbox(named.init(jax.random.key(0), x))
  np.testing.assert_array_equal(named.apply(given, x), bare.apply(given, x))


def test_a_rule_travels_with_its_names():
  rule = lambda leaf, subnet: leaf
  module = nn.Dense(8, use_bias=False, kernel_init=axes(ones, "embed -> mlp", rule))
  assert axis_names(module, jnp.ones((1, 4)))["kernel"].rule is rule


class Stacked(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = lambda name: Scaled(name=name)
    return stack(block, x, layers=3, sizes={}, remat=self.remat, constants={"rate": (0, 1, 2)})[0]


class Scaled(nn.Module):

  @nn.compact
  def __call__(self, x, constants):
    rate = constant(self, "rate", constants)
    return nn.Dense(4, kernel_init=axes(ones, "embed <- width"), bias_init=axes(zeros, "-> embed"))(
      x * rate)


@pytest.mark.parametrize("remat", [False, True])
def test_names_and_roles_survive_scan_and_remat(remat):
  tree = variable_axes(Stacked(remat), jnp.ones((1, 4)))
  block = tree["params"]["blocks"]["Dense_0"]
  assert str(block["kernel"]) == "layers: embed <- width"
  assert str(block["bias"]) == "layers: -> embed"
  assert block["kernel"].role("layers") == "stack" and block["kernel"].role("width") == "in"
  assert str(tree["constants"]["blocks"]["rate"]) == "layers: ->"


class Normed(nn.Module):
  annotated: bool = True
  bias: bool = True

  @nn.compact
  def __call__(self, x):
    scale = axes(ones, "-> mlp") if self.annotated else ones
    bias = axes(zeros, "-> mlp") if self.bias else zeros
    return nn.BatchNorm(use_running_average=True, scale_init=scale, bias_init=bias, name="norm")(x)


def test_statistics_take_the_names_of_their_scale():
  tree = variable_axes(Normed(), jnp.ones((2, 8)))
  assert {k: str(v) for k, v in tree["batch_stats"]["norm"].items()} == {
    "mean": "-> mlp", "var": "-> mlp"}
  with pytest.raises(ValueError) as error:
    variable_axes(Normed(annotated=False), jnp.ones((2, 8)))
  for leaf in ("params/norm/scale", "batch_stats/norm/mean", "batch_stats/norm/var"):
    assert leaf in str(error.value)
  assert "norm/bias" not in str(error.value)
  with pytest.raises(ValueError, match=r"params/norm/bias \[8\]: has no axis names"):
    variable_axes(Normed(bias=False), jnp.ones((2, 8)))


class Faulty(nn.Module):

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, bias_init=axes(zeros, "-> mlp"), name="unnamed")(x)
    x = Dense("embed -> embed", (3, 3), name="repeated")(x)
    x = Dense("embed -> 4 mlp", (3, 5, 3), name="fixed")(x)
    x = Dense("embed -> mlp", (3, 2, 3), name="short")(x)
    mesh_names = nn.with_partitioning(ones, (None, "data"))
    return nn.Dense(3, use_bias=False, kernel_init=mesh_names, name="mesh")(x)


def test_every_leaf_without_proper_names_is_listed():
  with pytest.raises(ValueError) as error:
    axis_names(Faulty(), jnp.ones((1, 3)))
  lines = str(error.value).splitlines()[1:]
  assert [line.split()[0] for line in lines] == [
    f"params/{n}/kernel" for n in ("fixed", "mesh", "repeated", "short", "unnamed")]
  for line, problem in zip(lines, ("called 4 has size 5", "must be a word", "repeats embed",
                                   "2 names for 3 dimensions", "has no axis names")):
    assert problem in line
