"""Swin: its windows by hand, and every kind of member as a slice, as a module of its own and as data."""

from __future__ import annotations

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Space, Subnet, cli, count_params, load, save, take
from nestnet.axes import is_axes, variable_axes
from nestnet.execution import Supernet, extract, sizes_of
from nestnet.models import architecture
from nestnet.models.swin import Swin, WindowAttention
from nestnet.one_program import OneProgram
from nestnet.permuting import permute
from nestnet.places import at

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = np.random.default_rng(9).normal(size=(2, 8, 8, 1)).astype(np.float32)
INPUT = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
# Stages of 8 x 8 and of 4 x 4 positions, both of several windows.
MODEL = Swin(3, embed=8, layers_1=2, layers_2=4, expand_1=2, expand_2=2, multiples=(1, 2), head_dim=4, window=2,
             patch=1)
SPACE = Space(embed=(4, 8), layers_1=(1, 2), layers_2=(1, 2, 4), expand_1=(2,), expand_2=(1, 2),
              per_layer=("expand_2",))
NET = Supernet(MODEL, SPACE, (INPUT,))
MIXED = ["layers_2=0+2,expand_2=2:1", "layers_1=+1,embed=4,layers_2=1+3,expand_2=1", "layers_2=+2,embed=4",
         "embed=4,expand_2=1:2:1:1", "layers_2=0+2,expand_2=2"]


def quick(texts, number):
  """All of them; the others run with the longer checks."""
  return [t if i == number else pytest.param(t, marks=pytest.mark.slow) for i, t in enumerate(texts)]


def randomised(shapes):
  """Variables in which norms and tables are as random as the kernels; shifts as they are."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
  return {"params": jax.tree.map(draw, shapes["params"]), "constants": constants(MODEL)}


def constants(model):
  return jax.jit(lambda key: meta.unbox(model.init(key, IMAGES)["constants"]))(jax.random.key(0))


@functools.cache
def apply(module):
  return jax.jit(functools.partial(module.apply, taps=True))


@pytest.fixture(scope="module")
def variables():
  return randomised(NET.shapes)


# What it computes.


@pytest.mark.parametrize("rows, pad", [(8, False), (7, True)])
def test_windows_by_hand(rows, pad):
  """Each position sees its own window alone, shifted or not, which does not go round the edge of the map.

  There is one window of columns, which is smaller: along it nothing shifts. What fills up a map is seen too.
  """
  rng = np.random.default_rng(1)
  module = WindowAttention(stage=1, heads=2, head_dim=3, window=4, pad=pad)
  x = rng.normal(size=(2, rows, 3, 5)).astype(np.float32)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, {"shift": jnp.zeros(())}, train=False))
  p = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), meta.unbox(shapes)["params"])
  call = jax.jit(functools.partial(module.apply, x=x, constants=None, train=False))
  for shift in (0, 2):
    found = call({"params": p, "constants": {"shift": np.float32(shift)}})
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = np.pad(y * p["norm"]["scale"] + p["norm"]["bias"], [(0, 0), (0, 8 - rows), (0, 0), (0, 0)])
    q, k, v = np.moveaxis(np.einsum("...e,ehtd->...htd", y, p["qkv"]["kernel"]) + p["qkv"]["bias"], -2, 0)
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1] if shift == 0 else [0, 0, 1, 1, 1, 1, 2, 2])
    out = np.zeros_like(v)
    for r, c in np.ndindex(8, 3):
      seen = [(a, b) for a in np.flatnonzero(groups == groups[r]) for b in range(3)]
      bias = np.stack([p["rel_pos"][(r - a + 3) * 7 + c - b + 3] for a, b in seen], -1)
      keys, values = (np.stack([t[:, a, b] for a, b in seen], -1) for t in (k, v))
      scores = np.einsum("bhd,bhds->bhs", q[:, r, c], keys) / np.sqrt(3) + bias
      weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
      out[:, r, c] = np.einsum("bhs,bhds->bhd", weights, values)
    expected = x + np.einsum("brchd,hde->brce", out[:, :rows], p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_outputs_and_taps(variables):
  outputs = dict(apply(MODEL)(variables, IMAGES))
  taps = outputs.pop("taps")
  assert [t.shape for t in taps] == [(2, 2, 8, 8, 8), (4, 2, 4, 4, 16)]
  assert {k: v.shape for k, v in outputs.items()} == {
    "logits": (2, 3), "features": (2, 16), "tokens": (2, 16, 16)}
  p, last = variables["params"], np.asarray(taps[1][-1])
  normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
  tokens = (normal * p["norm"]["scale"] + p["norm"]["bias"]).reshape(2, 16, 16)
  np.testing.assert_allclose(outputs["tokens"], tokens, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(outputs["features"], tokens.mean(1), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(outputs["logits"], tokens.mean(1) @ p["head"]["kernel"] + p["head"]["bias"],
                             rtol=1e-3, atol=1e-3)


def test_four_positions_side_by_side_are_normalised_as_one_and_merged(variables):
  """In the authors' order: down the left column, then down the right one."""
  still = jax.tree.map(np.zeros_like, {k: variables["params"][k] for k in ("stage_1", "stage_2")})
  v = {**variables, "params": variables["params"] | still}
  taps = apply(MODEL)(v, IMAGES)["taps"]
  a, merged = np.asarray(taps[0][-1]), variables["params"]["merge_1"]
  y = np.stack([a[:, 0::2, 0::2], a[:, 1::2, 0::2], a[:, 0::2, 1::2], a[:, 1::2, 1::2]], 3)
  both = dict(axis=(-2, -1), keepdims=True)
  y = (y - y.mean(**both)) / np.sqrt(y.var(**both) + 1e-6) * merged["norm"]["scale"] + merged["norm"]["bias"]
  expected = np.einsum("brcge,gef->brcf", y, merged["reduce"]["kernel"])
  np.testing.assert_allclose(taps[1][0], expected, rtol=1e-3, atol=1e-3)


def test_axes_and_roles():
  names = jax.tree.map(str, variable_axes(MODEL.clone(drop_path=0.1), INPUT), is_leaf=is_axes)
  params = names["params"]
  assert params["patch"]["kernel"] == "patch_height patch_width channels -> embed_1"
  assert params["patch_norm"] == {"scale": "-> embed_1", "bias": "-> embed_1"}
  assert params["stage_2"]["attention"]["rel_pos"] == "layers_2: -> rel_pos heads_2"
  assert params["stage_2"]["attention"]["out"]["kernel"] == "layers_2: heads_2 head_dim -> embed_2"
  assert params["merge_1"] == {
    "norm": {"scale": "-> 4 embed_1", "bias": "-> 4 embed_1"}, "reduce": {"kernel": "4 embed_1 -> embed_2"}}
  assert params["head"]["kernel"] == "embed_2 -> classes"
  assert names["constants"]["stage_1"] == {
    "attention": {"shift": "layers_1: ->", "drop_path": "layers_1: ->"}, "mlp": {"drop_path": "layers_1: ->"}}


# Members.


def closed_form(s):
  """Parameters of a member; patches of one number, windows of 2 x 2, heads of 4."""
  total = 3 * 2 * s["embed"]
  for stage in (1, 2):
    width = s["embed"] * stage
    mlps = np.broadcast_to(s[f"expand_{stage}"], s[f"layers_{stage}"]) * width
    fixed = 4 * width + 4 * width * (width + 1) - width + width + 9 * (width // 4) + width
    total += s[f"layers_{stage}"] * fixed + sum(2 * width * m + m for m in mlps)
  merge = 8 * s["embed"] + 8 * s["embed"] ** 2
  # The patches' projection and norm; the last norm and the classifier.
  return int(total - 2 * s["embed"] + merge + 4 * s["embed"] + 3 * 2 * s["embed"] + 3)


def test_every_member_is_the_slice_in_shape_and_count():
  members = [*SPACE, *map(SPACE.subnet, MIXED)]
  assert SPACE.size == 2 * 2 * (2 + 4 + 16)
  for member in (members[7], members[50], *members[len(SPACE):][:4]):
    NET.check(member)
    cut = jax.eval_shape(lambda v: NET.cut(v, member), NET.shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(cut["params"])) == closed_form(member)
  assert count_params(MODEL, INPUT) == closed_form(SPACE.largest)


def test_the_largest_is_the_whole(variables):
  jax.tree.map(np.testing.assert_array_equal, NET.cut(variables, SPACE.largest), variables)
  jax.tree.map(np.testing.assert_array_equal, NET.cut(variables, Subnet()), variables)


def outputs_and_norms(module, variables, images=IMAGES):
  """What a network gives, and what each of its norms does."""
  return module.apply(variables, images, mutable=["intermediates"],
                      capture_intermediates=lambda m, _: isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize("text", quick(MIXED, 1))
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(text, variables, tmp_path):
  """Norms are of the active width: what they give, without scale and bias, is normal over that."""
  subnet = SPACE.subnet(text)
  module = NET.module(subnet)
  in_place = jax.jit(lambda v: outputs_and_norms(module, NET.cut(v, subnet)))(variables)
  save(tmp_path / "net", *extract(MODEL, variables, subnet, INPUT))
  loaded, small = load(tmp_path / "net")
  assert loaded == module
  alone = jax.jit(functools.partial(outputs_and_norms, loaded))(small)
  assert float(jnp.ptp(alone[0]["logits"])) > 0.1
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)
  embed, seen = subnet["embed"], alone[1]["intermediates"]
  for path, shape in (("patch_norm",), (embed,)), (("merge_1", "norm"), (4, embed)), (("norm",), (2 * embed,)):
    given, own = at(seen, path)["__call__"][0], jax.tree.map(np.asarray, at(small["params"], path))
    normal, over = (np.asarray(given) - own["bias"]) / own["scale"], tuple(range(-len(shape), 0))
    assert own["scale"].shape == normal.shape[-len(shape):] == shape
    np.testing.assert_allclose(normal.mean(over), 0, atol=1e-3)
    np.testing.assert_allclose(normal.var(over), 1, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("subnet", [m for m in SPACE if m.chosen["expand_2"] == 2][::3], ids=str)
def test_every_width_and_depth_in_place_equals_the_extracted_network(subnet, variables):
  module = NET.module(subnet)
  in_place = jax.jit(lambda v, x: module.apply(NET.cut(v, subnet), x))(variables, IMAGES)
  alone = jax.jit(module.apply)(NET.cut(variables, subnet), IMAGES)
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


@pytest.mark.parametrize("ids", [(0, 2), (1, 3)], ids=str)
def test_the_shift_travels_with_its_layer(ids, variables):
  """A member is the network in which the other layers add nothing, whatever their places' parity."""
  subnet = SPACE.subnet(Subnet(layers_2=ids, expand_2=2))
  silent = np.isin(np.arange(4), ids).astype(np.float32)
  stage = jax.tree.map(np.array, variables["params"]["stage_2"])
  for part, name in (("attention", "out"), ("mlp", "down")):
    stage[part][name] = jax.tree.map(lambda x: x * silent.reshape(4, *[1] * (x.ndim - 1)), stage[part][name])
  whole = {**variables, "params": variables["params"] | {"stage_2": stage}}
  expected = apply(MODEL)(whole, IMAGES)["tokens"]
  small = NET.cut(variables, subnet)
  np.testing.assert_array_equal(small["constants"]["stage_2"]["attention"]["shift"], np.array(ids) % 2)
  found = apply(NET.module(subnet))(small, IMAGES)["tokens"]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # It would show: these layers shifted as their places in the member say are another function.
  small["constants"]["stage_2"] = {"attention": {"shift": np.float32([0, 1])}}
  assert np.abs(apply(NET.module(subnet))(small, IMAGES)["tokens"] - expected).max() > 0.01


def test_a_layer_without_its_shift_is_refused(variables):
  with pytest.raises(ValueError, match="WindowAttention: there is no shift among the variables"):
    jax.eval_shape(MODEL.apply, {"params": variables["params"]}, IMAGES)


def test_slices_of_slices(variables):
  outer, inner = (Subnet.parse(t) for t in (
    "embed=8,layers_1=2,layers_2=0+2+3,expand_2=2", "embed=4,layers_1=+1,layers_2=2+3,expand_2=1"))
  sizes = [sizes_of(MODEL, s) for s in (outer, inner)]
  names = Supernet(NET.module(outer), Space(**{a: (v,) for a, v in outer.items()}), (INPUT,)).axes
  cut = lambda tree, names, s: {c: take(tree[c], names[c], s, strict=False) for c in tree}
  once = cut(variables, NET.axes, sizes[1])
  twice = cut(cut(variables, NET.axes, sizes[0]), names, sizes[1].within(sizes[0]))
  jax.tree.map(np.testing.assert_array_equal, once, twice)
  np.testing.assert_array_equal(twice["constants"]["stage_2"]["attention"]["shift"], [0, 1])


@pytest.mark.slow
def test_the_gradient_outside_the_slice_is_zero(variables):
  subnet = SPACE.subnet("embed=4,layers_1=1,layers_2=0+2,expand_2=1")
  module = NET.module(subnet)
  loss = lambda p: jnp.sin(module.apply(NET.cut({**variables, "params": p}, subnet), IMAGES)["logits"]).sum()
  grads = jax.jit(jax.grad(loss))(variables["params"])
  cut = NET.cut({"params": grads}, subnet)["params"]
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(cut))
  total = lambda tree: sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(tree))
  assert total(grads) == total(cut)


def test_units_in_another_order_are_the_same_network(variables):
  """Every axis names one space: whoever writes it and whoever reads it move together."""
  rng, sizes = np.random.default_rng(3), sizes_of(MODEL, SPACE.largest)
  orders = {axis: rng.permutation(sizes[axis]) for axis in ("embed_1", "embed_2", "heads_2")}
  orders["mlp_1"] = tuple(rng.permutation(16) for _ in range(2))
  moved = permute(variables["params"], NET.axes["params"], orders)
  found, expected = (apply(MODEL)({**variables, "params": p}, IMAGES)["logits"]
                     for p in (moved, variables["params"]))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_images_of_another_size():
  """Tables know no image, so that parameters are those of every size."""
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.ones((1, 4, 12, 1)))
  assert jax.tree.map(jnp.shape, meta.unbox(shapes["params"])) == jax.tree.map(jnp.shape, NET.shapes["params"])
  tokens = lambda x: jax.eval_shape(MODEL.apply, NET.shapes, x)["tokens"].shape
  assert tokens(IMAGES[:, :4]) == (2, 8, 16) and tokens(np.ones((3, 12, 20, 1))) == (3, 60, 16)


# One program.


def loss_and_gradient(runnable, variables):
  def loss(params):
    cut = runnable.cut({**variables, "params": params})
    cut |= {} if runnable.choice is None else {"choice": runnable.choice}
    logits = runnable.module.apply(cut, IMAGES)["logits"]
    return jnp.mean(jnp.sin(logits)), logits
  return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def test_widths_are_outside_and_depths_and_expansions_in_each_layer():
  one = OneProgram(NET)
  assert one.possible and one.outer == ("embed", "expand_1") and len(one.widths) == 2
  assert one.inner == ("expand_2",) and one.depths == ("layers_1", "layers_2")
  one.check()


@pytest.mark.slow
def test_as_data_equals_the_slice(variables, compiled):
  """Logits and gradients of members of both widths, the shift travelling with its layer."""
  one = OneProgram(NET)
  as_data = jax.jit(functools.partial(one.switch, loss_and_gradient))
  for text in ("layers_2=0+2,expand_2=2:1,layers_1=1", "embed=4,layers_2=1+3,expand_2=1"):
    subnet = SPACE.subnet(text)
    (loss, logits), grads = as_data(one.vector(subnet), variables)
    (own, expected), alone = jax.jit(functools.partial(loss_and_gradient, NET.runnable(subnet)))(variables)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, own, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, alone)), strict=True):
      assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
      assert not np.asarray(a)[np.asarray(b) == 0].any()
  assert compiled.count("jit(switch)") == 1


# Options and errors.


def test_the_small_network_of_its_config():
  config = cli.load_config(str(ROOT / "configs" / "digits_clutter_swin.py"))
  space = Space(**config.space.to_dict())
  fields = config.model.to_dict()
  model = architecture(fields.pop("name"))(classes=10, **fields)
  net = Supernet(model, space, (jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32),))
  one = OneProgram(net)
  assert one.possible and len({tuple(one.vector(member)) for member in space.pool}) == len(space.pool)
  assert space.pool[-1] == space.largest and space.smallest == space.pool[0]


@pytest.mark.parametrize("dtype, param_dtype", [(jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)])
def test_types_of_computation_and_parameters(dtype, param_dtype):
  model = MODEL.clone(dtype=dtype, param_dtype=param_dtype, drop_path=0.2, dropout=0.1, remat=True)
  made = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  assert {leaf.dtype for leaf in jax.tree.leaves(made["params"])} == {jnp.dtype(param_dtype)}
  call = lambda v: model.apply(v, IMAGES, train=True, rngs={"dropout": jax.random.key(0)})
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(call, made))} == {jnp.dtype(dtype)}


def test_drop_path_grows_over_all_stages_and_a_backbone_has_no_head():
  model = MODEL.clone(drop_path=0.3, classes=0)
  made, rates = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), IMAGES)), constants(model)
  stages = [rates[f"stage_{s}"]["mlp"]["drop_path"] for s in (1, 2)]
  np.testing.assert_allclose(np.concatenate(stages), 0.05 * np.arange(1, 7), rtol=1e-5)
  assert "head" not in made["params"]
  assert set(jax.eval_shape(model.apply, made, IMAGES)) == {"features", "tokens"}


@pytest.mark.parametrize("make, message", [
  (lambda: MODEL.clone(embed=6), "embed=6 gives stage 1 a width of 6, .*not divide into heads of head_dim=4"),
  (lambda: MODEL.clone(multiples=()), r"multiples=\(\); allowed are 1 to 4 stages"),
  (lambda: MODEL.clone(layers_2=0), "Swin: layers_2=0; allowed is at least 1"),
  (lambda: MODEL.clone(drop_path=1.0), r"drop_path=1.0, dropout=0.0; allowed is \[0, 1\)"),
  (lambda: MODEL.sizes(Subnet(layers_3=1)), "unknown axis of Swin 'layers_3'"),
  (lambda: Supernet(MODEL, Space(embed=(4, 6, 8)), (INPUT,)), "embed=6 gives stage 1 a width of 6"),
  (lambda: SPACE.subnet("embed=6"), "embed=6 is outside the space; allowed for embed: 4, 8")])
def test_what_is_wrong_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("rows, fields, message", [
  (7, {"patch": 2}, "an image of 7 x 8 does not divide into patches of 2"),
  (6, {"window": 4}, "stage 1 has 6 x 8 positions, which do not divide into windows of 4; allowed with model.pad=True"),
  (3, {"window": 4}, "stage 1 has 3 x 8 positions, which do not divide by 2 for the next one"),
  (6, {}, "stage 2 has 3 x 4 positions, which do not divide into windows of 2")])
def test_images_that_do_not_divide(rows, fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(MODEL.clone(**fields).init, jax.random.key(0), jnp.ones((1, rows, 8, 1)))
