"""The nested vision transformer in eager PyTorch: the function of `nestnet.models.vit.ViT`, its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nestnet.models.vit import ViT
from nestnet.peers.torch_arrays import Params, each_layer, layers_of, matrix, parameter
from nestnet.subnet import Subnet, kept_ids


class TorchViT(nn.Module):
  """The largest network; a forward pass runs one of its members.

  Args:
    model: The supernet in JAX.
    params: Its parameters.
  """

  def __init__(self, model: ViT, params: Params):
    super().__init__()
    self.model = model
    self.patch_weight = parameter(matrix(params["patch"]["kernel"], 3))
    self.patch_bias = parameter(params["patch"]["bias"])
    self.positions = parameter(params["positions"])
    self.token = parameter(params["token"]) if model.pool == "token" else None
    self.blocks = nn.ModuleList(Block(model.head_dim, layer) for layer in layers_of(params["blocks"], model.layers))
    self.norm = Norm(params["norm"])
    self.head_weight = parameter(matrix(params["head"]["kernel"], 1))
    self.head_bias = parameter(params["head"]["bias"])

  @staticmethod
  def example(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and their labels."""
    return batch["image"], batch["label"].long()

  @staticmethod
  def lacks(model: ViT) -> list[tuple[str, str]]:
    """What of a model this file has not, and what is allowed instead."""
    if not model.classes:
      return [("config.model: got ViT without classes", "ViT with classes")]
    if model.drop_path or model.dropout:
      return [(f"config.model: got drop_path={model.drop_path}, dropout={model.dropout}", "0.0 for both")]
    return []

  def forward(self, images: torch.Tensor, member: Subnet) -> torch.Tensor:
    """Images `[batch, height, width, channels]` to the logits `[batch, classes]` of a member."""
    model, chosen = self.model, member.chosen
    embed = chosen.get("embed", model.embed)
    layers = kept_ids(chosen.get("layers", model.layers))
    heads, mlp = (each_layer(chosen.get(axis, getattr(model, axis)), layers) for axis in ("heads", "mlp"))
    x = F.linear(self._patches(images), self.patch_weight[:embed], self.patch_bias[:embed])
    if self.token is not None:
      x = torch.cat([self.token[:, :embed].to(x.dtype).expand(len(x), 1, embed), x], 1)
    x = x + self.positions[:, :embed].to(x.dtype)
    for i, h, m in zip(layers, heads, mlp):
      x = self.blocks[i](x, h, m)
    x = self.norm(x)
    features = (x[:, 0] if self.token is not None else x.mean(1))[:, :chosen.get("features", model.features)]
    return F.linear(features, self.head_weight[:, :features.shape[1]], self.head_bias)

  def _patches(self, images):
    batch, height, width, channels = images.shape
    p = self.model.patch
    x = images.reshape(batch, height // p, p, width // p, p, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, p * p * channels)


class Block(nn.Module):
  """Attention and an MLP, each on a residual branch."""

  def __init__(self, head_dim: int, params: Params):
    super().__init__()
    attention, mlp = params["attention"], params["mlp"]
    self.head_dim = head_dim
    self.attention_norm, self.mlp_norm = Norm(attention["norm"]), Norm(mlp["norm"])
    qkv = np.asarray(attention["qkv"]["kernel"])
    # `[3, heads * head_dim, embed]`: leading heads are then leading rows of each of the three.
    self.qkv_weight = parameter(qkv.transpose(2, 1, 3, 0).reshape(3, -1, len(qkv)))
    self.qkv_bias = parameter(np.asarray(attention["qkv"]["bias"]).swapaxes(0, 1).reshape(3, -1))
    self.out_weight = parameter(matrix(attention["out"]["kernel"], 2))
    self.out_bias = parameter(attention["out"]["bias"])
    self.up_weight = parameter(matrix(mlp["up"]["kernel"], 1))
    self.up_bias = parameter(mlp["up"]["bias"])
    self.down_weight = parameter(matrix(mlp["down"]["kernel"], 1))
    self.down_bias = parameter(mlp["down"]["bias"])

  def forward(self, x: torch.Tensor, heads: int, mlp: int) -> torch.Tensor:
    """Tokens `[batch, tokens, embed]` to the same, with so many heads and hidden units."""
    batch, tokens, embed = x.shape
    inner = heads * self.head_dim
    weight = self.qkv_weight[:, :inner, :embed].reshape(3 * inner, embed)
    qkv = F.linear(self.attention_norm(x), weight, self.qkv_bias[:, :inner].reshape(-1))
    q, k, v = qkv.view(batch, tokens, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, inner)
    x = x + F.linear(y, self.out_weight[:embed, :inner], self.out_bias[:embed])
    y = F.linear(self.mlp_norm(x), self.up_weight[:mlp, :embed], self.up_bias[:mlp])
    y = F.gelu(y, approximate="tanh")
    return x + F.linear(y, self.down_weight[:embed, :mlp], self.down_bias[:embed])


class Norm(nn.Module):
  """LayerNorm over the width of its input."""

  def __init__(self, params: Params):
    super().__init__()
    self.scale, self.bias = parameter(params["scale"]), parameter(params["bias"])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), self.scale[:width], self.bias[:width], 1e-6)
