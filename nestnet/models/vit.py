"""Vision transformer (Dosovitskiy et al., 2010.11929), pre-norm, in plain linen."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import axes
from nestnet.errors import UserError, one_of
from nestnet.models.layers import Linear, attention, layer_norm, residual
from nestnet.models.stack import stack
from nestnet.subnet import Size


class ViT(nn.Module):
  """Images `[batch, height, width, channels]` to `logits` and `features`.

  `layers`, `embed`, `heads`, `mlp` and `features` are the axes along which it nests. `heads` and
  `mlp` may be tuples with one size a layer.

  Attributes:
    layers: Number of blocks.
    embed: Width of the residual stream.
    heads: Attention heads.
    mlp: Width of the hidden layer of the MLP.
    classes: Number of classes; 0 for a backbone without a head.
    patch: Side of a square patch, in pixels.
    head_dim: Width of a head; `embed // heads` by default, and kept by `clone`.
    features: How many leading features the classifier reads, a space of its own; None: all.
    pool: `"mean"` over tokens, or a class `"token"`.
    position_std: Standard deviation of the learned positions at the start. Small values leave
      tiny networks at chance for hundreds of steps.
    drop_path: Rate of dropping a residual branch in the last block; earlier ones drop in
      proportion to their depth (Huang et al., 1603.09382).
    dropout: Rate of dropout on the output of each residual branch.
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over layers.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  layers: int
  embed: int
  heads: Size
  mlp: Size
  classes: int
  patch: int = 4
  head_dim: int | None = None
  features: int | None = None
  pool: str = "mean"
  position_std: float = 0.3
  drop_path: float = 0.0
  dropout: float = 0.0
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    counts = {"patch": self.patch, "embed": self.embed, "heads": self.heads, "layers": self.layers}
    for field, value in counts.items():
      if isinstance(value, int) and value < 1:
        raise UserError(f"ViT: {field}={value}; allowed is at least 1")
    if not 0 <= self.drop_path < 1 or not 0 <= self.dropout < 1:
      raise UserError(f"ViT: drop_path={self.drop_path}, dropout={self.dropout}; allowed is [0, 1)")
    if self.head_dim is None:
      if isinstance(self.heads, tuple) or self.embed % self.heads:
        raise UserError(f"ViT: embed={self.embed} does not divide into heads={self.heads}; "
                        "give head_dim")
      object.__setattr__(self, "head_dim", self.embed // self.heads)
    if self.pool not in ("mean", "token"):
      raise one_of("pool", self.pool, ("mean", "token"))
    if self.features is not None and self.features > self.embed:
      raise UserError(f"ViT: features={self.features} is more than embed={self.embed}")
    super().__post_init__()

  @property
  def tied_axes(self) -> tuple[tuple[str, ...], ...]:
    """Axes whose units are the same, shorter ones being leading parts of the first."""
    return (("embed", "features"),) if self.features else ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False
               ) -> dict[str, Any]:
    """Applies the network.

    Args:
      images: `[batch, height, width, channels]`.
      train: Whether dropout and drop path are on; they use the `dropout` rng.
      taps: Whether to return every block's output.

    Returns:
      `logits` `[batch, classes]`, `features` `[batch, features]`, `tokens`
      `[batch, tokens, embed]`, and with `taps` the blocks' outputs
      `[layers, batch, tokens, embed]`.

    Raises:
      ValueError: The image does not divide into patches.
    """
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = Linear("patch_height patch_width channels -> embed", (self.embed,), name="patch", **dtypes)(
      self._patches(images))
    if self.pool == "token":
      cls = self.param("token", axes(nn.initializers.zeros, "-> 1 embed"), (1, self.embed),
                       self.param_dtype)
      cls = jnp.broadcast_to(cls, (len(x), 1, self.embed))
      x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
    positions = self.param(
      "positions", axes(nn.initializers.normal(self.position_std), "-> tokens embed"),
      x.shape[1:], self.param_dtype)
    # The sum over the batch of their derivative is of their own type.
    x = (x + jnp.broadcast_to(positions, x.shape)).astype(x.dtype)

    rates = [self.drop_path * (i + 1) / self.layers for i in range(self.layers)]
    parts = {
      "attention": functools.partial(Attention, head_dim=self.head_dim, dropout=self.dropout, **dtypes),
      "mlp": functools.partial(MLP, dropout=self.dropout, **dtypes)}
    x, outputs = stack(
      parts, x, layers=self.layers,
      sizes={"attention": {"heads": self.heads}, "mlp": {"mlp": self.mlp}}, remat=self.remat,
      constants={"drop_path": rates} if self.drop_path else None, taps=taps, unroll=self.unroll,
      train=train)

    x = layer_norm("norm", **dtypes)(x)
    features = (x[:, 0] if self.pool == "token" else x.mean(axis=1))[:, :self.features]
    result = {"features": features, "tokens": x}
    if self.classes:
      names = "features -> classes" if self.features else "embed -> classes"
      result["logits"] = Linear(names, (self.classes,), name="head", **dtypes)(features)
    return result | ({"taps": outputs} if taps else {})

  def _patches(self, images):
    batch, height, width, channels = images.shape
    p = self.patch
    if height % p or width % p:
      raise UserError(f"ViT: an image of {height} x {width} does not divide into patches of {p}")
    x = images.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, p, p, channels)


class Attention(nn.Module):
  """Self-attention on a residual branch; `[batch, tokens, embed]` to the same."""

  heads: int
  head_dim: int
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = layer_norm("norm", **dtypes)(x)
    # Heads lead, so that a mesh which shards them shards the projection's columns.
    qkv = Linear(
      "embed -> heads 3 head_dim", (self.heads, 3, self.head_dim), name="qkv", **dtypes)(y)
    y = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
    y = Linear("heads head_dim -> embed", x.shape[-1:], name="out", **dtypes)(y)
    return x + residual(self, y, constants, self.dropout, train)


class MLP(nn.Module):
  """Two projections on a residual branch; `[batch, tokens, embed]` to the same."""

  mlp: int
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = layer_norm("norm", **dtypes)(x)
    y = nn.gelu(Linear("embed -> mlp", (self.mlp,), name="up", **dtypes)(y))
    y = Linear("mlp -> embed", x.shape[-1:], name="down", **dtypes)(y)
    return x + residual(self, y, constants, self.dropout, train)
