"""Vision transformer (Dosovitskiy et al., 2010.11929), pre-norm, in plain linen."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import axes
from nestnet.errors import UserError, one_of
from nestnet.models.layers import Linear, attention, hide, layer_norm, layer_scaled, residual
from nestnet.models.scaling import check_scaling
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
    layer_scale: Where a factor for each channel begins that multiplies every residual branch (LayerScale,
      2103.17239); 0: none.
    width_scaling: `"ratio"`: kernels of narrower members are multiplied by full over active width of
      what they read, as in POA; `"none"`. The patch projection, which reads pixels, never is.
    masked: Whether a learned token stands for the patches that `mask` names.
    exact_gelu: Whether GELU is computed by the error function, as in PyTorch, or by its approximation.
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
  layer_scale: float = 0.0
  width_scaling: str = "none"
  masked: bool = False
  exact_gelu: bool = False
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
    check_scaling(self.width_scaling)
    super().__post_init__()

  @property
  def representation(self) -> tuple[str, int]:
    """The axis of `features`, and its length."""
    return ("features", self.features) if self.features else ("embed", self.embed)

  @property
  def tied_axes(self) -> tuple[tuple[str, ...], ...]:
    """Axes whose units are the same, shorter ones being leading parts of the first."""
    return (("embed", "features"),) if self.features else ()

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False,
               mask: jax.Array | None = None) -> dict[str, Any]:
    """Applies the network.

    Images of another size than those that it was initialised with have positions interpolated between
    its own, which stand for a square.

    Args:
      images: `[batch, height, width, channels]`.
      train: Whether dropout and drop path are on; they use the `dropout` rng.
      taps: Whether to return every block's output.
      mask: Booleans `[batch, patches]`, rows first: those that the network sees a token in place of; of
        a network that is `masked`.

    Returns:
      `logits` `[batch, classes]`, `features` `[batch, features]`, `tokens`
      `[batch, tokens, embed]`, and with `taps` the blocks' outputs
      `[layers, batch, tokens, embed]`.

    Raises:
      ValueError: The image does not divide into patches, or there is a mask and no token for it.
    """
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = Linear("patch_height patch_width channels -> embed", (self.embed,), name="patch", **dtypes)(
      self._patches(images))
    x = hide(self, x, mask)
    if self.pool == "token":
      cls = self.param("token", axes(nn.initializers.zeros, "-> 1 embed"), (1, self.embed),
                       self.param_dtype)
      cls = jnp.broadcast_to(cls, (len(x), 1, self.embed))
      x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
    positions = self._positions(x.shape[1:], images.shape[1] // self.patch)
    # The sum over the batch of their derivative is of their own type.
    x = (x + jnp.broadcast_to(positions, x.shape)).astype(x.dtype)

    rates = [self.drop_path * (i + 1) / self.layers for i in range(self.layers)]
    shared = dict(dropout=self.dropout, layer_scale=self.layer_scale, scaling=self.width_scaling, **dtypes)
    parts = {
      "attention": functools.partial(Attention, head_dim=self.head_dim, **shared),
      "mlp": functools.partial(MLP, exact_gelu=self.exact_gelu, **shared)}
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
      result["logits"] = Linear(names, (self.classes,), name="head",
                                scaling=self.width_scaling, **dtypes)(features)
    return result | ({"taps": outputs} if taps else {})

  def _positions(self, shape, rows):
    """Learned positions `[tokens, embed]`, for other numbers of patches interpolated between its own."""
    own = shape
    if self.has_variable("params", "positions"):
      own = jax.tree.leaves(self.get_variable("params", "positions"))[0].shape
    init = axes(nn.initializers.normal(self.position_std), "-> tokens embed")
    positions = self.param("positions", init, own, self.param_dtype)
    if own[0] == shape[0]:
      return positions
    lead = int(self.pool == "token")
    side, columns = math.isqrt(own[0] - lead), (shape[0] - lead) // rows
    if side * side != own[0] - lead:
      raise UserError(f"ViT: {shape[0] - lead} patches, and positions of {own[0] - lead}, which are no square; "
                      "allowed are images of the size that it was initialised with")
    grid = positions[lead:].reshape(side, side, -1)
    grid = jax.image.resize(grid, (rows, columns, shape[1]), "cubic", antialias=False)
    return jnp.concatenate([positions[:lead], grid.reshape(-1, shape[1])])

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
  layer_scale: float = 0.0
  scaling: str = "none"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = layer_norm("norm", **dtypes)(x)
    # Heads lead, so that a mesh which shards them shards the projection's columns.
    qkv = Linear(
      "embed -> heads 3 head_dim", (self.heads, 3, self.head_dim), name="qkv", scaling=self.scaling, **dtypes)(y)
    y = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
    y = Linear("heads head_dim -> embed", x.shape[-1:], name="out", scaling=self.scaling, **dtypes)(y)
    y = layer_scaled(self, y)
    return x + residual(self, y, constants, self.dropout, train)


class MLP(nn.Module):
  """Two projections on a residual branch; `[batch, tokens, embed]` to the same."""

  mlp: int
  dropout: float = 0.0
  layer_scale: float = 0.0
  scaling: str = "none"
  exact_gelu: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = layer_norm("norm", **dtypes)(x)
    y = Linear("embed -> mlp", (self.mlp,), name="up", scaling=self.scaling, **dtypes)(y)
    y = nn.gelu(y, approximate=not self.exact_gelu)
    y = Linear("mlp -> embed", x.shape[-1:], name="down", scaling=self.scaling, **dtypes)(y)
    y = layer_scaled(self, y)
    return x + residual(self, y, constants, self.dropout, train)
