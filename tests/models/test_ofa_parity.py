"""What the authors' Once-for-All networks compute, on weights filled by a rule."""

from __future__ import annotations

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.core import meta

from nestnet.axes import variable_axes
from nestnet.cost import count_params, count_tree
from nestnet.evaluators.classification import classification
from nestnet.execution import cut, extract, module_of
from nestnet.interop import ofa
from nestnet.models.big_nas import AttentiveNAS
from nestnet.models.mobilenet_v3 import MobileNetV3
from nestnet.models.proxyless_nas import ProxylessNAS
from nestnet.models.resnet50d import ResNet50D
from nestnet.models.small_mobilenet import SmallMobileNet
from nestnet.models.small_resnet import SmallResNet

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "once_for_all"
MODELS = {"mbv3": MobileNetV3(10, transforms=True), "rn50": ResNet50D(10)}
PIXELS = np.random.default_rng(7).standard_normal((2, 3, 64, 64)).astype(np.float32)
IMAGES = jnp.asarray(PIXELS.transpose(0, 2, 3, 1))
INPUT = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)


def read(name):
  return json.loads((FIXTURES / f"{name}.json").read_text())


def filled(name, shape):
  """The filling rule of the fixtures."""
  a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith("running_var"):
    a = 0.5 + np.abs(a)
  elif name.endswith(("running_mean", "bias")):
    a = 0.1 * a
  elif "_matrix" in name:
    a = np.eye(shape[0]) + 0.1 * a / np.sqrt(shape[0])
  elif len(shape) == 1:
    a = 1 + 0.2 * a
  else:
    a = a * np.sqrt(2 / np.prod(shape[1:]))
  return a.astype(np.float32)


@functools.cache
def supernet(name):
  """The model, its variables and their names."""
  state = {key: filled(key, shape) for key, shape in read(f"{name}_keys").items()}
  return MODELS[name], ofa.load(MODELS[name], state), variable_axes(MODELS[name], INPUT)


def cases():
  for name in MODELS:
    for i, case in enumerate(read(f"{name}_cases")):
      yield pytest.param(name, case, id=f"{name}-{i}")


@pytest.mark.slow
@pytest.mark.parametrize("name, case", list(cases()))
def test_logits_and_parameters_are_those_of_the_authors(name, case):
  model, variables, names = supernet(name)
  subnet = ofa.subnet(model, **case["subnet"])
  module, small = extract(model, variables, subnet, INPUT)
  assert count_tree(small["params"]) == count_params(module, INPUT) == case["params"]
  alone = jax.jit(lambda v: module.apply(v, IMAGES)["logits"])(small)
  in_place = jax.jit(lambda v: module_of(model, subnet).apply(
    cut(model, v, names, subnet), IMAGES)["logits"])(variables)
  np.testing.assert_allclose(alone, case["logits"], rtol=1e-4)
  np.testing.assert_array_equal(in_place, alone)


@pytest.mark.slow
def test_the_axes_of_every_member_are_those_of_its_module():
  model, variables, names = supernet("mbv3")
  subnet = ofa.subnet(model, **read("mbv3_cases")[3]["subnet"])
  assert "to_3" in names["params"]["stage_2"]["rest"]["depthwise"]["conv"]
  shapes = meta.unbox(jax.eval_shape(module_of(model, subnet).init, jax.random.key(0), IMAGES))
  sliced = cut(model, variables, names, subnet)["params"]
  assert jax.tree.map(jnp.shape, sliced) == jax.tree.map(jnp.shape, shapes["params"])


def test_names_of_older_files_are_known():
  keys = read("mbv3_keys")
  old = lambda key: key.replace(".conv.", ".mobile_inverted_conv.", 1).replace(".bn.bn.", ".bn.").replace(
    ".conv.conv.weight", ".conv.weight")
  state = {old(key): np.zeros(shape, np.float32) for key, shape in keys.items()}
  assert set(state) != set(keys)
  ofa.load(MODELS["mbv3"], state | {"first_conv.bn.num_batches_tracked": np.array(0)})


def test_a_safetensors_file(tmp_path):
  keys = read("rn50_keys")
  state = {key: np.full(shape, i % 7, np.float32) for i, (key, shape) in enumerate(keys.items())}
  safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
  jax.tree.map(np.testing.assert_array_equal, ofa.load(MODELS["rn50"], tmp_path / "a.safetensors"),
               ofa.load(MODELS["rn50"], state))
  (tmp_path / "b.pth").write_bytes(b"\x80\x02}q")
  with pytest.raises(ValueError, match="no safetensors file[^$]*torch.load"):
    ofa.load(MODELS["rn50"], tmp_path / "b.pth")
  with pytest.raises(FileNotFoundError):
    ofa.load(MODELS["rn50"], tmp_path / "c")
  with pytest.raises(ValueError, match="is a folder; allowed is a .safetensors file"):
    ofa.load(MODELS["rn50"], tmp_path)
  with pytest.raises(ValueError, match="state is None; allowed are a mapping .* and the path"):
    ofa.load(MODELS["rn50"], None)


def test_wrong_tensors_are_counted_and_listed():
  state = {key: np.zeros(shape, np.float32) for key, shape in read("mbv3_keys").items()}
  del state["blocks.7.conv.depth_conv.se.fc.reduce.bias"]
  state["classifier.linear.weight"] = np.zeros((1000, 1280), np.float32)
  state["extra.weight"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError) as error:
    ofa.load(MODELS["mbv3"], state)
  assert [line.strip() for line in str(error.value).splitlines()] == [
    "the state dict is not that of this MobileNetV3: 1 missing, 1 not known, 1 of another shape",
    "missing: blocks.7.conv.depth_conv.se.fc.reduce.bias", "not known: extra.weight",
    "of another shape: classifier.linear.weight: got [1000, 1280], expected [10, 1280]"]
  with pytest.raises(ValueError, match="40 not known\n  not known: blocks.1.conv.depth_conv.conv.5to3_m"):
    ofa.load(MobileNetV3(10), {key: np.zeros(shape, np.float32) for key, shape in read("mbv3_keys").items()})


def test_of_many_wrong_tensors_the_first_are_listed():
  with pytest.raises(ValueError) as error:
    ofa.load(MODELS["rn50"], {"x": np.zeros(1)})
  first, *lines = str(error.value).splitlines()
  count = len(read("rn50_keys"))
  assert first.endswith(f"ResNet50D: {count} missing, 1 not known")
  assert len(lines) == 10 and lines[8:] == [f"  ... and {count - 8} more missing", "  not known: x"]


def test_statistics_of_the_published_file_do_not_pass_for_a_network_s_own():
  model = MODELS["mbv3"]
  variables = ofa.load(model, {key: np.zeros(shape, np.float32) for key, shape in read("mbv3_keys").items()})
  with pytest.raises(ValueError, match="not calibrated: its 'batch_stats' are those of another network"):
    dict(classification(model, variables, {"image": np.asarray(IMAGES), "label": np.zeros(2, np.int32)}))


def test_descriptions_that_do_not_fit():
  with pytest.raises(ValueError, match="e lists 19 values; allowed are a number and a list of 20"):
    ofa.subnet(MODELS["mbv3"], d=2, e=[3] * 19, ks=7)
  with pytest.raises(ValueError, match="ks is missing"):
    ofa.subnet(MODELS["mbv3"], d=2, e=3)


@pytest.mark.parametrize("name, described, message", [
  ("mbv3", {"d": 9, "e": 3, "ks": 7}, "d=9; allowed are 2, 3, 4"),
  ("mbv3", {"d": [2, 2, 1, 2, 2], "e": 3, "ks": 7}, r"d\[2\]=1; allowed are 2, 3, 4"),
  ("mbv3", {"d": 2, "e": 3, "ks": 4}, "ks=4; allowed are 3, 5, 7"),
  ("mbv3", {"d": 2, "e": [3] * 4 + [5] * 16, "ks": 7}, r"e\[4\]=5; allowed are 3, 4, 6"),
  ("mbv3", {"d": 2, "e": 3, "ks": 7, "w": 0}, "w=0: the authors' MobileNetV3 has no such .* d, e and ks"),
  ("rn50", {"d": 5, "e": 0.2, "w": 0}, "d=5; allowed are 0, 1, 2"),
  ("rn50", {"d": [7, 0, 0, 0, 0], "e": 0.2, "w": 0}, r"d\[0\]=7; allowed are 0, 1, 2"),
  ("rn50", {"d": 0, "e": 3, "w": 0}, "e=3; allowed are 0.2, 0.25, 0.35"),
  ("rn50", {"d": 0, "e": 0.2, "w": 7}, "w=7; allowed are 0, 1, 2"),
  ("rn50", {"d": 0, "e": 0.2, "w": -1}, "w=-1; allowed are 0, 1, 2"),
  ("rn50", {"d": 0, "e": 0.2, "w": 0, "ks": 3}, "ks=3: the authors' ResNet50D has no such .* d, e and w")])
def test_what_was_not_published_is_refused(name, described, message):
  with pytest.raises(ValueError, match=message):
    ofa.subnet(MODELS[name], **described)


def test_what_is_left_out_is_not_read():
  """And a stage of one block has it whatever is asked for, as in the authors' code."""
  small = ofa.subnet(MODELS["mbv3"], d=2, e=[3, 6, 0, 0] * 5, ks=[5, 3, 0, 0] * 5)
  assert small["expand_5"] == (3, 6) and small["kernel_1"] == (5, 3)
  for d in (4, [4] * 5 + [1]):
    assert ofa.subnet(ProxylessNAS(10), d=d, e=3, ks=3)["layers_6"] == 1


@pytest.mark.parametrize("model", [SmallMobileNet(10), SmallResNet(10), AttentiveNAS(10)])
def test_networks_that_were_not_published_are_refused(model):
  message = f"no weights of a {type(model).__name__}; allowed are MobileNetV3, ProxylessNAS, ResNet50D"
  with pytest.raises(ValueError, match=message):
    ofa.load(model, {})
  with pytest.raises(ValueError, match=message):
    ofa.subnet(model, d=2, e=3, ks=3)
