"""The vision transformer: shapes, counts and numbers of every kind of member."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Space, Subnet, count_params, take
from nestnet.axes import is_axes, variable_axes
from nestnet.execution import Supernet
from nestnet.models.vit import ViT

IMAGES = jax.random.normal(jax.random.key(9), (2, 8, 8, 1))
INPUT = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
MODEL = ViT(layers=3, embed=16, heads=4, mlp=16, classes=3, head_dim=4)
SPACE = Space(layers=(1, 2, 3), embed=(8, 16), heads=(2, 4), mlp=(8, 16))
TOKEN = MODEL.clone(pool="token", features=16, drop_path=0.3)
MIXED = ["layers=0+2", "layers=+1,embed=8", "mlp=8:16:8", "layers=1+2,heads=4:2",
         "layers=0+2,embed=8,heads=2:4,mlp=16:8"]


def shapes(module):
  return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), IMAGES))


def randomised(module):
  """Variables in which norms and statistics are as random as the kernels."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes(module))


@pytest.fixture(scope="module")
def variables():
  return randomised(MODEL)


def count(net, member):
  cut = jax.eval_shape(lambda v: net.cut(v, member), net.shapes)
  return sum(leaf.size for leaf in jax.tree.leaves(cut["params"]))


def closed_form(s, features=None, token=False):
  """Parameters of a ViT of these sizes, with lists written out; 4 patches of 4 x 4 x 1."""
  embed, depth = s["embed"], s["layers"]
  heads, mlp = (np.broadcast_to(s[a], depth) for a in ("heads", "mlp"))
  stem = 16 * embed + embed + (4 + token) * embed + token * embed
  blocks = sum(4 * embed + 3 * 4 * h * (embed + 1) + 4 * h * embed + embed
               + (embed + 1) * m + m * embed + embed for h, m in zip(heads, mlp))
  return stem + blocks + 2 * embed + 3 * (features or embed) + 3


def test_every_member_is_the_slice_in_shape_and_count():
  net = Supernet(MODEL, SPACE, (INPUT,))
  members = [*SPACE, *map(SPACE.subnet, MIXED)]
  assert SPACE.size == 24
  for member in members:
    net.check(member)
    assert count(net, member) == closed_form(member)
  assert count_params(MODEL, INPUT) == closed_form(SPACE.largest)


def test_members_with_features_a_class_token_and_drop_path():
  space = Space(layers=(1, 3), embed=(8, 16), heads=(4,), mlp=(16,), features=(4, 8, 16),
                constraint=lambda s: s["features"] <= s["embed"])
  net = Supernet(TOKEN, space, (INPUT,))
  listed = Subnet.parse("layers=0+2,embed=8,heads=2:4,mlp=16:8,features=8")
  for member in (*space, listed):
    net.check(member)
    assert count(net, member) == closed_form(member, member["features"], token=True)


def test_axes_and_roles():
  names = jax.tree.map(str, variable_axes(TOKEN, INPUT), is_leaf=is_axes)
  blocks = names["params"]["blocks"]
  assert blocks["attention"]["qkv"]["kernel"] == "layers: embed -> heads 3 head_dim"
  assert blocks["attention"]["out"]["kernel"] == "layers: heads head_dim -> embed"
  assert blocks["mlp"]["down"] == {"kernel": "layers: mlp -> embed", "bias": "layers: -> embed"}
  assert names["params"]["head"]["kernel"] == "features -> classes"
  assert names["constants"]["blocks"] == {
    "attention": {"drop_path": "layers: ->"}, "mlp": {"drop_path": "layers: ->"}}


@pytest.mark.parametrize("model, text", [
  (MODEL, "layers=2,embed=8,heads=2,mlp=8"), (MODEL, "layers=0+2,embed=8,heads=2:4,mlp=16:8"),
  (TOKEN, "layers=+2,embed=8,features=4")], ids=["prefix", "lists", "token"])
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(model, text):
  subnet = Subnet.parse(text)
  weights = randomised(model)
  names = variable_axes(model, INPUT)
  cut = lambda v: {k: take(t, names[k], subnet, strict=False) for k, t in v.items()}
  module = model.clone(**subnet)
  in_place = jax.jit(lambda v, x: module.apply(cut(v), x))(weights, IMAGES)
  alone = jax.jit(module.apply)(cut(weights), IMAGES)
  assert set(alone) == {"logits", "features", "tokens"}
  assert float(jnp.ptp(alone["logits"])) > 0.1
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


def test_scanned_and_unrolled_blocks_are_one_function(variables):
  unrolled = MODEL.clone(mlp=(16, 16, 16), unroll=1)
  params = variables["params"]
  layers = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(3)}
  a = jax.jit(lambda v: MODEL.apply(v, IMAGES, taps=True))(variables)
  b = jax.jit(lambda v: unrolled.apply(v, IMAGES, taps=True))(
    {"params": {**params, "blocks": layers}})
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), a, b)


def test_outputs_and_taps(variables):
  outputs = jax.jit(lambda v: MODEL.apply(v, IMAGES, taps=True))(variables)
  assert {k: v.shape for k, v in outputs.items()} == {
    "logits": (2, 3), "features": (2, 16), "tokens": (2, 4, 16), "taps": (3, 2, 4, 16)}
  params, last = variables["params"], np.asarray(outputs["taps"][-1])
  normal = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
  tokens = normal * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]
  np.testing.assert_allclose(outputs["tokens"], tokens, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(outputs["features"], tokens.mean(1), rtol=1e-3, atol=1e-4)
  logits = tokens.mean(1) @ params["head"]["kernel"] + params["head"]["bias"][None]
  np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-3, atol=1e-3)


def test_the_classifier_reads_leading_features_of_the_class_token():
  weights = randomised(TOKEN)
  head = weights["params"]["head"] | {"kernel": weights["params"]["head"]["kernel"][:4]}
  small = {**weights, "params": weights["params"] | {"head": head}}
  outputs = jax.jit(TOKEN.clone(features=4).apply)(small, IMAGES)
  assert outputs["features"].shape == (2, 4) and outputs["tokens"].shape == (2, 5, 16)
  np.testing.assert_array_equal(outputs["features"], outputs["tokens"][:, 0, :4])


def test_a_backbone_has_no_head():
  backbone = MODEL.clone(classes=0)
  assert "head" not in shapes(backbone)["params"]
  assert "logits" not in jax.eval_shape(backbone.apply, shapes(backbone), IMAGES)


def test_patches_are_squares_of_the_image(variables):
  """With positions and blocks out of the way a token depends on its own square alone."""
  still = {"params": variables["params"] | {
    "blocks": jax.tree.map(np.zeros_like, variables["params"]["blocks"])}}
  changed = IMAGES.at[0, 1, 6, 0].add(5.0)
  tokens = jax.jit(lambda x: MODEL.apply(still, x)["tokens"])
  moved = np.any(np.asarray(tokens(IMAGES) != tokens(changed)), axis=-1)
  assert moved.tolist() == [[False, True, False, False], [False] * 4]


# Drop path.


def stochastic(rates, layers=3):
  model = MODEL.clone(drop_path=0.5, layers=layers)
  weights = randomised(model)
  return model, {**weights, "constants": {"blocks": {
    part: {"drop_path": np.array(rates, np.float32)} for part in ("attention", "mlp")}}}


def test_drop_path_rates_grow_with_depth_and_travel_with_their_layer():
  model = MODEL.clone(drop_path=0.3)
  stored = jax.jit(lambda key: meta.unbox(model.init(key, IMAGES))["constants"])(jax.random.key(0))
  rates = stored["blocks"]["mlp"]["drop_path"]
  np.testing.assert_array_equal(stored["blocks"]["attention"]["drop_path"], rates)
  np.testing.assert_allclose(rates, [0.1, 0.2, 0.3], rtol=1e-6)
  names = variable_axes(model, INPUT)["constants"]
  kept = take(stored, names, Subnet(layers=(0, 2)))["blocks"]["mlp"]["drop_path"]
  np.testing.assert_array_equal(kept, rates[np.array([0, 2])])
  listed = take(stored, names, Subnet(layers=(0, 2), mlp=(8, 16)), strict=False)["blocks"]
  assert [listed[f"layers_{i}"]["mlp"]["drop_path"] for i in (0, 1)] == [rates[0], rates[2]]


def test_a_layer_that_is_always_dropped_is_no_layer():
  model, weights = stochastic((0, 0.5, 1))
  cut = lambda ids: {k: take(v, names[k], Subnet(layers=ids)) for k, v in weights.items()}
  names = variable_axes(model, INPUT)
  trained = jax.jit(lambda v: model.clone(layers=2).apply(
    v, IMAGES, train=True, rngs={"dropout": jax.random.key(0)})["tokens"])(cut((0, 2)))
  alone = jax.jit(lambda v: model.clone(layers=1).apply(v, IMAGES)["tokens"])(cut((0,)))
  np.testing.assert_allclose(trained, alone, rtol=1e-4, atol=1e-4)


def test_drop_path_keeps_the_expectation():
  """An example keeps a branch, divided by its probability, or drops it."""
  model, weights = stochastic((0.4,), layers=1)
  blocks = weights["params"]["blocks"]
  zero = lambda *keys: {part: {k: jax.tree.map(np.zeros_like, v) if k in keys else v
                               for k, v in tree.items()} for part, tree in blocks.items()}
  images = jnp.broadcast_to(IMAGES[:1], (400, 8, 8, 1))

  @jax.jit
  def outputs(blocks, key):
    v = {**weights, "params": weights["params"] | {"blocks": blocks}}
    rngs = {"dropout": key}
    return (model.apply(v, images, train=True, taps=True, rngs=rngs)["taps"][0],
            model.apply(v, images[:1], taps=True)["taps"][0])

  before = np.asarray(outputs(zero("out", "down"), jax.random.key(0))[1])
  trained, plain = map(np.asarray, outputs(zero("down"), jax.random.key(3)))
  dropped = np.abs(trained - before).max(axis=(1, 2)) == 0
  assert abs(dropped.mean() - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 400)
  expected = np.broadcast_to(before + (plain - before) / 0.6, trained.shape)
  np.testing.assert_allclose(trained[~dropped], expected[~dropped], rtol=1e-4, atol=1e-4)


def test_without_training_there_is_no_dropout_and_no_rng():
  model, weights = stochastic((0.4, 0.4, 0.4))
  plain = jax.jit(MODEL.apply)({"params": weights["params"]}, IMAGES)
  same = jax.jit(model.clone(dropout=0.5).apply)(weights, IMAGES)
  jax.tree.map(np.testing.assert_array_equal, plain, same)


# Options and errors.


def test_head_dim_is_kept_by_clone():
  model = ViT(layers=1, embed=16, heads=4, mlp=8, classes=3)
  assert model.head_dim == 4
  small = model.clone(embed=8, heads=1)
  assert small.head_dim == 4
  assert shapes(small)["params"]["blocks"]["attention"]["qkv"]["kernel"].shape == (1, 8, 1, 3, 4)


@pytest.mark.parametrize("dtype, param_dtype", [
  (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)])
def test_types_of_computation_and_parameters(dtype, param_dtype):
  model = TOKEN.clone(dtype=dtype, param_dtype=param_dtype)
  made = shapes(model)
  assert {leaf.dtype for leaf in jax.tree.leaves(made["params"])} == {jnp.dtype(param_dtype)}
  apply = lambda v: model.apply(v, IMAGES, train=True, rngs={"dropout": jax.random.key(0)})
  assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(apply, made))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("fields, message", [
  (dict(heads=3), "embed=16 does not divide into heads=3; give head_dim"),
  (dict(heads=(2, 4)), r"heads=\(2, 4\); give head_dim"),
  (dict(pool="max"), "unknown pool 'max'.*Allowed: mean, token"),
  (dict(features=17), "features=17 is more than embed=16")])
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    ViT(**{**dict(layers=2, embed=16, heads=4, mlp=8, classes=3), **fields})


def test_an_image_that_does_not_divide_into_patches():
  with pytest.raises(ValueError, match="an image of 8 x 10 does not divide into patches of 4"):
    jax.eval_shape(MODEL.init, jax.random.key(0), jnp.ones((1, 8, 10, 1)))
