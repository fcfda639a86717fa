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
from nestnet.execution import cut, extract, module_of
from nestnet.interop import ofa
from nestnet.models.mobilenet_v3 import MobileNetV3
from nestnet.models.resnet50d import ResNet50D

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


def test_every_wrong_tensor_is_listed():
  state = {key: np.zeros(shape, np.float32) for key, shape in read("mbv3_keys").items()}
  del state["blocks.7.conv.depth_conv.se.fc.reduce.bias"]
  state["classifier.linear.weight"] = np.zeros((1000, 1280), np.float32)
  state["extra.weight"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError) as error:
    ofa.load(MODELS["mbv3"], state)
  assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
    "missing: blocks.7.conv.depth_conv.se.fc.reduce.bias", "not known: extra.weight",
    "classifier.linear.weight: shape [1000, 1280], expected [10, 1280]"]
  with pytest.raises(ValueError, match="not known: blocks.1.conv.depth_conv.conv.5to3_matrix"):
    ofa.load(MobileNetV3(10), {key: np.zeros(shape, np.float32) for key, shape in read("mbv3_keys").items()})


def test_descriptions_that_do_not_fit():
  with pytest.raises(ValueError, match="e lists 19 values; allowed are a number and a list of 20"):
    ofa.subnet(MODELS["mbv3"], d=2, e=[3] * 19, ks=7)
  with pytest.raises(ValueError, match="ks is missing"):
    ofa.subnet(MODELS["mbv3"], d=2, e=3)
