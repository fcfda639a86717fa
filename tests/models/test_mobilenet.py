"""MobileNetV3, ProxylessNAS and ResNet50D: exact widths and spaces, members as slices and as modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet
from nestnet.axes import statistics_axes
from nestnet.execution import Supernet, extract, sizes_of
from nestnet.interop.folder import load, save
from nestnet.models import convolution as c
from nestnet.models import mobilenet, resnet50d
from nestnet.models.mobilenet import MobileNet
from nestnet.models.mobilenet_v3 import MobileNetV3
from nestnet.models.proxyless_nas import ProxylessNAS
from nestnet.models.resnet50d import ResNet50D
from nestnet.slicing import take

INPUT = jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.float32)
IMAGES = jax.random.normal(jax.random.key(1), INPUT.shape)
SMALL = MobileNet(3, widths=(8, 8, 16), head=(16, 24), strides=(1, 2, 1), squeeze=(False, False, True),
                  activations=("relu", "relu", "h_swish"), layers_1=2, layers_2=3, expand_1=2, expand_2=3,
                  kernel_1=5, kernel_2=5, stem=8)
RESNET = ResNet50D(3, layers_1=2, layers_2=2, layers_3=3, layers_4=2, widths=(16, 24, 32, 40), stem=16)
MOBILE = Supernet(SMALL, mobilenet.space(SMALL, (1, 2, 3), (1, 2, 3), (3, 5)), (INPUT,))
TRANSFORMED = Supernet(SMALL.clone(transforms=True), MOBILE.space, (INPUT,))
RES = Supernet(RESNET, resnet50d.space(RESNET, (1, 0)), (INPUT,))
MIXED = {
  "MobileNet": ["layers_1=1,layers_2=1", "expand_2=1:3:3,kernel_2=3",
                "layers_2=0+2,expand_2=3:1,kernel_2=5:3", "expand_1=1,kernel_1=3,layers_2=2,expand_2=1:2"],
  "ResNet50D": ["layers_0=1", "layers_3=0+2,expand_3=20:35", "width_2=65,expand_1=20,layers_4=1",
                "width_stem=65"]}


def randomised(net):
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), net.shapes["params"])
  is_norm = lambda node: isinstance(node, dict) and "scale" in node
  def of(node):
    if is_norm(node):
      shape = node["scale"].shape
      stats = {"mean": rng.normal(size=shape), "var": rng.uniform(0.5, 2, shape)}
      return {key: value.astype(np.float32) for key, value in stats.items()}
    found = {k: of(v) for k, v in node.items() if isinstance(v, dict)}
    return {k: v for k, v in found.items() if v}
  return {"params": params, "batch_stats": of(params)}


@pytest.mark.parametrize("net", [MOBILE, TRANSFORMED, RES], ids=["centre", "transforms", "resnet"])
def test_every_member_is_the_slice_in_shape(net):
  texts = MIXED["ResNet50D" if net is RES else "MobileNet"]
  for member in [*map(net.space.subnet, texts), *(net.space.sample(i) for i in range(3))]:
    net.check(member)


@pytest.mark.parametrize("net, text", [(TRANSFORMED, MIXED["MobileNet"][2]), (RES, MIXED["ResNet50D"][1])],
                         ids=["mobilenet", "resnet"])
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(net, text):
  subnet, variables = net.space.subnet(text), randomised(net)
  module = net.module(subnet)
  in_place = jax.jit(lambda v, x: module.apply(net.cut(v, subnet), x))(variables, IMAGES)
  alone = jax.jit(module.apply)(jax.jit(lambda v: net.cut(v, subnet))(variables), IMAGES)
  assert float(jnp.ptp(alone["logits"])) > 1e-3
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


@pytest.mark.parametrize("net", [TRANSFORMED, RES], ids=["mobilenet", "resnet"])
def test_an_extracted_network_is_saved_with_its_statistics(net, tmp_path):
  texts = MIXED["ResNet50D" if net is RES else "MobileNet"]
  module, small = extract(net.model, randomised(net), net.space.subnet(texts[1]), INPUT)
  save(tmp_path / "net", module, small)
  loaded, variables = load(tmp_path / "net")
  assert loaded == module and set(variables) == {"params", "batch_stats"}
  jax.tree.map(np.testing.assert_array_equal, variables, jax.tree.map(np.asarray, small))


def test_slices_of_slices():
  variables, names = randomised(MOBILE)["params"], MOBILE.axes["params"]
  outer, inner = (Subnet.parse(t) for t in (
    "layers_1=2,expand_1=2,kernel_1=5,layers_2=0+2,expand_2=2:3,kernel_2=5:3",
    "layers_1=2,expand_1=1:2,kernel_1=5:3,layers_2=1,expand_2=1,kernel_2=3"))
  middle = MOBILE.module(outer)
  once = take(variables, names, sizes_of(SMALL, inner))
  names = Supernet(middle, Space(**{a: (v,) for a, v in outer.items() if isinstance(v, int)}), (INPUT,)).axes
  sizes = sizes_of(SMALL, inner).within(sizes_of(SMALL, outer))
  twice = take(take(variables, MOBILE.axes["params"], sizes_of(SMALL, outer)), names["params"], sizes)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(once), jax.tree.leaves(twice))


def test_the_gradient_outside_the_slice_is_zero():
  subnet = MOBILE.space.smallest
  params = {"params": randomised(MOBILE)["params"]}
  module = MOBILE.module(subnet)
  grads = jax.jit(jax.grad(lambda v: jnp.square(module.apply(MOBILE.cut(v, subnet), IMAGES, train=True)[
    "logits"]).sum()))(params)["params"]
  edge = np.asarray(grads["stage_2"]["layers_2_0"]["depthwise"]["conv"]["kernel"])
  assert np.abs(edge[1:4, 1:4, :8]).min() > 0 and not edge[0].any() and not edge[..., 8:].any()
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["stage_2"]["rest"]))


def test_statistics_of_the_batch_are_recorded_and_used():
  variables = {"params": randomised(MOBILE)["params"]}
  subnet = MOBILE.space.subnet(MIXED["MobileNet"][1])
  module, small = MOBILE.module(subnet), MOBILE.cut(variables, subnet)
  plain, moments = jax.jit(lambda v: module.apply(v, IMAGES, mutable=["batch_stats"]))(small)
  again = jax.jit(module.apply)(small | moments, IMAGES)
  np.testing.assert_allclose(plain["logits"], again["logits"], rtol=1e-4, atol=1e-4)
  names = statistics_axes(MOBILE.axes["params"], randomised(MOBILE)["batch_stats"])
  assert names["stage_2"]["rest"]["depthwise"]["norm"]["mean"].names == ("layers_2", "hidden_2")


def test_taps_are_the_outputs_of_the_blocks():
  variables = {"params": randomised(MOBILE)["params"]}
  subnet = MOBILE.space.subnet("layers_1=1,expand_2=3:2:1")
  taps = jax.eval_shape(lambda v: MOBILE.module(subnet).apply(MOBILE.cut(v, subnet), IMAGES, taps=True),
                        variables)["taps"]
  assert [t.shape for t in taps] == [(1, 2, 3, 3, 8), (3, 2, 3, 3, 16)]


# Published networks.


def test_sizes_of_the_spaces():
  mobile, proxyless, resnet = (mobilenet.space(MobileNetV3(1000)), mobilenet.space(ProxylessNAS(1000)),
                               resnet50d.space(ResNet50D(1000)))
  each = 9 ** 2 + 9 ** 3 + 9 ** 4
  assert mobile.size == each ** 5 and proxyless.size == each ** 5 * 9
  assert resnet.size == 2 * 3 ** 6 * (9 + 27 + 81) ** 3 * (81 + 243 + 729)
  for space in (mobile, proxyless, resnet):
    member = space.sample(3)
    assert member in space and space.decode(space.encode(member)) == member


def test_a_choice_outside_the_space_names_the_block():
  with pytest.raises(ValueError, match="expand_2=5 is outside the space; allowed for expand_2: 3, 4, 6"):
    mobilenet.space(MobileNetV3(10)).subnet("expand_2=5")


@pytest.mark.parametrize("model, widths, hidden", [
  (MobileNetV3(10), [16, 24, 40, 80, 112, 160], [96, 144, 144, 144]),
  (MobileNetV3(10, width=1.2), [24, 32, 48, 96, 136, 192], [144, 192, 192, 192]),
  (ProxylessNAS(10), [24, 32, 56, 104, 128, 248, 416], [144, 192, 192, 192])],
  ids=["v3", "v3-1.2", "proxyless"])
def test_widths(model, widths, hidden):
  assert [model.channels(s) for s in (0, *model.stages)] == widths
  assert model.hidden(1) == tuple(hidden)


@pytest.mark.parametrize("model, strides", [
  (MobileNetV3(10), [4, 8, 16, 16, 32]),
  (MobileNetV3(10, stem_stride=1, strides=(1, 1, 2, 2, 1, 2)), [1, 2, 4, 4, 8]),
  (ProxylessNAS(10), [4, 8, 16, 16, 32, 32]), (ResNet50D(10), [4, 8, 16, 32])],
  ids=["v3", "small", "proxyless", "resnet"])
def test_total_strides(model, strides):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, taps=True)[0], images)
  assert [64 // t.shape[2] for t in outputs["taps"]] == strides
  assert outputs["logits"].shape == (1, 10)


@pytest.mark.parametrize("make, message", [
  (lambda: MobileNet(3, widths=(8,)), "allowed are a fixed block and 1 to 6 stages"),
  (lambda: MobileNet(3, strides=(1, 2)), r"strides=\(1, 2\) has 2 entries; widths has 6"),
  (lambda: SMALL.clone(kernel_2=4), "kernel_2=4; allowed are odd sizes"),
  (lambda: SMALL.clone(stem_activation="gelu"), "unknown activation 'gelu'"),
  (lambda: SMALL.sizes(Subnet(layers_2=(1, 2))), "layers_2 leaves out block 0"),
  (lambda: SMALL.sizes(Subnet(expand_3=2)), "unknown axis of MobileNet 'expand_3'"),
  (lambda: RESNET.clone(layers_0=3), "layers_0=3; allowed are 1 and 2"),
  (lambda: RESNET.sizes(Subnet(kernel_1=3)), "unknown axis of ResNet50D 'kernel_1'")])
def test_what_is_wrong_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_odd_sides_are_averaged_over_what_is_there():
  x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
  np.testing.assert_allclose(c.average(x, 2)[0, :, :, 0], [[2, 3.5], [6.5, 8]])
