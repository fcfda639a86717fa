"""Elastic widths, ties, shortcuts, drop path, GroupNorm and small images of the convolutional families."""

from __future__ import annotations

import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from nestnet import Space, Subnet, cli, recipes
from nestnet.cost import count_flops
from nestnet.execution import Supernet
from nestnet.models import architecture, big_nas, mobilenet, mobilenet_v3, proxyless_nas
from nestnet.models import convolution as c
from nestnet.models.big_nas import AttentiveNAS, BigNAS
from nestnet.models.bottleneck import Bottleneck
from nestnet.models.mobilenet import InvertedResidual, MobileNet
from nestnet.models.mobilenet_v3 import MobileNetV3
from nestnet.models.proxyless_nas import ProxylessNAS
from nestnet.models.resnet50d import ResNet50D
from nestnet.models.small_mobilenet import SmallMobileNet
from nestnet.one_program import OneProgram

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
INPUT = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
IMAGES = jax.random.normal(jax.random.key(1), INPUT.shape)
WIDE = MobileNet(
  3, layers_0=2, layers_1=2, expand_1=2, kernel_0=5, kernel_1=5, stem=16, embed_0=24, embed_1=32,
  head_0=40, features=24, widths=(8, 16), head=(32, 16), strides=(1, 2), squeeze=(True, True),
  activations=("swish", "relu"), shortcuts=True, zero_gamma=True, drop_path=0.3)
WIDTHS = {"embed_0": (16, 24), "embed_1": (16, 32), "stem": (8, 16), "head_0": (16, 40), "features": (16, 24)}
ELASTIC = Supernet(WIDE, mobilenet.space(WIDE, (1, 2), (1, 2), (3, 5), "stage", **WIDTHS), (INPUT,))
GROUPED = Supernet(
  WIDE.clone(norm="group", group=4, layers_0=None, squeeze=(False, False), shortcuts=False, drop_path=0.0),
  Space(layers_1=(1, 2), expand_1=(1, 2), embed_1=(16, 32), per_layer=["expand_1"]), (INPUT,))
RESNET = ResNet50D(3, layers_0=1, layers_1=1, layers_2=1, layers_3=1, layers_4=2, stem=16,
                   widths=(8, 8, 8, 16), norm="group", zero_gamma=True)
GROUPED_RESNET = Supernet(RESNET, Space(layers_4=(1, 2), expand_4=(20, 35), width_4=(65, 100)), (INPUT,))


def randomised(net):
  made = jax.tree.map(lambda s: (0.5 * RNG.normal(size=s.shape)).astype(s.dtype), dict(net.shapes))
  if "constants" in made:
    made["constants"] = jax.tree.map(lambda rate: np.abs(rate) % 1, made["constants"])
  return made


@pytest.mark.parametrize("net, text", [
  (ELASTIC, "layers_0=1,kernel_1=3,embed_0=16,embed_1=16,stem=8,head_0=16,features=16"),
  (ELASTIC, "layers_1=1,expand_1=1,kernel_0=3"), (GROUPED, "expand_1=1:2,embed_1=16"),
  (GROUPED_RESNET, "layers_4=1,width_4=65")], ids=["widths", "depth", "group", "resnet"])
def test_every_member_is_the_slice_in_shape(net, text):
  for member in (net.space.subnet(text), net.space.sample(0), net.space.sample(1)):
    net.check(member)


@pytest.mark.parametrize("net, text", [
  (ELASTIC, "kernel_0=3,kernel_1=3,embed_0=16,stem=8,head_0=16,features=16"),
  (GROUPED, "expand_1=1:2,embed_1=16")], ids=["widths", "group"])
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(net, text):
  subnet, variables = net.space.subnet(text), randomised(net)
  module = net.module(subnet)
  in_place = jax.jit(lambda v, x: module.apply(net.cut(v, subnet), x))(variables, IMAGES)
  alone = jax.jit(module.apply)(jax.jit(lambda v: net.cut(v, subnet))(variables), IMAGES)
  assert float(jnp.ptp(alone["logits"])) > 1e-3
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


def test_squeeze_excite_of_the_block_before_the_stages_follows_the_stem():
  model = MobileNet(3, layers_1=1, expand_1=1, kernel_1=3, stem=48, widths=(8, 8), head=(8,), strides=(1, 2),
                    squeeze=(True, False), activations=("relu", "relu"))
  # The smallest is checked to be a slice.
  net = Supernet(model, Space(stem=(16, 48)), (INPUT,))
  assert net.cut(net.shapes, Subnet(stem=16))["params"]["fixed"]["squeeze"]["reduce"]["bias"].shape == (8,)


@pytest.mark.parametrize("model", [MobileNetV3(10), AttentiveNAS(10)], ids=["fixed block", "stage"])
def test_units_of_the_stem_are_those_of_the_block_behind_it(model):
  assert model.tied_axes == (("stem", "embed_0"),)


# Spaces.


def test_sizes_of_tied_spaces():
  model = MobileNetV3(1000)
  assert mobilenet.space(model, kernel=(7,), tie="depth").size == 3 ** 5
  assert mobilenet.space(ProxylessNAS(1000), kernel=(7,), tie="depth").size == 3 ** 5
  assert mobilenet.space(model, tie="depth").size == (3 * 3) ** 5
  tied = mobilenet.space(model, tie="stage")
  assert tied.size == (3 * 3 * 3) ** 5
  assert isinstance(tied.sample(0).chosen["expand_2"], int)
  coupled = mobilenet.space(model, kernel=(7,), tie="depth")
  assert {(m["layers_3"], m["expand_3"]) for m in coupled.by_cost(lambda m: 0)} == {(2, 3), (3, 4), (4, 6)}


def test_sizes_of_spaces_with_elastic_widths():
  space = mobilenet.space(AttentiveNAS(1000), **big_nas.ATTENTIVE_NAS)
  widths, depths = 2 * (2 * 2 * 2 * 2 * 3 * 4 * 2) * 2, 2 * 3 * 4 * 4 * 6 * 6 * 2
  assert space.size == widths * depths * 2 ** 7 * 3 ** 4
  space = mobilenet.space(BigNAS(1000), **big_nas.BIG_NAS)
  widths, depths = 2 * (2 * 2 * 2 * 2 * 3 * 4 * 5) * 17, 2 * 2 * 2 * 3 * 5 * 5 * 2
  assert space.size == widths * depths * 2 ** 5


@pytest.mark.slow
@pytest.mark.parametrize("name, choices", [
  ("BigNAS", big_nas.BIG_NAS), ("AttentiveNAS", big_nas.ATTENTIVE_NAS)])
def test_published_spaces_go_with_their_networks(name, choices):
  model = architecture(name)(10)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, taps=True)[0], image)
  assert [64 // t.shape[2] for t in outputs["taps"]] == [2, 4, 8, 16, 16, 32, 32]
  assert [t.shape[-1] for t in outputs["taps"]] == [model.channels(s) for s in range(7)]
  # That the smallest and the largest are slices is checked where a supernet is made.
  one = OneProgram(Supernet(model, mobilenet.space(model, **choices), (image,)))
  # Each width is data to the blocks that read or write it, which have fewer than twenty branches each.
  assert one.possible and len(one.widths) == 1 and one.worth < 20
  assert one.carried == tuple(axis for axis in model.carried if axis in one.supernet.space.axes)


def test_a_config_may_hold_a_space():
  space = mobilenet.space(SmallMobileNet(10), (1, 2, 3), (2, 3, 4), (3, 5), tie="depth")
  config = ml_collections.ConfigDict(space.to_json())
  assert Space(**config.to_dict()).size == space.size == (3 * 2) ** 3


def test_the_config_spells_the_space_of_its_network():
  config = cli.load_config(str(ROOT / "configs" / "digits_clutter_mobilenet.py"))
  spelled = Space(**config.space.to_dict())
  assert spelled.without_pool() == mobilenet.space(SmallMobileNet(10), (1, 2, 3), (2, 3, 4), (3, 5))
  assert spelled.size == (6 + 6 ** 2 + 6 ** 3) ** 3 and spelled.largest == spelled.pool[-1]


# Shortcuts and the start.


def started(block, x, constants):
  """What a fresh block makes of `x`, and its variables."""
  return jax.jit(lambda x: block.init_with_output(jax.random.key(0), x, constants, train=True))(x)


def test_a_shortcut_is_the_mean_over_the_stride_projected():
  block = InvertedResidual(1, "embed_0", 8, 16, 3, 2, shortcut=True, zero_gamma=True, act="relu")
  x = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
  y, variables = started(block, x, {})
  mean = x.reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
  kernel = np.asarray(variables["params"]["shortcut"]["kernel"].unbox())
  np.testing.assert_allclose(y, np.einsum("bijc,cd->bijd", mean, kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residual_branches_start_at_zero(norm):
  x = RNG.normal(size=(2, 4, 4, 8)).astype(np.float32)
  make = dict(width=8, hidden=16, zero_gamma=True, norm=norm)
  run = lambda block: started(block, x, {})
  np.testing.assert_array_equal(run(InvertedResidual(1, "embed_1", **make))[0], x)
  np.testing.assert_array_equal(run(Bottleneck(1, "embed_1", **make))[0], np.maximum(x, 0))
  # Where nothing is added, zeros would end the network.
  block = InvertedResidual(1, "embed_0", stride=2, **make)
  init = lambda x: block.init(jax.random.key(0), x, {}, train=True)["params"]["project"]["norm"]
  assert jax.jit(lambda x: init(x)["scale"].unbox())(x).all()


def test_rates_of_drop_path_rise_in_the_last_stages():
  model = MobileNetV3(10, layers_4=2, layers_5=3, drop_path=0.2)
  before, total = 1 + 4 + 4 + 4, 1 + 4 + 4 + 4 + 2 + 3
  assert [model.rates(s) for s in (1, 2, 3)] == [None] * 3
  np.testing.assert_allclose(model.rates(4) + model.rates(5), 0.2 * (before + np.arange(5)) / total)
  full = jax.eval_shape(WIDE.init, jax.random.key(0), IMAGES)["constants"]
  assert set(full["stage_0"]) == {"layers_0_0", "rest"} and set(full["stage_1"]) == {"layers_1_0", "rest"}
  assert WIDE.rates(0) == [0, 0.3 / 4] and WIDE.rates(1) == [0.3 * 2 / 4, 0.3 * 3 / 4]


def test_drop_path_leaves_the_residual_stream():
  x = RNG.normal(size=(64, 2, 2, 8)).astype(np.float32)
  block = InvertedResidual(1, "embed_1", 8, 16)
  rate = lambda value: {"drop_path": jnp.float32(value)}
  variables = jax.jit(lambda x: block.init(jax.random.key(0), x, rate(0.5), train=False))(x)
  apply = lambda train: jax.jit(lambda x: block.apply(
    variables, x, rate(0.1), train=train, rngs={"dropout": jax.random.key(1)}))(x)
  kept, added = apply(False) - x, apply(True) - x
  dropped = np.asarray((added == 0).all((1, 2, 3)))
  assert 16 < dropped.sum() < 48
  # The stored rate, not that of the call.
  np.testing.assert_allclose(added[~dropped], kept[~dropped] / 0.5, rtol=1e-4, atol=1e-5)
  # In evaluation none is dropped, and no random number is asked for.
  assert np.asarray(kept).any((1, 2, 3)).all()
  still = jax.jit(lambda x: block.apply(variables, x, rate(0.1), train=False))(x)
  np.testing.assert_allclose(still - x, kept, rtol=1e-5, atol=1e-5)


def test_the_configs_of_a_paper_regularise_as_it_does():
  """Drop path in all stages in BigNAS, in the last two in AttentiveNAS and AlphaNet; none in OFA."""
  def rates(method):
    config, model = published(method)
    regularised = config.recipe.sampler.to_dict().get("regularise")
    return model.dropout, [bool(model.rates(s)) for s in model.stages], model.zero_gamma, regularised
  assert rates("ofa") == (0.1, [False] * 5, False, None)
  assert rates("bignas") == (0.2, [True] * 7, True, "largest")
  for method in ("attentive_nas", "attentive_nas_worst_up", "alphanet"):
    assert rates(method) == (0.2, [False] * 5 + [True] * 2, True, "largest")


def published(method):
  """The config of a method on ImageNet, and its network."""
  config = cli.load_config(f"{ROOT / 'configs' / 'imagenet_ofa_mbv3.py'}:{method}")
  fields = config.model.to_dict() | {"dtype": jnp.bfloat16}
  return config, architecture(fields.pop("name"))(10, **fields)


@pytest.mark.parametrize("method", recipes.RECIPES)
def test_every_method_has_the_space_of_its_network(method):
  config, model = published(method)
  space = Space(**config.space.to_dict())
  largest = dict(space.largest)
  assert largest.pop("resolution", 224) == config.data.shape[0]
  assert all(getattr(model, axis) == size for axis, size in largest.items())
  own = {"bignas": 32_640, "attentive_nas": 1536, "attentive_nas_worst_up": 1536, "alphanet": 1536}
  widths = space.combinations([axis for axis in model.carried if axis in space.axes])
  assert len(widths) == own.get(method, 1)
  assert len(space.combinations(["resolution"])) == (4 if method in own else 1)


# Norms.


@pytest.mark.parametrize("size", [1, 4])
def test_group_norm_is_that_of_flax(size):
  x = RNG.normal(2, 3, size=(2, 5, 6, 8)).astype(np.float32)
  params = {k: RNG.normal(size=8).astype(np.float32) for k in ("scale", "bias")}
  theirs = nn.GroupNorm(num_groups=None, group_size=size, epsilon=1e-5)
  with jax.numpy_rank_promotion("allow"):
    expected = theirs.apply({"params": params}, x)
  for train in (False, True):
    got = c.GroupNorm("hidden", size).apply({"params": params}, x, train)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_of_leading_groups_is_that_of_all():
  x = RNG.normal(size=(2, 3, 3, 16)).astype(np.float32)
  apply = lambda x: c.GroupNorm("hidden", 4).init_with_output(jax.random.key(0), x, False)[0]
  np.testing.assert_allclose(apply(x[..., :8]), apply(x)[..., :8], rtol=1e-5, atol=1e-6)


# Small images.


@pytest.mark.parametrize("model, side, stride", [
  (MobileNetV3(10, **mobilenet_v3.SMALL_IMAGES), 32, 8),
  (ProxylessNAS(10, **proxyless_nas.SMALL_IMAGES), 32, 8), (SmallMobileNet(10), 12, 4)],
  ids=["v3", "proxyless", "small"])
def test_total_strides_of_variants_for_small_images(model, side, stride):
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, taps=True)[0], images)
  assert outputs["taps"][-1].shape[2] * stride == side


def test_the_way_of_a_device_does_not_change_the_flops():
  x, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((5, 5, 3))
  forward = count_flops(lambda x, k: c.convolution(x, k, 1), x, kernel)
  backward = count_flops(lambda x, k: jax.vjp(lambda x, k: c.convolution(x, k, 1), x, k)[1](x), x, kernel)
  assert forward == 2 * math.prod((2, 6, 6, 3, 5, 5)) and backward == 2 * forward


@pytest.mark.parametrize("make, message", [
  (lambda: WIDE.clone(norm="layer"), "unknown norm of MobileNet 'layer'"),
  (lambda: WIDE.clone(group=16), "group=16; allowed are 1, 2, 4 and 8"),
  (lambda: SmallMobileNet(10, head_0=8), "its channels are features"),
  (lambda: WIDE.clone(drop_path=1.0), r"drop_path=1.0; allowed is \[0, 1\)"),
  (lambda: c.GroupNorm("hidden", 4).init(jax.random.key(0), jnp.ones((1, 2, 2, 6)), False),
   "hidden=6 does not divide into groups of 4"),
  (lambda: mobilenet.space(WIDE, tie="layer"), "unknown way to tie a space 'layer'"),
  (lambda: mobilenet.space(WIDE, embed_4=(8,)), "unknown axis of MobileNet 'embed_4'"),
  (lambda: mobilenet.space(SmallMobileNet(10), head_0=(8,)), "unknown axis of SmallMobileNet 'head_0'"),
  (lambda: SmallMobileNet(10).sizes(Subnet(layers_0=1)), "unknown axis of SmallMobileNet 'layers_0'")])
def test_what_is_wrong_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
