"""Networks whose images are hidden in part: what stands under a mask is not seen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet.errors import UserError
from nestnet.models.layers import on_grid
from nestnet.models.resnet import ResNet
from nestnet.models.swin import Swin
from nestnet.models.vit import ViT

RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(2, 8, 8, 1)).astype(np.float32)
# 4 x 4 cells of 2 x 2 pixels.
MASK = RNG.random((2, 16)) < 0.4
NETS = {
  "vit": ViT(layers=1, embed=8, heads=2, mlp=8, classes=0, patch=2, pool="token", masked=True),
  "swin": Swin(0, embed=8, layers_1=1, layers_2=1, multiples=(1, 2), head_dim=4, window=2, patch=1, masked=True),
  "resnet": ResNet(0, layers_1=1, layers_2=1, widths=(8, 16), strides=(1, 2), width=4, stem=4, stem_kernel=1,
                   stem_stride=1, pool=False, group=2, masked=True)}


@functools.cache
def variables(name):
  rng, init = np.random.default_rng(0), lambda key: meta.unbox(NETS[name].init(key, IMAGES))
  params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype(x.dtype),
                        jax.eval_shape(init, jax.random.key(0))["params"])
  rest = jax.jit(lambda key: {k: v for k, v in init(key).items() if k != "params"})(jax.random.key(0))
  return rest | {"params": params}


@functools.cache
def tokens(name):
  apply = jax.jit(NETS[name].apply)
  return lambda images, mask=None: np.asarray(apply(variables(name), images, mask=mask)["tokens"])


@pytest.mark.parametrize("name", NETS)
def test_what_is_hidden_is_not_seen(name):
  # The normalisation of a ResNet's stem sees all positions: there the image is hidden whole.
  mask = MASK if name != "resnet" else np.ones_like(MASK)
  hidden = np.broadcast_to(on_grid(mask[..., None], (8, 8)), IMAGES.shape)
  others = RNG.normal(size=IMAGES.shape).astype(np.float32)
  seen = tokens(name)(IMAGES, mask)
  np.testing.assert_array_equal(seen, tokens(name)(np.where(hidden, others, IMAGES), mask))
  assert not np.allclose(seen, tokens(name)(IMAGES), atol=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_what_is_not_hidden_is_seen(name):
  hidden = on_grid(MASK[..., None], (8, 8))
  others = RNG.normal(size=IMAGES.shape).astype(np.float32)
  found, changed = tokens(name)(IMAGES, MASK), tokens(name)(np.where(hidden, IMAGES, others), MASK)
  assert not np.allclose(found, changed, atol=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_an_image_without_a_mask_is_seen_whole(name):
  plain = NETS[name].clone(masked=False)
  params = {k: v for k, v in variables(name)["params"].items() if k != "mask"}
  assert len(params) == len(variables(name)["params"]) - 1
  whole = jax.jit(plain.apply)(variables(name) | {"params": params}, IMAGES)["tokens"]
  np.testing.assert_array_equal(tokens(name)(IMAGES), whole)
  with pytest.raises(UserError, match=f"{type(plain).__name__}: a mask was given.*model.masked=True"):
    plain.apply(variables(name) | {"params": params}, IMAGES, mask=MASK)


@pytest.mark.parametrize("cells, shape", [(15, (8, 8)), (9, (8, 8)), (16, (8, 6))])
def test_cells_that_do_not_go_with_a_map_are_refused(cells, shape):
  with pytest.raises(UserError, match=f"{cells} cells on a map of {shape[0]} x {shape[1]}"):
    on_grid(jnp.zeros((1, cells, 1)), shape)
