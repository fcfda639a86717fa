"""`take`: identity, composition, its dual, rules, groups, and every kind of tree."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from nestnet import Subnet, slicing, take
from nestnet.axes import Axes, axes, axis_names, is_axes, variable_axes
from nestnet.slicing import scatter

AXES = {
  "patch": {"kernel": "pixels -> embed", "bias": "-> embed"},
  "blocks": {"norm": {"scale": "layers: -> embed"},
             "qkv": {"kernel": "layers: embed -> 3 heads head_dim"},
             "up": {"kernel": "layers: embed -> mlp", "bias": "layers: -> mlp"},
             "down": {"kernel": "layers: embed <- mlp"}},
  "head": {"kernel": "embed -> classes"},
}
SIZES = {"pixels": 3, "embed": 4, "layers": 4, "3": 3, "heads": 2, "head_dim": 2, "mlp": 6,
         "classes": 3}
LARGEST = Subnet(layers=4, embed=4, heads=2, mlp=6)


def tree(seed=0):
  """Numpy arrays of the shapes that the names say, all entries different."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda text: rng.normal(size=[SIZES[n] for n in Axes.parse(text).names])
                      .astype(np.float32), AXES)


PARAMS = tree()


def unrolled(names, depth):
  """The axes of the form that `take` gives for sizes of their own in each layer."""
  layer = jax.tree.map(lambda a: str(Axes.parse(a).without("layers")), names["blocks"])
  return {**names, "blocks": {f"layers_{i}": layer for i in range(depth)}}


def axes_of(subnet):
  return unrolled(AXES, subnet["layers"]) if subnet.per_layer("layers") else AXES


def unstacked(params):
  """Both forms of a stack as one: the layers apart."""
  blocks = params["blocks"]
  if "layers_0" not in blocks:
    depth = len(jax.tree.leaves(blocks)[0])
    blocks = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(depth)}
  return {**params, "blocks": blocks}


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


MEMBERS = [Subnet.parse(text) for text in (
  "layers=4,embed=4,heads=2,mlp=6", "layers=2,embed=2,heads=1,mlp=2",
  "layers=1+3,embed=4,heads=1,mlp=4",
  "layers=+3,embed=2,heads=1,mlp=2", "layers=0+1+3,embed=4,heads=2:1:2,mlp=4:6:4",
  "layers=1+3,embed=2,heads=1,mlp=2:4", "layers=2,embed=4,heads=2,mlp=4:2",
  "layers=1,embed=2,heads=1,mlp=2")]


def inside(inner, outer):
  try:
    return inner.within(outer)
  except ValueError:
    return None


# The laws.


def test_the_largest_is_the_identity_and_copies_nothing():
  cut = take(PARAMS, AXES, LARGEST)
  assert_same(cut, PARAMS)
  assert all(a is b for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(PARAMS)))


def test_leading_units_and_chosen_layers():
  cut = take(PARAMS, AXES, Subnet(layers=(1, 3), embed=2, heads=1, mlp=4))
  np.testing.assert_array_equal(cut["patch"]["kernel"], PARAMS["patch"]["kernel"][:, :2])
  np.testing.assert_array_equal(cut["blocks"]["qkv"]["kernel"],
                                PARAMS["blocks"]["qkv"]["kernel"][[1, 3], :2, :, :1])
  np.testing.assert_array_equal(cut["blocks"]["down"]["kernel"],
                                PARAMS["blocks"]["down"]["kernel"][[1, 3], :2, :4])


def test_layers_come_apart_as_where_sizes_are_their_own():
  found = slicing.unstacked(PARAMS, AXES)
  jax.tree.map(np.testing.assert_array_equal, found, unstacked(PARAMS))
  jax.tree.map(np.testing.assert_array_equal, slicing.unstacked(found, unrolled(AXES, 4)), found)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
  assert jax.tree.map(jnp.shape, slicing.unstacked(shapes, AXES)) == jax.tree.map(jnp.shape, found)


def test_sizes_of_their_own_come_out_unstacked():
  cut = take(PARAMS, AXES, Subnet(layers=(1, 3), heads=(2, 1), mlp=(2, 6)))["blocks"]
  assert list(cut) == ["layers_0", "layers_1"]
  full = PARAMS["blocks"]
  for key, i, heads, mlp in (("layers_0", 1, 2, 2), ("layers_1", 3, 1, 6)):
    np.testing.assert_array_equal(cut[key]["up"]["kernel"], full["up"]["kernel"][i, :, :mlp])
    np.testing.assert_array_equal(cut[key]["qkv"]["kernel"], full["qkv"]["kernel"][i, :, :, :heads])


def test_composition_of_every_nested_pair():
  pairs = [(a, b, inside(b, a)) for a in MEMBERS for b in MEMBERS if inside(b, a)]
  assert len(pairs) > 2 * len(MEMBERS)
  for a, b, rebased in pairs:
    twice = take(take(PARAMS, AXES, a), axes_of(a), rebased)
    assert_same(unstacked(twice), unstacked(take(PARAMS, AXES, b)))


@pytest.mark.parametrize("subnet", [MEMBERS[i] for i in (0, 2, 4)], ids=str)
def test_scatter_is_the_dual_of_take(subnet):
  small = take(PARAMS, AXES, subnet)
  weights = jax.tree.map(lambda a: np.cos(3 * a), small)
  product = lambda x, y: sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y))))
  laid = jax.tree.map(np.asarray, jax.jit(lambda w: scatter(w, AXES, subnet, PARAMS))(weights))
  np.testing.assert_allclose(product(laid, PARAMS), product(weights, small), rtol=1e-5)
  assert_same(take(laid, AXES, subnet), weights)
  inside_count = sum(leaf.size for leaf in jax.tree.leaves(small))
  assert sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(laid)) == inside_count


@pytest.mark.parametrize("subnet", [MEMBERS[i] for i in (1, 2, 4)], ids=str)
def test_gradient_is_the_stand_alone_one_inside_and_zero_outside(subnet):
  def loss(small):
    return sum(jnp.sum(leaf ** 3) for leaf in jax.tree.leaves(small))

  within = jax.jit(jax.grad(lambda p: loss(take(p, AXES, subnet))))(PARAMS)
  within = jax.tree.map(np.asarray, within)
  assert_same(take(within, AXES, subnet), jax.jit(jax.grad(loss))(take(PARAMS, AXES, subnet)))
  inside_count = sum(leaf.size for leaf in jax.tree.leaves(take(PARAMS, AXES, subnet)))
  assert sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(within)) == inside_count


# Every kind of tree.


def test_numpy_stays_numpy_and_views_its_source():
  cut = take(PARAMS, AXES, Subnet(layers=2, embed=2, mlp=4))
  for small, whole in zip(jax.tree.leaves(cut), jax.tree.leaves(PARAMS)):
    assert type(small) is np.ndarray and np.shares_memory(small, whole)
  for by_ids in (Subnet(layers=(0, 2)), Subnet(layers=(0, 2), mlp=(2, 4))):
    cut = take(PARAMS, AXES, by_ids)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(cut))


@pytest.mark.parametrize("subnet", MEMBERS, ids=str)
def test_abstract_trees(subnet):
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
  cut = take(abstract, AXES, subnet)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(cut))
  assert jax.tree.map(lambda s: (s.shape, s.dtype), cut) == jax.tree.map(
    lambda a: (a.shape, a.dtype), take(PARAMS, AXES, subnet))


def test_frozen_dicts_and_lists():
  frozen = freeze({"a": [PARAMS["head"]["kernel"]]})
  cut = take(frozen, {"a": ["embed -> classes"]}, Subnet(embed=2))
  assert cut["a"][0].shape == (2, 3)


class Twin(nnx.Module):

  def __init__(self, embed, mlp):
    rngs = nnx.Rngs(0)
    self.up = nnx.Linear(embed, mlp, rngs=rngs)
    self.down = nnx.Linear(mlp, embed, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.relu(self.up(x)))


NNX_AXES = {"up": {"kernel": "embed -> mlp", "bias": "-> mlp"},
            "down": {"kernel": "mlp -> embed", "bias": "-> embed"}}


def test_nnx_state():
  x = jnp.array([[1.0, -2.0]])
  state = nnx.state(Twin(4, 6))
  small = Subnet(embed=2, mlp=4)
  cut = take(state, NNX_AXES, small)
  assert isinstance(cut, nnx.State) and isinstance(cut["up"]["kernel"], nnx.Param)
  assert state["up"]["kernel"].shape == (4, 6)
  module = Twin(2, 4)
  nnx.update(module, cut)
  p = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
  expected = np.maximum(np.asarray(x) @ p["up"]["kernel"][:2, :4], 0) @ p["down"]["kernel"][:4, :2]
  np.testing.assert_allclose(module(x), expected, rtol=1e-6)
  assert_same(take(nnx.to_pure_dict(state), NNX_AXES, small), nnx.to_pure_dict(cut))


def test_adam_state():
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
  names = jax.tree.map(Axes.parse, AXES)

  def axes_of_state(state, names):
    return optax.tree_map_params(
      optimizer, lambda _, name: name, state, names, transform_non_params=lambda _: Axes(()))

  state = jax.eval_shape(optimizer.init, PARAMS)
  state = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape), state)
  for subnet in (MEMBERS[1], MEMBERS[5]):
    cut = take(state, axes_of_state(state, names), subnet)
    fresh = jax.eval_shape(optimizer.init, take(PARAMS, AXES, subnet))
    assert jax.tree.structure(cut) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
    moments = optax.tree_utils.tree_get(state, "mu")
    assert_same(optax.tree_utils.tree_get(cut, "mu"), take(moments, AXES, subnet))


class Normed(nn.Module):
  mlp: int

  @nn.compact
  def __call__(self, x):
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    x = nn.Dense(self.mlp, use_bias=False,
                 kernel_init=axes(nn.initializers.lecun_normal(), "embed -> mlp"))(x)
    return nn.BatchNorm(use_running_average=True, scale_init=axes(ones, "-> mlp"),
                        bias_init=axes(zeros, "-> mlp"))(x)


def test_statistics():
  x = jnp.arange(8.0).reshape(2, 4)
  variables = nn.unbox(Normed(6).init(jax.random.key(0), x))
  noise = lambda leaf: 1 + jax.random.uniform(jax.random.key(1), leaf.shape)
  variables = {**variables, "batch_stats": jax.tree.map(noise, variables["batch_stats"])}
  names = variable_axes(Normed(6), x)
  cut = {k: take(v, names[k], Subnet(mlp=2)) for k, v in variables.items()}
  whole = Normed(6).apply(variables, x)
  np.testing.assert_allclose(Normed(2).apply(cut, x), whole[:, :2], rtol=1e-6)


def test_a_stack_with_nothing_beside_it():
  """Where all leaves of a tree are stacked, the name of the stack says which node it is."""
  names = {"blocks": {"rate": dataclasses.replace(Axes.parse("layers:"), stack="blocks"),
                      "inner": {"rate": "layers:"}}}
  rates = {"blocks": {"rate": np.arange(4.0), "inner": {"rate": np.arange(4.0)}}}
  cut = take(rates, names, Subnet(layers=(1, 3), mlp=(2, 4)), strict=False)
  assert cut == {"blocks": {"layers_0": {"rate": 1, "inner": {"rate": 1}},
                            "layers_1": {"rate": 3, "inner": {"rate": 3}}}}
  within = take(rates["blocks"], names["blocks"], Subnet(layers=(1, 3), mlp=(2, 4)), strict=False)
  assert within == cut["blocks"]


# Groups.


def test_groups_keep_the_leading_part_of_each():
  array = {"w": np.arange(12)}
  names = {"w": "-> mlp"}
  cut = lambda t, size: take(t, names, Subnet(mlp=size), {"mlp": 3})
  assert cut(array, 6)["w"].tolist() == [0, 1, 4, 5, 8, 9]
  assert cut(array, 12)["w"] is array["w"]
  assert cut(cut(array, 9), 3)["w"].tolist() == cut(array, 3)["w"].tolist() == [0, 4, 8]


def test_groups_compose_and_have_the_dual():
  groups = {"mlp": 2, "heads": 2}
  for a, b, rebased in [(a, b, inside(b, a)) for a in MEMBERS for b in MEMBERS]:
    if rebased is None or 1 in np.ravel(a["heads"]) or 1 in np.ravel(b["heads"]):
      continue
    twice = take(take(PARAMS, AXES, a, groups), axes_of(a), rebased, groups)
    assert_same(unstacked(twice), unstacked(take(PARAMS, AXES, b, groups)))
  up = {"up": PARAMS["blocks"]["up"]["kernel"]}
  names = {"up": AXES["blocks"]["up"]["kernel"]}
  laid = scatter(take(up, names, Subnet(mlp=2), groups), names, Subnet(mlp=2), up, groups)
  np.testing.assert_array_equal(laid["up"][0, 0] != 0, [True, False, False, True, False, False])


@pytest.mark.parametrize("size, groups, message", [
  (4, 3, "mlp=4 of 6 does not divide into 3 groups"), (4, 4, "mlp=4 of 6 does not divide into 4")])
def test_groups_that_do_not_divide(size, groups, message):
  with pytest.raises(ValueError, match=message):
    take(PARAMS, AXES, Subnet(mlp=size), {"mlp": groups})


# Product axes.


@pytest.mark.parametrize("subnet", [
  Subnet(heads=2), Subnet(head_dim=2), Subnet(heads=1, head_dim=3), Subnet(heads=2, head_dim=4)],
  ids=str)
def test_a_product_axis_is_cut_factor_by_factor(subnet):
  """A fused kernel, cut, computes what the factored kernel computes on the same heads."""
  rng = np.random.default_rng(0)
  fused = rng.normal(size=(5, 3 * 4 * 4)).astype(np.float32)
  x = rng.normal(size=(2, 5)).astype(np.float32)
  factored = fused.reshape(5, 3, 4, 4)
  cut = take({"w": fused}, {"w": "embed -> (3 heads head_dim=4)"}, subnet)["w"]
  heads, width = subnet.get("heads", 4), subnet.get("head_dim", 4)
  expected = np.einsum("be,eqhd->bqhd", x, factored)[:, :, :heads, :width].reshape(2, -1)
  np.testing.assert_allclose(x @ cut, expected, rtol=1e-5)
  assert_same({"w": cut.reshape(5, 3, heads, width)},
              take({"w": factored}, {"w": "embed -> 3 heads head_dim"}, subnet))


def test_a_product_that_is_none():
  with pytest.raises(ValueError, match="w: a dimension of 10 is not the product"):
    take({"w": np.ones(10)}, {"w": "-> (heads head_dim=4)"}, Subnet(heads=1))


def test_product_axes_as_a_tuple_of_names():
  names = ((("heads", None), ("head_dim", 2)), "embed")
  assert is_axes(names)
  assert take({"w": np.ones((8, 3))}, {"w": names}, Subnet(heads=3))["w"].shape == (6, 3)


# Rules.


def width_scaled(full):
  """Keeps the scale of a sum when fewer units enter it; a function of the subnet alone."""
  return lambda leaf, subnet: leaf * (full / subnet.get("embed", full)) ** 0.5


class Ruled(nn.Module):
  embed: int
  scale: bool = False

  @nn.compact
  def __call__(self, x):
    rule = width_scaled(8) if self.scale else None
    init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", axes(init, "embed -> classes", rule), (self.embed, 3))
    return x[:, :self.embed] @ kernel


def test_a_rule_is_part_of_the_cut():
  x = jax.random.normal(jax.random.key(0), (2, 8))
  params = nn.unbox(Ruled(8).init(jax.random.key(1), x))["params"]
  names = axis_names(Ruled(8, scale=True), x)
  extracted = take(params, names, Subnet(embed=2))
  np.testing.assert_allclose(extracted["kernel"], 2 * params["kernel"][:2], rtol=1e-6)
  in_place = Ruled(2).apply({"params": take(params, names, Subnet(embed=2))}, x)
  np.testing.assert_array_equal(in_place, Ruled(2).apply({"params": extracted}, x))
  abstract = take(jax.eval_shape(lambda: params), names, Subnet(embed=2))
  assert abstract["kernel"].shape == (2, 3)


def test_a_rule_that_scales_by_width_composes():
  """The rule of the small network, which scales from the small width, completes the first's."""
  params = {"w": np.arange(1.0, 25.0).reshape(8, 3)}
  named = lambda full: {"w": Axes.parse("embed -> classes", width_scaled(full))}
  middle = take(params, named(8), Subnet(embed=4))
  twice = take(middle, named(4), Subnet(embed=2))
  np.testing.assert_allclose(twice["w"], take(params, named(8), Subnet(embed=2))["w"], rtol=1e-12)


def test_the_dual_leaves_rules_out():
  names = {"w": Axes.parse("-> embed", width_scaled(8))}
  laid = scatter({"w": jnp.ones(2)}, names, Subnet(embed=2), {"w": jnp.zeros(4)})
  assert laid["w"].tolist() == [1, 1, 0, 0]


def test_a_rule_sees_the_sizes_of_its_own_layer():
  seen = []
  names = {"blocks": {"w": Axes.parse("layers: -> mlp", lambda leaf, s: seen.append(s) or leaf)},
           "x": "-> mlp2"}
  params = {"blocks": {"w": np.ones((3, 8))}, "x": np.ones(1)}
  take(params, names, Subnet(layers=(0, 2), mlp=(4, 8)))
  assert seen == [Subnet(mlp=4), Subnet(mlp=8)]


# Errors.


@pytest.mark.parametrize("subnet, message", [
  (dict(emebd=2), "unknown axis 'emebd'; did you mean 'embed'.*Allowed: .*heads"),
  (dict(embed=5), "patch/kernel: embed=5 is outside the axis, which has 4|embed=5 is outside"),
  (dict(layers=5), "layers=5 is outside the axis, which has 4"),
  (dict(layers=(1, 4)), r"layers=\(1, 4\) is outside the axis, which has 4"),
  (dict(layers=(1, 4), mlp=(2, 4)), r"blocks: layers=\(1, 4\) is outside"),
  (dict(layers=2, mlp=(2, 8)), "mlp=8 is outside the axis, which has 6"),
  (dict(mlp=(2, 4)), "lists 2 layers, but layers keeps 4"),
  (dict(layers=2, embed=(2, 4)), "one size a layer, but this array has no layers axis")])
def test_a_subnet_outside_the_tree(subnet, message):
  with pytest.raises(ValueError, match=message):
    take(PARAMS, AXES, Subnet(**subnet))


def test_strict_is_about_axes_that_no_leaf_has():
  beside = {"bias": np.ones(3)}
  assert take(beside, {"bias": "-> classes"}, Subnet(mlp=2), strict=False) == beside
  with pytest.raises(ValueError, match="unknown axis 'mlp'.*Allowed: classes"):
    take(beside, {"bias": "-> classes"}, Subnet(mlp=2))


@pytest.mark.parametrize("names, message", [
  ({"b": "-> mlp"}, r"does not match the tree at its root: got \['b'\], the tree has \['a'\]"),
  ({"a": {"c": "-> mlp"}}, "does not match the tree at a|has 1 names"),
  ({"a": "embed -> mlp"}, r"a: 'embed -> mlp' has 2 names, the array has shape \[4\]")])
def test_trees_that_differ(names, message):
  with pytest.raises(ValueError, match=message):
    take({"a": np.ones(4)}, names, Subnet(mlp=2))


def test_lists_of_other_length():
  with pytest.raises(ValueError, match="at a: 1 entries for 2"):
    take({"a": [np.ones(4)] * 2}, {"a": ["-> mlp"]}, Subnet(mlp=2))
