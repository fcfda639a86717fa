"""Swin transformer (Liu et al., 2103.14030), pre-norm, in plain linen."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import axes
from nestnet.errors import UserError, one_of
from nestnet.models.layers import Linear, attention, hide, layer_norm, residual
from nestnet.models.scaling import check_scaling
from nestnet.models.stack import constant, stack
from nestnet.space import Space
from nestnet.subnet import Size, Subnet, derived, kept_ids

STAGES = 4


class Swin(nn.Module):
  """Images `[batch, rows, columns, channels]` to `logits` and `features`.

  The width, the depths of the stages and the expansion of each MLP are the axes along which it nests. The
  width is one choice for all stages; `sizes` says how long the axes of the parameters are for it. `expand`
  may be a tuple with one choice a layer. Images may have another size than those that it was initialised
  with.

  By how much a layer shifts its windows is a constant of that layer, so its variables are those of `init`,
  the collection `constants` among them.

  Attributes:
    classes: Number of classes; 0 for a backbone without a head.
    embed: Width of the residual stream in the first stage; those of the others are multiples of it.
    layers_1: Number of layers in the first stage; so for the others. Fields of stages that `multiples`
      does not list are without effect.
    expand_1: Width of the hidden layer of the MLP, in multiples of the stage's.
    multiples: Widths of the stages, in multiples of `embed`; each stage has half the rows and columns of
      the one before.
    head_dim: Width of an attention head, the same in all members; 32 in the paper.
    window: Side of a window, in positions; maps that are smaller are one window.
    pad: Whether maps that windows do not divide are filled up with zeros behind the norm, at the bottom and on
      the right, as the authors' code for detection does (crops of 96 pixels with windows of 7); they are
      attended to like any position. If not, such maps are refused.
    patch: Side of a square patch, in pixels.
    width_scaling: `"ratio"`: kernels of narrower members are multiplied by full over active width of
      what they read, as in POA; `"none"`. The patch projection, which reads pixels, never is.
    masked: Whether a learned token stands for the positions that `mask` names.
    drop_path: Rate of dropping a residual branch in the last layer; earlier ones drop in proportion to
      their depth (Huang et al., 1603.09382).
    dropout: Rate of dropout on the output of each residual branch.
    remat: Whether to recompute layers in the backward pass.
    unroll: Layers in one iteration of the scan over those of a stage.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  classes: int
  embed: int = 96
  layers_1: int = 2
  layers_2: int = 2
  layers_3: int = 6
  layers_4: int = 2
  expand_1: Size = 4
  expand_2: Size = 4
  expand_3: Size = 4
  expand_4: Size = 4
  multiples: tuple[int, ...] = (1, 2, 4, 8)
  head_dim: int = 32
  window: int = 7
  pad: bool = False
  patch: int = 4
  width_scaling: str = "none"
  masked: bool = False
  drop_path: float = 0.0
  dropout: float = 0.0
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    if not 1 <= len(self.multiples) <= STAGES or min(self.multiples) < 1:
      raise UserError(f"Swin: multiples={self.multiples}; allowed are 1 to {STAGES} stages, of at least 1 each")
    for field in ("embed", "head_dim", "window", "patch", *self.choices()):
      value = getattr(self, field)
      if isinstance(value, int) and value < 1:
        raise UserError(f"Swin: {field}={value}; allowed is at least 1")
    if not 0 <= self.drop_path < 1 or not 0 <= self.dropout < 1:
      raise UserError(f"Swin: drop_path={self.drop_path}, dropout={self.dropout}; allowed is [0, 1)")
    check_scaling(self.width_scaling)
    for s in self.stages:
      if self.width(s) % self.head_dim:
        raise UserError(f"Swin: embed={self.embed} gives stage {s} a width of {self.width(s)}, which does not "
                        f"divide into heads of head_dim={self.head_dim}")
    super().__post_init__()

  @property
  def stages(self) -> range:
    """The stages, counted from 1."""
    return range(1, 1 + len(self.multiples))

  def choices(self) -> list[str]:
    """The axes along which it nests."""
    return ["embed", *(f"{axis}_{s}" for axis in ("layers", "expand") for s in self.stages)]

  @property
  def representation(self) -> tuple[str, int]:
    """The axis of `features`, and its length."""
    last = self.stages[-1]
    return f"embed_{last}", self.width(last)

  def width(self, stage: int) -> int:
    """The width of the residual stream in a stage."""
    return self.embed * self.multiples[stage - 1]

  def heads(self, stage: int) -> int:
    """The attention heads of a layer of a stage."""
    return self.width(stage) // self.head_dim

  def hidden(self, stage: int) -> Size:
    """The hidden widths of the MLPs of a stage."""
    return derived(getattr(self, f"expand_{stage}"), lambda expand: expand * self.width(stage))

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network, in every stage.

    Raises:
      ValueError: An axis is no choice of this network, or sizes that do not go together.

    Example:
      >>> sizes = Swin(10).sizes(Subnet(embed=64, layers_3=(0, 3), expand_3=(2, 4)))
      >>> sizes["embed_3"], sizes["heads_3"], sizes["mlp_3"], sizes.chosen["layers_3"]
      (256, 8, (512, 1024), (0, 3))
    """
    for axis in subnet:
      if axis not in self.choices():
        raise one_of("axis of Swin", axis, self.choices())
    small = self.clone(**subnet)
    sizes: dict[str, Any] = {}
    for s in self.stages:
      depth = f"layers_{s}"
      sizes |= {depth: kept_ids(subnet.chosen.get(depth, getattr(self, depth))),
                f"embed_{s}": small.width(s), f"heads_{s}": small.heads(s), f"mlp_{s}": small.hidden(s)}
    return Subnet(**sizes)

  def check_space(self, space: Space) -> None:
    """Raises `ValueError` where a width of a family does not divide into heads."""
    for embed in space.choices("embed") if "embed" in space.axes else ():
      self.clone(embed=embed)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False,
               mask: jax.Array | None = None) -> dict[str, Any]:
    """Applies the network.

    Args:
      images: `[batch, rows, columns, channels]`.
      train: Whether dropout and drop path are on; they use the `dropout` rng.
      taps: Whether to return every layer's output.
      mask: Booleans `[batch, cells]` of a square grid over the image, row by row: those that a network that is
        `masked` sees a token in place of. Each is a square of positions of the first stage.

    Returns:
      `logits` `[batch, classes]`, `features` `[batch, embed]`, `tokens` `[batch, positions, embed]` of the
      last stage, and with `taps` the layers' outputs, for each stage
      `[layers, batch, rows, columns, embed]`.

    Raises:
      ValueError: The image does not divide into patches, a map into windows, cells or for the next stage; there
        is a mask and no token for it; or the variables have no `constants`.
    """
    typed = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    shared = dict(scaling=self.width_scaling, **typed)
    x = squares(images, self.patch, self.patch, "an image of {} does not divide into patches of {}")
    x = Linear("patch_height patch_width channels -> embed_1", (self.width(1),), name="patch", **typed)(x)
    x = hide(self, layer_norm("patch_norm", "embed_1", **typed)(x), mask, "embed_1")
    outputs = []
    for s in self.stages:
      if s > 1:
        x = Merge(s - 1, self.width(s), name=f"merge_{s - 1}", **shared)(x)
      parts = {
        "attention": functools.partial(
          WindowAttention, stage=s, head_dim=self.head_dim, window=self.window, pad=self.pad, dropout=self.dropout,
          **shared),
        "mlp": functools.partial(MLP, stage=s, dropout=self.dropout, **shared)}
      x, tap = stack(
        parts, x, layers=getattr(self, f"layers_{s}"), name=f"stage_{s}", depth=f"layers_{s}",
        sizes={"attention": {"heads": self.heads(s)}, "mlp": {"mlp": self.hidden(s)}},
        constants=self._constants(s), remat=self.remat, taps=taps, unroll=self.unroll, train=train)
      outputs.append(tap)
    last = f"embed_{self.stages[-1]}"
    x = layer_norm("norm", last, **typed)(x).reshape(len(x), -1, x.shape[-1])
    features = x.mean(axis=1)
    result = {"features": features, "tokens": x}
    if self.classes:
      result["logits"] = Linear(f"{last} -> classes", (self.classes,), name="head", **shared)(features)
    return result | ({"taps": tuple(outputs)} if taps else {})

  def _constants(self, stage):
    """What each layer of a stage keeps wherever it goes: every other one shifts its windows by half."""
    depths = [int(getattr(self, f"layers_{s}")) for s in self.stages]
    layers = range(depths[stage - 1])
    shift = {"shift": [i % 2 * (self.window // 2) for i in layers]}
    if not self.drop_path:
      return shift
    before = sum(depths[:stage - 1])
    return shift | {"drop_path": [self.drop_path * (before + i + 1) / sum(depths) for i in layers]}


class WindowAttention(nn.Module):
  """Self-attention inside windows, on a residual branch.

  Attributes:
    stage: Its stage, in the names of its axes.
    heads: Attention heads.
    head_dim: Width of a head.
    window: Side of a window.
    pad: Whether maps are filled up to whole windows.
    scaling: Of its projections.
    dropout: Rate of dropout on what it adds.
  """

  stage: int
  heads: int
  head_dim: int
  window: int
  pad: bool
  scaling: str = "none"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    """Maps `[batch, rows, columns, embed]` to the same."""
    typed = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    embed, heads = f"embed_{self.stage}", f"heads_{self.stage}"
    shift = constant(self, "shift", constants, needed=True).astype(jnp.int32)
    # A map no larger than a window is one: there nothing is to be shifted.
    shifts = shift * np.array([n > self.window for n in x.shape[1:3]], np.int32)
    shifted = max(x.shape[1:3]) > self.window
    y = layer_norm("norm", embed, **typed)(x)
    if self.pad:
      y = jnp.pad(y, [(0, 0), *((0, -n % min(self.window, n)) for n in x.shape[1:3]), (0, 0)])
    rows, columns = y.shape[1:3]
    y = jnp.roll(y, -shifts, (1, 2)) if shifted else y
    y = self._windows(y)
    around, y = y.shape[:-1], y.reshape(-1, y.shape[3] * y.shape[4], y.shape[5])
    qkv = Linear(f"{embed} -> {heads} 3 head_dim", (self.heads, 3, self.head_dim), name="qkv",
                scaling=self.scaling, **typed)(y)
    bias = self._positions(heads, *around[3:])
    if shifted:
      # A finite bound, as rows of minus infinities have no derivative.
      bias = jnp.where(self._visible(shifts, rows, columns)[:, None], bias, jnp.finfo(bias.dtype).min)
    y = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :], bias)
    y = Linear(f"{heads} head_dim -> {embed}", x.shape[-1:], name="out", scaling=self.scaling, **typed)(y)
    y = y.reshape(*around, -1).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), rows, columns, -1)
    y = jnp.roll(y, shifts, (1, 2)) if shifted else y
    y = y[:, :x.shape[1], :x.shape[2]]
    return x + residual(self, y, constants, self.dropout, train)

  def _windows(self, x):
    """`[batch, rows, columns, window rows, window columns, embed]` of a map."""
    sides = (min(self.window, n) for n in x.shape[1:3])
    return squares(x, *sides, f"stage {self.stage} has {{}} positions, which do not divide into windows of {{}}; "
                   "allowed with model.pad=True")

  def _positions(self, heads, rows, columns):
    """What is added to the scores for where a key is, seen from the query: `[1, heads, queries, keys]`."""
    init = axes(nn.initializers.truncated_normal(0.02), f"-> rel_pos {heads}")
    reach = 2 * self.window - 1
    table = self.param("rel_pos", init, (reach * reach, self.heads), self.param_dtype)
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")).reshape(2, -1)
    away = place[:, :, None] - place[:, None] + self.window - 1
    return table[away[0] * reach + away[1]].transpose(2, 0, 1)[None].astype(jnp.float32)

  def _visible(self, shifts, rows, columns):
    """Which keys a query may see: none that came round an edge of the map; `[windows, queries, keys]`."""
    wrapped = [jnp.arange(n) >= n - shift for n, shift in zip((rows, columns), shifts)]
    area = (2 * wrapped[0][:, None] + wrapped[1][None]).reshape(1, rows, columns, 1)
    area = self._windows(area)
    area = area.reshape(area.shape[1] * area.shape[2], -1)
    return area[:, :, None] == area[:, None]


class MLP(nn.Module):
  """Two projections on a residual branch; `[batch, rows, columns, embed]` to the same.

  Attributes:
    stage: Its stage, in the names of its axes.
    mlp: Width of the hidden layer.
    scaling: Of its projections.
    dropout: Rate of dropout on what it adds.
  """

  stage: int
  mlp: int
  scaling: str = "none"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    shared = dict(scaling=self.scaling, dtype=self.dtype, param_dtype=self.param_dtype)
    embed, mlp = f"embed_{self.stage}", f"mlp_{self.stage}"
    y = layer_norm("norm", embed, dtype=self.dtype, param_dtype=self.param_dtype)(x)
    y = nn.gelu(Linear(f"{embed} -> {mlp}", (self.mlp,), name="up", **shared)(y))
    y = Linear(f"{mlp} -> {embed}", x.shape[-1:], name="down", **shared)(y)
    return x + residual(self, y, constants, self.dropout, train)


class Merge(nn.Module):
  """Half the rows and columns, behind a stage: four positions side by side, normalised as one, projected.

  They stand apart in its weights, so that a cut keeps the leading channels of each.

  Attributes:
    stage: The stage that it stands behind.
    width: Width of the next one.
    scaling: Of its projection.
  """

  stage: int
  width: int
  scaling: str = "none"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps `[batch, rows, columns, embed]` to `[batch, rows / 2, columns / 2, width]`."""
    typed = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = squares(x, 2, 2, f"stage {self.stage} has {{}} positions, which do not divide by {{}} for the next one")
    # The authors' order: down the left column, then down the right one.
    y = y.swapaxes(3, 4).reshape(*y.shape[:3], 4, y.shape[-1])
    y = layer_norm("norm", f"4 embed_{self.stage}", **typed)(y)
    return Linear(f"4 embed_{self.stage} -> embed_{self.stage + 1}", (self.width,), name="reduce", use_bias=False,
                 scaling=self.scaling, **typed)(y)


def squares(x: jax.Array, rows: int, columns: int, message: str) -> jax.Array:
  """Cuts maps `[batch, height, width, channels]` into pieces of so many rows and columns.

  Returns:
    `[batch, height / rows, width / columns, rows, columns, channels]`.

  Raises:
    ValueError: They do not divide; `message` says so, with places for what they have and for a piece.
  """
  batch, height, width, channels = x.shape
  if height % rows or width % columns:
    piece = str(rows) if rows == columns else f"{rows} x {columns}"
    raise UserError("Swin: " + message.format(f"{height} x {width}", piece))
  x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
  return x.transpose(0, 1, 3, 2, 4, 5)
