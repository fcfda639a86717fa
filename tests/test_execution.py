"""Supernets: what goes together, and a member alone equal to the member in place."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nestnet
from nestnet import Space, Subnet
from nestnet.axes import axes
from nestnet.execution import Supernet
from nestnet.models.vit import ViT

IMAGES = np.random.default_rng(9).normal(size=(2, 8, 8, 1)).astype(np.float32)
INPUT = (jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype),)
MODEL = ViT(layers=3, embed=16, heads=4, mlp=16, classes=3, head_dim=4, drop_path=0.2, pool="token",
            features=16)
SPACE = Space(layers=(1, 2, 3), embed=(8, 16), heads=(2, 4), mlp=(8, 16), features=(4, 16),
              groups={"mlp": 2, "heads": 2}, pool=("layers=2,features=4", ""))
NET = Supernet(MODEL, SPACE, INPUT)
MEMBERS = ["layers=1,embed=8,heads=2,mlp=8,features=4",
           "layers=+2,embed=16,heads=2,mlp=16,features=16",
           "layers=0+2,embed=8,heads=4:2,mlp=8:16,features=4"]

ALONE = """
import sys
import jax, numpy as np, nestnet
images, out, *folders = sys.argv[1:]
logits = {}
for folder in folders:
  module, variables = nestnet.load(folder)
  logits[str(len(logits))] = jax.jit(lambda v, x: module.apply(v, x)["logits"])(
    variables, np.load(images))
np.savez(out, **logits)
"""


@functools.cache
def variables():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), NET.shapes)


@functools.cache
def in_place(text):
  subnet = Subnet.parse(text)
  apply = lambda v, x: NET.module(subnet).apply(NET.cut(v, subnet), x)["logits"]
  return np.asarray(jax.jit(apply)(variables(), IMAGES))


@pytest.mark.parametrize("text", MEMBERS)
def test_extracted_equals_in_place_bit_for_bit(text):
  module, small = nestnet.extract(MODEL, variables(), Subnet.parse(text), *INPUT,
                                  groups=SPACE.groups)
  alone = jax.jit(lambda v, x: module.apply(v, x)["logits"])(small, IMAGES)
  assert np.ptp(in_place(text)) > 0.1
  np.testing.assert_array_equal(alone, in_place(text))
  jax.tree.map(np.testing.assert_array_equal, small, NET.cut(variables(), Subnet.parse(text)))


def test_extracted_equals_in_place_in_a_fresh_process(tmp_path):
  folders = []
  for i, text in enumerate(MEMBERS[1:]):
    folders.append(tmp_path / str(i))
    nestnet.save(folders[-1], *nestnet.extract(MODEL, variables(), Subnet.parse(text), *INPUT,
                                               groups=SPACE.groups))
  np.save(tmp_path / "images.npy", IMAGES)
  root = pathlib.Path(nestnet.__file__).parents[1]
  subprocess.run(
    [sys.executable, "-c", ALONE, tmp_path / "images.npy", tmp_path / "logits.npz", *folders],
    check=True, cwd=tmp_path, env=os.environ | {
      "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"})
  with np.load(tmp_path / "logits.npz") as logits:
    for i, text in enumerate(MEMBERS[1:]):
      np.testing.assert_array_equal(logits[str(i)], in_place(text))


def test_groups_choose_other_units_than_prefixes():
  grouped = nestnet.extract(MODEL, variables(), Subnet(mlp=8), *INPUT, groups={"mlp": 2})[1]
  kernel = variables()["params"]["blocks"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(grouped["params"]["blocks"]["mlp"]["up"]["kernel"],
                                kernel[..., [0, 1, 2, 3, 8, 9, 10, 11]])


def test_fresh_variables_have_the_shapes_that_are_told():
  told = jax.eval_shape(NET.init, jax.random.key(0))
  assert jax.tree.map(lambda a: (a.shape, a.dtype), told) == jax.tree.map(
    lambda a: (a.shape, a.dtype), NET.shapes)
  assert jax.tree.structure(told) == jax.tree.structure(variables())


def test_a_subnet_is_an_ordinary_module():
  subnet = Subnet(layers=(0, 2), embed=8, heads=(2, 4), features=4)
  assert NET.module(subnet) == MODEL.clone(layers=2, embed=8, heads=(2, 4), features=4)


@pytest.mark.parametrize("space, message", [
  (dict(layers=(1, 3), depth=(1,)), "unknown axis of ViT 'depth'.*Allowed: layers, embed"),
  (dict(layers=(1, 2)), "largest of the space has layers=2, the model has 3"),
  (dict(layers=(1, 3), mlp=(8, 32)), "mlp=32, the model has 16"),
  (dict(couple={"layers embed": ((3, 16), (4, 8))}), "does not contain layers=4"),
  (dict(embed=(8, 16), features=(4, 16), pool=("embed=8,features=16",)),
   "features=16 is more than embed=8")])
def test_a_space_that_does_not_fit_its_model_is_refused(space, message):
  with pytest.raises(ValueError, match=message):
    Supernet(MODEL, Space(**space), INPUT)


class Derived(nn.Module):
  """A module that derives a size from another, so that a slice is not what it makes."""

  mlp: int

  @nn.compact
  def __call__(self, x):
    ones = nn.initializers.ones
    gate = self.param("gate", axes(ones, "-> half"), (self.mlp // 2,))
    up = self.param("up", axes(ones, "embed -> mlp"), (x.shape[-1], self.mlp))
    down = self.param("down", axes(ones, "mlp -> embed"), (self.mlp, 3)) if self.mlp > 4 else 1.0
    return {"logits": x @ up * gate.sum() * jnp.sum(down)}


@pytest.mark.parametrize("sizes, message", [
  ((6, 8), r"sub-network mlp=6: .*gate.* of the module is \[3\], the slice is \[4\]"),
  ((4, 8), "sub-network mlp=4: the module and the slice have other params")])
def test_a_slice_that_is_not_what_the_small_module_makes_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    Supernet(Derived(8), Space(mlp=sizes), (jax.ShapeDtypeStruct((1, 3), jnp.float32),))
