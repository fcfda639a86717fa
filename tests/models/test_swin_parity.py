"""Swin computes what that of `transformers` computes with the same weights."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

from nestnet.models.swin import Swin

pytestmark = pytest.mark.interop

MODEL = Swin(0, embed=8, layers_1=2, layers_2=3, layers_3=2, expand_1=2, expand_2=2, expand_3=2,
             multiples=(1, 2, 4), head_dim=4, window=4, patch=2, pad=True)


def network(size):
  """Theirs for images of a size, with our activation and epsilon, and weights that are random everywhere."""
  import torch
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import SwinConfig, SwinModel
  made = SwinModel(SwinConfig(
    image_size=size, patch_size=2, num_channels=3, embed_dim=8, depths=[2, 3, 2], num_heads=[2, 4, 8], window_size=4,
    mlp_ratio=2, hidden_act="gelu_new")).eval()
  rng = np.random.default_rng(1)
  for module in made.modules():
    if isinstance(module, torch.nn.LayerNorm):
      module.eps = 1e-6
  with torch.no_grad():
    for weight in made.parameters():
      weight.copy_(torch.from_numpy((0.3 * rng.normal(size=tuple(weight.shape))).astype(np.float32)))
  return made


def converted(state):
  """Our parameters from theirs."""
  def norm(key, shape=(-1,)):
    return {"scale": state[f"{key}.weight"].reshape(shape), "bias": state[f"{key}.bias"].reshape(shape)}

  def linear(key):
    return {"kernel": state[f"{key}.weight"].T, "bias": state[f"{key}.bias"]}

  def layer(key, heads):
    own = f"{key}.attention"
    qkv = [linear(f"{own}.{name}_proj") for name in "qkv"]
    split = lambda leaves: np.stack([x.reshape(*x.shape[:-1], heads, 4) for x in leaves], -2)
    out = linear(f"{own}.o_proj")
    return {
      "attention": {
        "norm": norm(f"{key}.layernorm_before"),
        "rel_pos": next(x for name, x in state.items()
                        if name.startswith(own) and name.endswith("relative_position_bias_table")),
        "qkv": {part: split([x[part] for x in qkv]) for part in ("kernel", "bias")},
        "out": {"kernel": out["kernel"].reshape(heads, 4, -1), "bias": out["bias"]}},
      "mlp": {"norm": norm(f"{key}.layernorm_after"), "up": linear(f"{key}.mlp.fc1"),
              "down": linear(f"{key}.mlp.fc2")}}

  patch = "embeddings.patch_embeddings.projection"
  params = {"patch": {"kernel": state[f"{patch}.weight"].transpose(2, 3, 1, 0), "bias": state[f"{patch}.bias"]},
            "patch_norm": norm("embeddings.norm"), "norm": norm("layernorm")}
  for s in MODEL.stages:
    key = f"encoder.layers.{s - 1}"
    layers = [layer(f"{key}.blocks.{i}", MODEL.heads(s)) for i in range(getattr(MODEL, f"layers_{s}"))]
    params[f"stage_{s}"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    if s < len(MODEL.stages):
      reduction = state[f"{key}.downsample.reduction.weight"].T
      params[f"merge_{s}"] = {"norm": norm(f"{key}.downsample.norm", (4, -1)),
                              "reduce": {"kernel": reduction.reshape(4, -1, reduction.shape[-1])}}
  return params


# Maps of 16, 8 and 4 positions a side in windows of 4; of 20, 10 and 5, of which the last two are filled up.
@pytest.mark.parametrize("size", [32, 40])
def test_tokens_and_features_are_theirs(size):
  import torch
  theirs = network(size)
  images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
  params = converted({name: x.numpy() for name, x in theirs.state_dict().items()})
  constants = jax.jit(lambda key: MODEL.init(key, images)["constants"])(jax.random.key(0))
  found = jax.jit(MODEL.apply)({"params": params, "constants": constants}, images)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  assert np.ptp(expected.pooler_output.numpy()) > 0.1
  np.testing.assert_allclose(found["tokens"], expected.last_hidden_state.numpy(), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(found["features"], expected.pooler_output.numpy(), rtol=1e-3, atol=1e-4)
