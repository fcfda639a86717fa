"""ResNet and its members with both rules of GroupNorm: as published, as slices, as data."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet, count_params, flops
from nestnet.axes import variable_axes
from nestnet.choices import spaced
from nestnet.evaluation import member_flops
from nestnet.execution import Supernet, module_of, sizes_of
from nestnet.interop.folder import load, save
from nestnet.models import convolution as c
from nestnet.models import resnet
from nestnet.models.resnet import SMALL_IMAGES, ResNet
from nestnet.models.tiny_resnet import TinyResNet
from nestnet.one_program import OneProgram
from nestnet.ordering import orders
from nestnet.slicing import scatter, take, used

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 11, 12, 2)).astype(np.float32)
INPUT = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
PHOTO = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
# The last stage has all that is elastic; the first is a first block alone.
MODEL = ResNet(3, layers_1=1, layers_2=4, width=8, stem=8, widths=(8, 16), strides=(1, 2), group=2)
SPACE = Space(width=(4, 6, 8), layers_2=spaced(4, (2, 3, 4)))
# What takes less long to compile as one program.
PAIR = Space(width=(4, 8), layers_2=spaced(4, (2, 3, 4)))
NETS = {"size": Supernet(MODEL, SPACE, (INPUT,)), "count": Supernet(MODEL.clone(groups=2), SPACE, (INPUT,))}
MEMBERS = ["width=4,layers_2=0+3", "width=6,layers_2=0+2+3", "layers_2=0+1+3"]
both = pytest.mark.parametrize("name", NETS)


@functools.cache
def variables(name):
  rng = np.random.default_rng(1)
  return {"params": jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype),
                                 NETS[name].shapes["params"])}


@functools.cache
def extracted(name, text):
  """A member's module, its variables, and what it computes alone."""
  net, subnet = NETS[name], SPACE.subnet(text)
  small = jax.jit(functools.partial(net.cut, subnet=subnet))(variables(name))
  return net.module(subnet), small, jax.jit(net.module(subnet).apply)(small, IMAGES)


def equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# As published.


def parameters(model, member):
  """A bottleneck's three convolutions and their norms, block by block, in closed form."""
  total, reads = 7 * 7 * 3 * model.stem + 2 * model.stem, model.stem
  for s, writes in enumerate(model.widths, 1):
    hidden = member.get("width", model.width) * 2 ** (s - 1)
    for block in range(member.get(f"layers_{s}", getattr(model, f"layers_{s}"))):
      total += reads * hidden + 9 * hidden ** 2 + hidden * writes + 2 * (hidden + hidden + writes)
      total += 0 if block else reads * writes + 2 * writes
      reads = writes
  return total + reads * model.classes + model.classes


def test_the_published_space_and_its_parameters():
  model = ResNet(1000, groups=32)
  space = resnet.space(model)
  assert len(space) == 465 and space.largest == Subnet(width=128, layers_2=8, layers_3=36)
  assert str(space.smallest) == "width=64,layers_2=0+2+4+7,layers_3=0+7+14+21+28+35"
  # ResNet-50, ResNet-152 and the wide ResNet-101, as torchvision counts them.
  known = {"width=64,layers_2=4,layers_3=6": 25_557_032, "width=64,layers_2=8,layers_3=36": 60_192_808,
           "width=128,layers_2=4,layers_3=23": 126_886_696}
  assert [parameters(model, Subnet.parse(text)) for text in known] == [*known.values()]
  for member in (*map(Subnet.parse, known), space.largest):
    assert count_params(module_of(model, member), PHOTO) == parameters(model, member)
  backbone = jax.eval_shape(lambda x: ResNet(0).init_with_output(jax.random.key(0), x)[0], PHOTO)
  assert {k: v.shape for k, v in backbone.items()} == {"features": (1, 2048), "tokens": (1, 4, 2048)}


def test_either_way_to_keep_blocks():
  model = TinyResNet(10)
  leading = resnet.space(model, (4, 6, 8), (2, 3, 4), (2, 3, 4), keep="leading")
  assert len(leading) == 27 and str(leading.smallest) == "width=4,layers_2=2,layers_3=2"
  even = resnet.space(model, (4, 6, 8), (2, 3, 4), (2, 3, 4))
  assert str(even.smallest) == "width=4,layers_2=0+3,layers_3=0+3"
  for space in (leading, even):
    net = Supernet(model.clone(groups=2), space, (jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.float32),))
    assert OneProgram(net).outer == ("width",)
    OneProgram(net).check()


@pytest.mark.parametrize("model, side, strides", [
  (ResNet(10), 64, [4, 8, 16, 32]), (ResNet(10, **SMALL_IMAGES), 32, [1, 2, 4, 8]),
  (TinyResNet(10), 12, [1, 2, 4])], ids=["published", "small", "tiny"])
def test_total_strides(model, side, strides):
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, taps=True)[0], images)
  assert [side // tap.shape[2] for tap in outputs["taps"]] == strides
  assert [tap.shape[-1] for tap in outputs["taps"]] == list(model.widths)
  assert outputs["tokens"].shape == (1, (side // strides[-1]) ** 2, model.widths[-1])


def by_torch(model, params, images):
  """The network as torchvision has it, with GroupNorm; from a tree whose layers are stacked."""
  import torch
  f, tensor = torch.nn.functional, lambda x: torch.tensor(np.asarray(x))

  def conv(node, x, stride=1):
    kernel = node["conv"]["kernel"]
    kernel = tensor(kernel if kernel.ndim == 4 else kernel[None, None]).permute(3, 2, 0, 1)
    x = f.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    return f.group_norm(x, model.groups or x.shape[1] // model.group, *(
      tensor(node["norm"][key]) for key in ("scale", "bias")))

  x = f.relu(conv(params["stem"], tensor(images).permute(0, 3, 1, 2), model.stem_stride))
  x = f.max_pool2d(x, 3, 2, 1) if model.pool else x
  for s, stage_stride in zip(model.stages, model.strides):
    stage = params[f"stage_{s}"]
    rest = [jax.tree.map(lambda leaf: leaf[i], stage["rest"])
            for i in range(getattr(model, f"layers_{s}") - 1)]
    for block in (stage[f"layers_{s}_0"], *rest):
      stride = stage_stride if "shortcut" in block else 1
      y = f.relu(conv(block["spatial"], f.relu(conv(block["reduce"], x)), stride))
      x = f.relu(conv(block["expand"], y) + (conv(block["shortcut"], x, stride) if "shortcut" in block else x))
  tokens = x.flatten(2).transpose(1, 2)
  logits = tokens.mean(1) @ tensor(params["classifier"]["kernel"]) + tensor(params["classifier"]["bias"])
  return {"tokens": tokens.numpy(), "features": tokens.mean(1).numpy(), "logits": logits.numpy()}


@pytest.mark.interop
@both
def test_a_member_computes_what_torch_does(name):
  module, small, found = extracted(name, MEMBERS[0])
  expected = by_torch(module, small["params"], IMAGES)
  assert set(found) == set(expected) and np.ptp(expected["tokens"]) > 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


# Members as slices.


@both
def test_every_member_is_the_slice_in_shape(name):
  for member in [*SPACE, *map(SPACE.subnet, MEMBERS), Subnet(width=6, layers_2=2), Subnet(layers_2=(0, 3))]:
    NETS[name].check(member)
  equal(NETS[name].cut(variables(name), SPACE.largest), variables(name))
  member = SPACE.subnet(MEMBERS[0])
  assert member_flops(NETS[name])(member, False) == flops(NETS[name].module(member), INPUT)


def test_batch_norm_has_no_groups():
  net = Supernet(MODEL.clone(norm="batch", width=9), Space(width=(5, 9), layers_2=(2, 4)), (INPUT,))
  net.check(net.space.smallest)
  assert net.model.together == 1 and OneProgram(net).possible


@both
@pytest.mark.parametrize("text", [MEMBERS[0], *(
  pytest.param(text, marks=pytest.mark.slow) for text in (*MEMBERS[1:], "layers_2=0+3"))])
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(name, text):
  net, subnet = NETS[name], SPACE.subnet(text)
  module, _, alone = extracted(name, text)
  in_place = jax.jit(lambda v: module.apply(net.cut(v, subnet), IMAGES))(variables(name))
  assert float(jnp.ptp(alone["logits"])) > 1e-2
  equal(in_place, alone)


@both
def test_slices_of_slices(name):
  net = NETS[name]
  outer, inner = Subnet(width=6, layers_2=(0, 2, 3)), Subnet(width=4, layers_2=(0, 3))
  params, names, (large, small) = variables(name)["params"], net.axes["params"], (
    sizes_of(net.model, subnet) for subnet in (outer, inner))
  between = variable_axes(net.module(outer), INPUT)["params"]
  equal(take(take(params, names, large), between, small.within(large)), take(params, names, small))


@pytest.mark.slow
@both
def test_gradients_are_those_of_the_extracted_network_and_zero_outside(name):
  net, subnet = NETS[name], SPACE.subnet(MEMBERS[0])
  module, cut = net.module(subnet), lambda params: net.cut({"params": params}, subnet)["params"]

  @jax.jit
  def gradients(params):
    loss = lambda small: jnp.sin(module.apply({"params": small}, IMAGES)["logits"]).sum()
    return jax.grad(lambda p: loss(cut(p)))(params), jax.grad(loss)(cut(params))

  params = variables(name)["params"]
  found, alone = gradients(params)
  expected = scatter(alone, net.axes["params"], sizes_of(net.model, subnet), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7),
               found, expected)
  marks = used(cut, params)
  outside = [np.asarray(g)[~np.asarray(mark)] for g, mark in zip(*map(jax.tree.leaves, (found, marks)))]
  assert sum(map(len, outside)) > 1000 and not np.concatenate(outside).any()


def test_the_rule_of_the_groups_is_saved(tmp_path):
  subnet = SPACE.subnet(MEMBERS[0])
  for name, net in NETS.items():
    save(tmp_path / name, net.module(subnet), net.cut(variables(name), subnet))
    module, small = load(tmp_path / name)
    assert module == net.module(subnet) and (module.group, module.groups) == (2, 2 if name == "count" else None)
    equal(small, net.cut(variables(name), subnet))


def test_a_number_of_groups_is_that_of_flax():
  x = RNG.normal(2, 3, size=(2, 5, 6, 8)).astype(np.float32)
  params = {key: RNG.normal(size=8).astype(np.float32) for key in ("scale", "bias")}
  with jax.numpy_rank_promotion("allow"):
    expected = nn.GroupNorm(4, epsilon=1e-5).apply({"params": params}, x)
  got = c.GroupNorm("hidden", count=4).apply({"params": params}, x, False)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# Members as data, and training.


def outcome(runnable, variables):
  """The outputs, and the gradient of a loss."""
  def loss(params):
    cut = runnable.cut({"params": params}) | ({"choice": runnable.choice} if runnable.choice else {})
    outputs = runnable.module.apply(cut, IMAGES.astype(np.float64))
    return jnp.sin(outputs["logits"]).sum(), outputs
  (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return outputs, grads


@pytest.mark.slow
@pytest.mark.parametrize("name, texts", [("count", [MEMBERS[0], MEMBERS[2]])])
def test_one_program_equals_the_slices(name, texts, compiled):
  with jax.enable_x64(True):
    wide = NETS[name].model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    net = Supernet(wide, PAIR, (jax.ShapeDtypeStruct(IMAGES.shape, jnp.float64),))
    one = OneProgram(net)
    one.check()
    own = jax.tree.map(lambda x: x.astype(np.float64), variables(name))
    as_data = jax.jit(functools.partial(one.switch, outcome))
    for subnet in map(PAIR.subnet, texts):
      found = as_data(one.vector(subnet), own)
      expected = jax.jit(functools.partial(outcome, net.runnable(subnet)))(own)
      for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.abs(b).max() + 1e-12)
    assert compiled.count("jit(switch)") == 1


@pytest.mark.slow
def test_units_move_in_groups_where_groups_keep_their_size():
  net, params = NETS["size"], variables("size")["params"]
  (first, *_), = orders(net.model, net.axes["params"], params, ["hidden_2"]).values()
  pairs = np.asarray(first).reshape(-1, 2)
  assert (np.diff(pairs) == 1).all() and (np.diff(pairs[:, 0]) < 0).any()


@pytest.mark.parametrize("make, message", [
  (lambda: MODEL.clone(widths=()), r"widths=\(\); allowed are 1 to 4 stages"),
  (lambda: MODEL.clone(widths=(8,)), r"strides=\(1, 2\) has 2 entries; widths has 1"),
  (lambda: MODEL.clone(width=(4, 8)), r"width=\(4, 8\); allowed is one, for all blocks"),
  (lambda: MODEL.clone(width=5), "hidden_1=5 does not divide into groups of 2"),
  (lambda: MODEL.clone(groups=3), "embed_0=8 does not divide into 3 groups"),
  (lambda: MODEL.clone(groups=0), "groups=0; allowed is at least 1"),
  (lambda: MODEL.clone(widths=(8, 12), width=6, norm="batch", stem_kernel=2), "stem_kernel=2; allowed are odd"),
  (lambda: MODEL.clone(widths=(8, 12), width=3), "width=3 beside 8 channels has no like in stage 2, beside 12"),
  (lambda: MODEL.clone(norm="layer"), "unknown norm of ResNet 'layer'"),
  (lambda: MODEL.clone(dropout=1.0), r"dropout=1.0; allowed is \[0, 1\)"),
  (lambda: MODEL.sizes(Subnet(expand_2=1)), "unknown axis of ResNet 'expand_2'"),
  (lambda: MODEL.sizes(Subnet(layers_2=(1, 3))), "layers_2 leaves out layer 0, which has the stage's stride"),
  (lambda: Supernet(MODEL, Space(width=(4, 5, 8), layers_2=(2, 4)), (INPUT,)),
   "hidden_1=5 does not divide into groups of 2"),
  (lambda: Supernet(MODEL, Space(layers_2=((1, 2, 3), 2, 4)), (INPUT,)), "layers_2 leaves out layer 0"),
  (lambda: orders(NETS["count"].model, NETS["count"].axes["params"], NETS["count"].shapes["params"], ["inner_2"]),
   "units of inner_2 cannot be sorted: each width divides them anew into 2 groups"),
  (lambda: resnet.space(MODEL, keep="first"), "unknown way to keep blocks 'first'"),
  (lambda: c.GroupNorm("hidden", count=4).init(jax.random.key(0), jnp.ones((1, 2, 2, 6)), False),
   "hidden=6 does not divide into 4 groups")])
def test_what_is_wrong_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
