"""ResNet-50-D (1812.01187) with the space of Once-for-All (1908.09791, its ResNet-50 networks)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.errors import UserError, one_of
from nestnet.models.bottleneck import Bottleneck
from nestnet.models.convolution import ConvNorm, Normed, check_norm, divisible
from nestnet.models.layers import Linear
from nestnet.models.stack import single, stack
from nestnet.space import Space
from nestnet.subnet import Size, Subnet, derived, is_data, kept_ids

STAGES = 4
# Fields of the variant for images of 32 x 32: neither a stride nor pooling before the stages, so 8 in all.
SMALL_IMAGES = {"stem_stride": 1, "pool": False}


class ResNet50D(nn.Module):
  """Images `[batch, rows, columns, channels]` to `logits` and `features`.

  Depths, widths and the expansion of each block are the axes along which it nests. Widths and expansions
  are choices, in hundredths; `sizes` says how long the axes of the parameters are for them. `expand` may
  be a tuple with one choice a block. The first block of a stage has its stride and is always there.
  `ResNet50D(10, **SMALL_IMAGES)` is the variant for images of 32 x 32.

  Attributes:
    classes: Number of classes; 0 for a backbone without a head.
    layers_0: 2 with the residual convolution of the stem, 1 without it.
    layers_1: Number of blocks in the first stage; so for the others. Fields of stages that `widths`
      does not list are without effect.
    width_stem: Channels inside the stem, hundredths of `stem // 2`.
    width_0: Channels behind the stem, hundredths of `stem`.
    width_1: Channels of the first stage, hundredths of `widths[0]`; so for the others.
    expand_1: Hidden channels, hundredths of what the block writes.
    stem: Channels behind the stem, in full.
    widths: Channels of the stages, in full.
    stem_stride: Stride of the first convolution.
    pool: Whether the stem ends with a maximum over 3 x 3 positions, of stride 2.
    strides: Of the first block of each stage.
    norm: `"batch"`, or `"group"`, which needs no calibration.
    group: Channels in a group: 1, 2, 4 or 8.
    zero_gamma: Whether residual branches start at 0: the scale of their last normalisation does.
    epsilon: Of the normalisation.
    dropout: Rate of dropout on the features.
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over the equal blocks of a stage.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  classes: int
  layers_0: int = 2
  layers_1: int = 4
  layers_2: int = 4
  layers_3: int = 6
  layers_4: int = 4
  width_stem: int = 100
  width_0: int = 100
  width_1: int = 100
  width_2: int = 100
  width_3: int = 100
  width_4: int = 100
  expand_1: Size = 35
  expand_2: Size = 35
  expand_3: Size = 35
  expand_4: Size = 35
  stem: int = 64
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  stem_stride: int = 2
  pool: bool = True
  strides: tuple[int, ...] = (1, 2, 2, 2)
  norm: str = "batch"
  group: int = 8
  zero_gamma: bool = False
  epsilon: float = 1e-5
  dropout: float = 0.0
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  # Axes whose units are the same.
  tied_axes = (("stem", "stem_sum"),)
  # What stands outside of the stacks of blocks.
  singles = ("stem", "stem_out", "classifier")

  def __post_init__(self):
    name = type(self).__name__
    if not 1 <= len(self.widths) <= STAGES:
      raise UserError(f"{name}: widths={self.widths}; allowed are 1 to {STAGES} stages")
    if len(self.strides) != len(self.widths):
      raise UserError(f"{name}: strides={self.strides} has {len(self.strides)} entries; widths has "
                      f"{len(self.widths)}")
    if isinstance(self.layers_0, int) and self.layers_0 not in (1, 2):
      raise UserError(f"{name}: layers_0={self.layers_0}; allowed are 1 and 2")
    if not 0 <= self.dropout < 1:
      raise UserError(f"{name}: dropout={self.dropout}; allowed is [0, 1)")
    check_norm(name, self.norm, self.group)
    super().__post_init__()

  @property
  def together(self) -> int:
    """How many channels side by side are normalised as one, so that they move as one."""
    return self.group if self.norm == "group" else 1

  @property
  def stages(self) -> range:
    """The stages, counted from 1."""
    return range(1, 1 + len(self.widths))

  def choices(self) -> list[str]:
    """The axes along which it nests."""
    return [f"layers_{s}" for s in (0, *self.stages)] + self.multipliers() + [
      f"expand_{s}" for s in self.stages]

  def multipliers(self) -> list[str]:
    """The axes of widths, from inside the stem on."""
    return [f"width_{s}" for s in ("stem", 0, *self.stages)]

  @property
  def carried(self) -> list[str]:
    """The axes that `stack` and `single` may be told of as data."""
    return ["layers_0", *self.multipliers()]

  def channels(self, stage: int) -> int:
    """The width of a stage; 0 is what the stem writes."""
    full = self.stem if stage == 0 else self.widths[stage - 1]
    return derived(getattr(self, f"width_{stage}"), lambda width: divisible(full * width / 100))

  def inside_stem(self) -> int:
    """The width inside the stem."""
    return derived(self.width_stem, lambda width: divisible(divisible(self.stem * width / 100) // 2))

  def hidden(self, stage: int) -> Size:
    """The hidden channels of the blocks of a stage."""
    width, expand = self.channels(stage), getattr(self, f"expand_{stage}")
    return derived(expand, lambda expand, width: divisible(round(width * expand / 100)), width)

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network, in every stage.

    Raises:
      ValueError: An axis is no choice of this network, or the first block of a stage is left out.

    Example:
      >>> sizes = ResNet50D(10).sizes(Subnet(layers_1=2, expand_1=(20, 35), width_1=65))
      >>> sizes["embed_1"], sizes["hidden_1"]
      (168, (32, 56))
    """
    for axis in subnet:
      if axis not in self.choices():
        raise one_of(f"axis of {type(self).__name__}", axis, self.choices())
    small = self.clone(**subnet)
    sizes: dict[str, Any] = {"stem": small.inside_stem(), "stem_sum": small.inside_stem()}
    for s in (0, *self.stages):
      ids = kept_ids(subnet.chosen.get(f"layers_{s}", getattr(self, f"layers_{s}")))
      if not ids or ids[0] != 0:
        raise UserError(f"sub-network {subnet}: layers_{s} leaves out layer 0, which has the stage's stride")
      sizes |= {f"layers_{s}": ids, f"embed_{s}": small.channels(s)}
      if s:
        sizes |= {f"hidden_{s}": small.hidden(s), f"inner_{s}": small.hidden(s)}
    return Subnet(**sizes)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False) -> dict[str, Any]:
    """Applies the network.

    Args:
      images: `[batch, rows, columns, channels]`.
      train: Whether batches are normalised by their own statistics although calibrated ones are there,
        and dropout is on; it uses the `dropout` rng.
      taps: Whether to return every block's output.

    Returns:
      `logits` `[batch, classes]`, `features` `[batch, channels]`, and with `taps` the blocks' outputs, for
      each stage `[layers, batch, rows, columns, channels]`. In one program whose data says how many channels
      there are, taps have zeros behind them and no features are given.
    """
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = dict(norm=self.norm, group=self.group, epsilon=self.epsilon, **dtypes)
    inside, channels = self.inside_stem(), {s: self.channels(s) for s in (0, *self.stages)}
    x = single(functools.partial(Stem, stride=self.stem_stride, **norm), images, name="stem",
               sizes={"layers": self.layers_0, "inside": inside}, writes=inside, train=train)
    behind = functools.partial(ConvNorm, "stem", "embed_0", kernel=3, act="relu", **norm)
    x = single(behind, x, name="stem_out", sizes={"features": channels[0]}, reads=inside, writes=channels[0],
               train=train)
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.pool else x
    outputs = []
    for s, stride in zip(self.stages, self.strides):
      block = functools.partial(Bottleneck, s, zero_gamma=self.zero_gamma, **norm)
      x, tap = stack(
        functools.partial(block, reads=f"embed_{s}"), x, layers=getattr(self, f"layers_{s}"),
        lead=functools.partial(block, reads=f"embed_{s - 1}", stride=stride, shortcut=True),
        sizes={"width": channels[s], "hidden": self.hidden(s)}, name=f"stage_{s}", depth=f"layers_{s}",
        remat=self.remat, taps=taps, unroll=self.unroll, reads=channels[s - 1], writes=channels[s],
        train=train)
      outputs.append(tap)
    features, width = x.mean((1, 2)), channels[self.stages[-1]]
    # Where data says how many there are, zeros behind them would pass for features.
    result = {} if is_data(width) else {"features": features}
    if self.classes:
      features = nn.Dropout(self.dropout, deterministic=not train)(features)
      names = f"embed_{self.stages[-1]} -> classes"
      result["logits"] = single(functools.partial(Linear, names, (self.classes,), **dtypes), features,
                                name="classifier", sizes={}, reads=width)
    return result | ({"taps": tuple(outputs)} if taps else {})


class Stem(Normed):
  """Two convolutions of 3 x 3, the second on a residual branch that may be absent."""

  layers: int
  inside: int
  stride: int = 2

  @nn.compact
  def __call__(self, x, train):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, inside]`."""
    x = ConvNorm("channels", "stem", self.inside, 3, self.stride, "relu", name="layers_0_0", **self.normed)(
      x, train)
    if self.layers == 2:
      # A name stands once in an array, so the sum of the residual branch has one of its own.
      x = x + ConvNorm("stem", "stem_sum", self.inside, 3, 1, "relu", name="layers_0_1", **self.normed)(
        x, train)
    return x


def space(model: ResNet50D, shallower=(2, 1, 0), expand=(20, 25, 35), width=(65, 80, 100),
          tie: str = "block") -> Space:
  """The family of a network: depth, width and stem, and the expansion of each block.

  Args:
    model: The largest network.
    shallower: How many blocks a stage may have fewer than in the model.
    expand: Expansions, in hundredths.
    width: Widths, in hundredths.
    tie: `"block"`: widths are free in every stage (Once-for-All); `"width"`: one of them goes for the whole
      network.

  Raises:
    ValueError: An unknown way to tie.

  Example:
    >>> space(ResNet50D(1000)).size == 2 * 3 ** 6 * (3**2 + 3**3 + 3**4) ** 3 * (3**4 + 3**5 + 3**6)
    True
    >>> space(ResNet50D(1000)).size // space(ResNet50D(1000), tie="width").size == 3 ** 5
    True
  """
  if tie not in ("block", "width"):
    raise one_of("way to tie a space", tie, ("block", "width"))
  widths = model.multipliers()
  choices: dict[str, tuple[int, ...]] = {"layers_0": (1, 2)}
  for s in model.stages:
    choices[f"layers_{s}"] = tuple(getattr(model, f"layers_{s}") - n for n in shallower)
  choices |= {axis: tuple(width) for axis in widths} if tie == "block" else {}
  couple = {" ".join(widths): [(size,) * len(widths) for size in width]} if tie == "width" else {}
  expansions = {f"expand_{s}": tuple(expand) for s in model.stages}
  return Space(**choices, **expansions, couple=couple, per_layer=tuple(expansions))
