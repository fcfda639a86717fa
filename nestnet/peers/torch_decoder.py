"""The nested decoder in eager PyTorch: the function of `nestnet.models.decoder.Decoder`, its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nestnet.models.decoder import Decoder
from nestnet.models.rotary import frequencies
from nestnet.peers.torch_arrays import Params, each_layer, layers_of, matrix, parameter
from nestnet.subnet import Subnet, kept_ids


class TorchDecoder(nn.Module):
  """The largest network; a forward pass runs one of its members.

  Args:
    model: The supernet in JAX.
    params: Its parameters.
  """

  def __init__(self, model: Decoder, params: Params):
    super().__init__()
    self.model = model
    self.embedding = parameter(params["embedding"]["embedding"])
    self.blocks = nn.ModuleList(Block(model, layer) for layer in layers_of(params["blocks"], model.layers))
    self.norm = parameter(params["norm"]["scale"])
    self.head_weight = None if model.tied else parameter(matrix(params["head"]["kernel"], 1))
    angles = frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
    turn = np.arange(model.context)[:, None] * np.concatenate([angles, angles])
    self.register_buffer("cos", torch.from_numpy(np.cos(turn).astype(np.float32)), persistent=False)
    self.register_buffer("sin", torch.from_numpy(np.sin(turn).astype(np.float32)), persistent=False)

  @staticmethod
  def example(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the next ones."""
    return batch["tokens"][:, :-1].long(), batch["tokens"][:, 1:].flatten().long()

  @staticmethod
  def lacks(model: Decoder) -> list[tuple[str, str]]:
    """What of a model this file has not, and what is allowed instead."""
    if model.layer_dropout:
      return [(f"config.model: got layer_dropout={model.layer_dropout}", "0.0")]
    if any(isinstance(getattr(model, axis), tuple) for axis in ("heads", "kv_heads", "mlp")):
      return [("config.model: got sizes of each layer", "one size for all layers")]
    return []

  def forward(self, tokens: torch.Tensor, member: Subnet) -> torch.Tensor:
    """Tokens `[batch, length]` to the logits `[batch, length, vocab]` of a member."""
    model, chosen = self.model, member.chosen
    embed = chosen.get("embed", model.embed)
    layers = kept_ids(chosen.get("layers", model.layers))
    heads, kv_heads, mlp = (each_layer(chosen.get(axis, getattr(model, axis)), layers)
                            for axis in ("heads", "kv_heads", "mlp"))
    table = self.embedding[:, :embed]
    x = F.embedding(tokens, table)
    length = tokens.shape[1]
    turn = self.cos[:length], self.sin[:length]
    for i, h, g, m in zip(layers, heads, kv_heads, mlp):
      x = self.blocks[i](x, turn, g, h // g, m)
    x = F.rms_norm(x, (embed,), self.norm[:embed], model.norm_eps)
    return F.linear(x, table if model.tied else self.head_weight[:, :embed])


class Block(nn.Module):
  """Attention and SwiGLU, each on a residual branch."""

  def __init__(self, model: Decoder, params: Params):
    super().__init__()
    attention, mlp = params["attention"], params["mlp"]
    self.head_dim, self.eps = model.head_dim, model.norm_eps
    self.attention_norm, self.mlp_norm = (parameter(part["norm"]["scale"]) for part in (attention, mlp))
    # `[kv_heads, queries, head_dim, embed]`: a member takes leading groups and leading heads of each.
    self.q_weight = parameter(np.moveaxis(np.asarray(attention["q"]["kernel"]), 0, -1))
    self.k_weight, self.v_weight = (
      parameter(np.moveaxis(np.asarray(attention[name]["kernel"]), 0, -1)) for name in "kv")
    self.out_weight = parameter(np.moveaxis(np.asarray(attention["out"]["kernel"]), -1, 0))
    biases = {name: attention[name].get("bias") for name in ("q", "k", "v", "out")}
    for name, bias in biases.items():
      setattr(self, f"{name}_bias", None if bias is None else parameter(bias))
    for name in ("q_norm", "k_norm"):
      setattr(self, name, parameter(attention[name]["scale"]) if name in attention else None)
    self.gate_weight, self.up_weight, self.down_weight = (
      parameter(matrix(mlp[name]["kernel"], 1)) for name in ("gate", "up", "down"))

  def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], groups: int, queries: int,
              mlp: int) -> torch.Tensor:
    """Tokens `[batch, length, embed]` to the same, with so many groups, heads in each, and hidden units."""
    batch, length, embed = x.shape
    y = F.rms_norm(x, (embed,), self.attention_norm[:embed], self.eps)
    heads = groups * queries
    q = self._project(y, self.q_weight[:groups, :queries, :, :embed], self.q_bias, (groups, queries))
    k = self._project(y, self.k_weight[:groups, :, :embed], self.k_bias, (groups,))
    v = self._project(y, self.v_weight[:groups, :, :embed], self.v_bias, (groups,))
    if self.q_norm is not None:
      q = F.rms_norm(q, (self.head_dim,), self.q_norm, self.eps)
      k = F.rms_norm(k, (self.head_dim,), self.k_norm, self.eps)
    q, k = rotated(q, turn), rotated(k, turn)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = y.transpose(1, 2).reshape(batch, length, heads * self.head_dim)
    out = self.out_weight[:embed, :groups, :queries].reshape(embed, -1)
    x = x + F.linear(y, out, None if self.out_bias is None else self.out_bias[:embed])
    y = F.rms_norm(x, (embed,), self.mlp_norm[:embed], self.eps)
    y = F.silu(F.linear(y, self.gate_weight[:mlp, :embed])) * F.linear(y, self.up_weight[:mlp, :embed])
    return x + F.linear(y, self.down_weight[:embed, :mlp])

  def _project(self, y, weight, bias, kept):
    """`[batch, heads, length, head_dim]`, heads being those of all groups."""
    if bias is not None:
      bias = bias[tuple(slice(size) for size in kept)].reshape(-1)
    made = F.linear(y, weight.reshape(-1, y.shape[-1]), bias)
    return made.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotated(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
  """Heads `[batch, heads, length, head_dim]` turned by the positions 0 to `length - 1`."""
  cos, sin = turn
  a, b = x.chunk(2, -1)
  return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)
