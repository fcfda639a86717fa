"""ResNet (1512.03385) with the space of POA (2408.01031, A.2): hidden channels and depth."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.choices import spaced
from nestnet.errors import UserError, one_of
from nestnet.models.bottleneck import Bottleneck
from nestnet.models.convolution import NORMS, ConvNorm
from nestnet.models.layers import Linear, hide
from nestnet.models.stack import stack
from nestnet.space import Space
from nestnet.subnet import INPUTS, Subnet, kept_ids

STAGES = 4
# Fields of the variant for images of 32 x 32: neither a stride nor pooling before the stages, so 8 in all.
SMALL_IMAGES = {"stem_kernel": 3, "stem_stride": 1, "pool": False}


class ResNet(nn.Module):
  """Images `[batch, rows, columns, channels]` to `logits`, `features` and `tokens`.

  Depths and `width`, the hidden channels of all blocks, are the axes along which it nests. What blocks read
  and write, the stem and the shortcuts are fixed. The first block of a stage has its stride and is always
  there. Normalisation cancels a constant before it, so that POA's scaling by width has no place here.

  By default it is the largest network of POA, ResNet-152 with twice the hidden channels;
  `ResNet(1000, layers_2=4, layers_3=6, width=64, norm="batch")` is ResNet-50, with strides in the
  convolutions of 3 x 3. `ResNet(10, **SMALL_IMAGES)` is the variant for images of 32 x 32.

  Attributes:
    classes: Number of classes; 0 for a backbone without a head.
    layers_1: Number of blocks in the first stage; so for the others. Fields of stages that `widths`
      does not list are without effect.
    width: Hidden channels of the first stage; those of others are in proportion to what their blocks write.
    stem: Channels behind the stem.
    widths: Channels that the blocks of the stages write.
    stem_kernel: Side of the kernel of the stem, odd.
    stem_stride: Of the stem.
    pool: Whether the stem ends with a maximum over 3 x 3 positions, of stride 2.
    strides: Of the first block of each stage.
    norm: `"group"`, which needs no calibration, or `"batch"`.
    group: Channels in a group: members are nested functions, leading groups being the same in all.
    groups: Number of groups instead, whatever the width: each member has groups of its own (32 in POA).
    zero_gamma: Whether residual branches start at 0: the scale of their last normalisation does.
    epsilon: Of the normalisation.
    masked: Whether a learned token stands for the positions behind the stem that `mask` names.
    dropout: Rate of dropout on the features.
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over the equal blocks of a stage.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  classes: int
  layers_1: int = 3
  layers_2: int = 8
  layers_3: int = 36
  layers_4: int = 3
  width: int = 128
  stem: int = 64
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  stem_kernel: int = 7
  stem_stride: int = 2
  pool: bool = True
  strides: tuple[int, ...] = (1, 2, 2, 2)
  norm: str = "group"
  group: int = 8
  groups: int | None = None
  zero_gamma: bool = False
  epsilon: float = 1e-5
  masked: bool = False
  dropout: float = 0.0
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    name = type(self).__name__
    if not 1 <= len(self.widths) <= STAGES:
      raise UserError(f"{name}: widths={self.widths}; allowed are 1 to {STAGES} stages")
    if len(self.strides) != len(self.widths):
      raise UserError(f"{name}: strides={self.strides} has {len(self.strides)} entries; widths has "
                      f"{len(self.widths)}")
    if isinstance(self.width, tuple):
      raise UserError(f"{name}: width={self.width}; allowed is one, for all blocks")
    counts = ("width", "stem", "group", "groups", "stem_kernel", "stem_stride", *self.depths)
    for field, count in ((f, getattr(self, f)) for f in counts):
      if isinstance(count, int) and count < 1:
        raise UserError(f"{name}: {field}={count}; allowed is at least 1")
    if not 0 <= self.dropout < 1:
      raise UserError(f"{name}: dropout={self.dropout}; allowed is [0, 1)")
    if not self.stem_kernel % 2:
      raise UserError(f"{name}: stem_kernel={self.stem_kernel}; allowed are odd sizes")
    if self.norm not in NORMS:
      raise one_of(f"norm of {name}", self.norm, NORMS)
    parts = self.groups or self.group
    for axis, size in self.lengths().items():
      if self.norm == "group" and size % parts:
        raise UserError(f"{name}: {axis}={size} does not divide into " + (
          f"{parts} groups" if self.groups else f"groups of {parts}"))
    super().__post_init__()

  @property
  def stages(self) -> range:
    """The stages, counted from 1."""
    return range(1, 1 + len(self.widths))

  @property
  def depths(self) -> list[str]:
    """The axes of depth."""
    return [f"layers_{s}" for s in self.stages]

  @property
  def representation(self) -> tuple[str, int]:
    """The axis of `features`, and its length."""
    return f"embed_{self.stages[-1]}", self.widths[-1]

  @property
  def together(self) -> int:
    """How many channels side by side are normalised as one, so that they move as one."""
    return self.group if self.norm == "group" else 1

  @property
  def placed(self) -> dict[str, str]:
    """Axes whose units stay where they are, and why."""
    each = self.norm == "group" and self.groups
    return dict.fromkeys(self.lengths(), f"each width divides them anew into {each} groups") if each else {}

  def hidden(self, stage: int) -> int:
    """The hidden channels of the blocks of a stage.

    Raises:
      ValueError: They would be no whole number.
    """
    full, first = self.widths[stage - 1], self.widths[0]
    if self.width * full % first:
      raise UserError(f"{type(self).__name__}: width={self.width} beside {first} channels has no like in stage "
                      f"{stage}, beside {full}; allowed are widths with whole hidden channels")
    return self.width * full // first

  def lengths(self) -> dict[str, int]:
    """How long the axes of channels are that are normalised."""
    hidden = {s: self.hidden(s) for s in self.stages}
    return {"embed_0": self.stem} | {f"embed_{s}": self.widths[s - 1] for s in self.stages} | {
      f"{kind}_{s}": size for s, size in hidden.items() for kind in ("hidden", "inner")}

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network, in every stage.

    Raises:
      ValueError: An axis is no choice of this network, or the first block of a stage is left out.

    Example:
      >>> sizes = ResNet(1000).sizes(Subnet(layers_3=(0, 12, 35), width=64))
      >>> sizes.chosen["layers_3"], sizes["hidden_1"], sizes["hidden_3"]
      ((0, 12, 35), 64, 256)
    """
    allowed = [*self.depths, "width"]
    for axis in subnet:
      if axis not in allowed:
        raise one_of(f"axis of {type(self).__name__}", axis, allowed)
    depths = {axis: kept_ids(subnet.chosen.get(axis, getattr(self, axis))) for axis in self.depths}
    for axis, ids in depths.items():
      if not ids or ids[0] != 0:
        raise UserError(f"sub-network {subnet}: {axis} leaves out layer 0, which has the stage's stride")
    lengths = self.clone(**subnet).lengths()
    return Subnet(**depths, **{axis: n for axis, n in lengths.items() if not axis.startswith("embed")})

  def check_space(self, space: Space) -> None:
    """Raises `ValueError` for a choice that is no network: `sizes` and the groups of all of them."""
    for axis in space.axes:
      for size in () if axis in INPUTS else space.choices(axis):
        self.sizes(Subnet(**{axis: size}))

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False,
               mask: jax.Array | None = None) -> dict[str, Any]:
    """Applies the network.

    Args:
      images: `[batch, rows, columns, channels]`.
      train: Whether dropout is on, with the `dropout` rng, and batches are normalised by their own
        statistics although calibrated ones are there.
      taps: Whether to return every block's output.
      mask: Booleans `[batch, cells]` of a square grid over the image, row by row: those that a network that is
        `masked` sees a token in place of. Each is a square of positions behind the stem.

    Returns:
      `logits` `[batch, classes]` unless it is a backbone, `tokens` `[batch, positions, channels]`, what the
      last stage gives, `features` `[batch, channels]`, their mean, and with `taps` the blocks' outputs, for
      each stage `[layers, batch, rows, columns, channels]`.

    Raises:
      ValueError: A map does not divide into cells, or there is a mask and no token for it.
    """
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = dict(norm=self.norm, group=self.group, groups=self.groups, epsilon=self.epsilon, **dtypes)
    x = ConvNorm("channels", "embed_0", self.stem, self.stem_kernel, self.stem_stride, "relu", name="stem",
                 **norm)(images, train)
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.pool else x
    x, outputs = hide(self, x, mask, "embed_0"), []
    for s, stride in zip(self.stages, self.strides):
      block = functools.partial(Bottleneck, s, zero_gamma=self.zero_gamma, **norm)
      x, tap = stack(
        functools.partial(block, reads=f"embed_{s}"), x, layers=getattr(self, f"layers_{s}"),
        lead=functools.partial(block, reads=f"embed_{s - 1}", stride=stride, shortcut=True, averages=False),
        sizes={"width": self.widths[s - 1], "hidden": self.hidden(s)}, name=f"stage_{s}",
        depth=f"layers_{s}", remat=self.remat, taps=taps, unroll=self.unroll, train=train)
      outputs.append(tap)
    tokens = x.reshape(len(x), -1, x.shape[-1])
    result = {"features": tokens.mean(1), "tokens": tokens}
    if self.classes:
      features = nn.Dropout(self.dropout, deterministic=not train)(result["features"])
      names = f"{self.representation[0]} -> classes"
      result["logits"] = Linear(names, (self.classes,), name="classifier", **dtypes)(features)
    return result | ({"taps": tuple(outputs)} if taps else {})


def space(model: ResNet, width: Iterable[int] = (64, 96, 128), layers_2: Iterable[int] = range(4, 9),
          layers_3: Iterable[int] = range(6, 37), keep: str = "spaced") -> Space:
  """The family of a network: hidden channels, and depth in the second and the third stage.

  Args:
    model: The largest network.
    width: Hidden channels of the first stage.
    layers_2: Numbers of blocks of the second stage.
    layers_3: Of the third.
    keep: Which blocks a member has: `"spaced"`: evenly spaced ones, the first and the last among them (POA,
      eq. 4); `"leading"`: the first ones.

  Raises:
    ValueError: An unknown way to keep blocks.

  Example:
    >>> space(ResNet(1000)).size == 3 * 5 * 31
    True
    >>> str(space(ResNet(1000)).smallest)
    'width=64,layers_2=0+2+4+7,layers_3=0+7+14+21+28+35'
  """
  if keep not in ("spaced", "leading"):
    raise one_of("way to keep blocks", keep, ("spaced", "leading"))
  counts = {"layers_2": tuple(layers_2), "layers_3": tuple(layers_3)}
  choices = counts if keep == "leading" else {
    axis: spaced(getattr(model, axis), sizes) for axis, sizes in counts.items()}
  return Space(width=tuple(width), **choices)
