"""What the authors' POA vision transformer computes, on weights filled by a rule."""

from __future__ import annotations

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet.axes import variable_axes
from nestnet.errors import UserError
from nestnet.execution import cut, extract, module_of
from nestnet.interop import poa
from nestnet.subnet import kept_ids

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "poa"
PIXELS = np.random.default_rng(7).standard_normal((2, 3, 32, 32)).astype(np.float32)
IMAGES = jnp.asarray(PIXELS.transpose(0, 2, 3, 1))
INPUT = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
CASES = json.loads((FIXTURES / "vit_cases.json").read_text())


def filled(name, shape):
  """The filling rule of the fixtures."""
  a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith("bias") or "pos_embed" in name or "token" in name:
    a = 0.1 * a
  elif len(shape) == 1:
    a = 1 + 0.2 * a
  else:
    a = a * np.sqrt(1 / np.prod(shape[1:]))
  return a.astype(np.float32)


@functools.cache
def state():
  return {name: filled(name, shape) for name, shape in json.loads((FIXTURES / "vit_keys.json").read_text()).items()}


@functools.cache
def supernet():
  """The model, its variables and their names."""
  model = poa.vit(state(), head_dim=32)
  return model, poa.load(model, state()), variable_axes(model, INPUT)


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
                         ids=lambda case: f"{case['embed']}x{case['layers']}")
def test_features_are_those_of_the_authors_network(case):
  model, variables, axes = supernet()
  member = poa.subnet(model, case["embed"], case["layers"])
  assert list(kept_ids(member.chosen["layers"])) == case["blocks"]
  apply = jax.jit(lambda v, x: module_of(model, member).apply(v, x))
  outputs = apply(cut(model, variables, axes, member), IMAGES)
  np.testing.assert_allclose(outputs["features"], case["cls"], rtol=1e-4, atol=1e-4)
  patches = outputs["tokens"][:, 1:]
  np.testing.assert_allclose(patches.mean((1, 2)), case["patch_mean"], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(patches.std((1, 2)), case["patch_std"], rtol=1e-4, atol=1e-4)
  module, small = extract(model, variables, member, INPUT)
  alone = jax.jit(module.apply)(small, IMAGES)
  np.testing.assert_array_equal(alone["features"], outputs["features"])
  np.testing.assert_array_equal(alone["tokens"], outputs["tokens"])


def test_a_state_dict_that_does_not_fit_is_told_by_its_tensors(tmp_path):
  model, _, _ = supernet()
  wrong = {**state(), "norm.norm.weight": np.zeros(7, np.float32), "head.weight": np.zeros(1, np.float32)}
  del wrong["blocks.3.ls1.gamma"]
  with pytest.raises(UserError, match=r"(?s)missing.*blocks.3.ls1.gamma.*not known.*head.weight.*norm.norm.weight: "
                                      r"got \[7\], expected \[192\]"):
    poa.load(model, wrong)
  with pytest.raises(UserError, match="head_dim=40"):
    poa.vit(state(), head_dim=40)
  with pytest.raises(UserError, match="multiples of 32 up to 192"):
    poa.subnet(model, 80, 4)
  prefixed = {f"backbone.{name}": array for name, array in state().items()}
  jax.tree.map(np.testing.assert_array_equal, poa.load(model, prefixed), supernet()[1])
