"""Networks of inverted residual blocks (1801.04381) in stages: MobileNetV3 and ProxylessNAS.

Depth, and in each block the expansion and the size of the kernel, are choices, as in Once-for-All
(1908.09791); and where a space has it the width of each stage, as in BigNAS (2003.11142).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.errors import UserError, one_of
from nestnet.models.convolution import ConvNorm, Convolution, activation, check_norm, divisible
from nestnet.models.inverted_residual import InvertedResidual, squeezed
from nestnet.models.layers import Linear
from nestnet.models.stack import single, stack
from nestnet.space import Space
from nestnet.subnet import Size, Subnet, derived, is_data, kept_ids

STAGES = 6


class MobileNet(nn.Module):
  """Images `[batch, rows, columns, channels]` to `logits` and `features`.

  `layers_1`, `expand_1`, `kernel_1` and `embed_1`, up to the number of stages, are the axes along which it
  nests, and `stem`, `embed_0`, `head_0` and `features`; `expand` and `kernel` may be tuples with one size a
  block. They are choices: `sizes` says how long the axes of the parameters are for them. The first block
  of a stage has its stride and is always there.

  Attributes:
    classes: Number of classes; 0 for a backbone without a head.
    layers_0: Number of blocks, without expansion, before the first stage; None: one of 3 x 3, fixed.
    kernel_0: As `kernel_1`, of that stage.
    layers_1: Number of blocks in the first stage; so for the others. Fields of stages that `widths`
      does not list are without effect.
    expand_1: Hidden channels of a block as a multiple of the channels that it reads.
    kernel_1: Side of the depthwise kernel, odd.
    embed_0: Channels of the fixed block or the stage before the first; None: as `widths` says.
    embed_1: Channels of the first stage; so for the others.
    head_0: Channels of the convolution behind the stages, where projections follow; None: as `head` says.
    features: Channels that the classifier reads; None: as `head` says.
    width: Multiplies all widths, which are then rounded to multiples of 8.
    stem: Channels of the first convolution.
    widths: Channels of the fixed block behind the stem, then of each stage.
    head: Channels of the convolution behind the stages, then those of projections of its means.
    stem_stride: Stride of the first convolution.
    strides: Of the fixed block, then of the first block of each stage.
    squeeze: Whether blocks have squeeze-excite, stage by stage; the first is the fixed block.
    activations: Names, stage by stage; the first is the fixed block's.
    stem_activation: Of the first convolution.
    head_activation: Of the head.
    transforms: Whether smaller kernels are learned transforms of larger ones, else their centres.
    shortcuts: Whether the first block of a stage is residual too (BigNAS): what it reads is averaged over
      the stride and projected, also where the widths are equal, since those of members may not be.
    zero_gamma: Whether residual branches start at 0: the scale of their last normalisation does.
    norm: `"batch"`, or `"group"`, which needs no calibration.
    group: Channels in a group: 1, 2, 4 or 8, as all widths are multiples of 8.
    epsilon: Of the normalisation.
    dropout: Rate of dropout on the features.
    drop_path: Rate of dropping a residual branch behind all blocks; a block's own rate is in proportion
      to the number of blocks before it.
    drop_path_stages: How many stages, from the last one, drop branches (2 in AttentiveNAS, 2011.09011).
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over the equal blocks of a stage.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  classes: int
  layers_0: int | None = None
  layers_1: int = 4
  layers_2: int = 4
  layers_3: int = 4
  layers_4: int = 4
  layers_5: int = 4
  layers_6: int = 4
  expand_1: Size = 6
  expand_2: Size = 6
  expand_3: Size = 6
  expand_4: Size = 6
  expand_5: Size = 6
  expand_6: Size = 6
  kernel_0: Size = 3
  kernel_1: Size = 7
  kernel_2: Size = 7
  kernel_3: Size = 7
  kernel_4: Size = 7
  kernel_5: Size = 7
  kernel_6: Size = 7
  embed_0: int | None = None
  embed_1: int | None = None
  embed_2: int | None = None
  embed_3: int | None = None
  embed_4: int | None = None
  embed_5: int | None = None
  embed_6: int | None = None
  head_0: int | None = None
  features: int | None = None
  width: float = 1.0
  stem: int = 16
  widths: tuple[int, ...] = (16, 24, 40, 80, 112, 160)
  head: tuple[int, ...] = (960, 1280)
  stem_stride: int = 2
  strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2)
  squeeze: tuple[bool, ...] = (False, False, True, False, True, True)
  activations: tuple[str, ...] = ("relu", "relu", "relu", "h_swish", "h_swish", "h_swish")
  stem_activation: str = "h_swish"
  head_activation: str = "h_swish"
  transforms: bool = False
  shortcuts: bool = False
  zero_gamma: bool = False
  norm: str = "batch"
  group: int = 8
  epsilon: float = 1e-5
  dropout: float = 0.0
  drop_path: float = 0.0
  drop_path_stages: int = 2
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    name, count = type(self).__name__, len(self.widths)
    if not 2 <= count <= STAGES + 1 or not self.head:
      raise UserError(f"{name}: widths={self.widths}, head={self.head}; allowed are a fixed block and 1 to "
                      f"{STAGES} stages, and a head of at least one width")
    for field in ("strides", "squeeze", "activations"):
      if len(getattr(self, field)) != count:
        raise UserError(f"{name}: {field}={getattr(self, field)} has {len(getattr(self, field))} entries; "
                        f"widths has {count}")
    for act in (*self.activations, self.stem_activation, self.head_activation):
      activation(act)
    for field in ("dropout", "drop_path"):
      if not 0 <= getattr(self, field) < 1:
        raise UserError(f"{name}: {field}={getattr(self, field)}; allowed is [0, 1)")
    check_norm(name, self.norm, self.group)
    if self.head_0 is not None and len(self.head) == 1:
      raise UserError(f"{name}: head_0={self.head_0}, and head={self.head} ends with this convolution; its "
                      "channels are features")
    for stage in self.stages:
      kernel = getattr(self, f"kernel_{stage}")
      for size in kernel if isinstance(kernel, tuple) else (kernel,):
        if isinstance(size, int) and not size % 2:
          raise UserError(f"{name}: kernel_{stage}={kernel}; allowed are odd sizes")
    super().__post_init__()

  @property
  def together(self) -> int:
    """How many channels side by side are normalised as one, so that they move as one."""
    return self.group if self.norm == "group" else 1

  @property
  def stages(self) -> range:
    """The stages, counted from 1; from 0 where the blocks before the first make one."""
    return range(self.layers_0 is None, len(self.widths))

  @property
  def tied_axes(self) -> tuple[tuple[str, ...], ...]:
    """Axes whose units are the same: those of stages that a residual connection joins."""
    spaces = [["stem"]]
    for stage, stride in enumerate(self.strides):
      if stride != 1 or self.reads(stage) != self.channels(stage):
        spaces.append([])
      spaces[-1].append(f"embed_{stage}")
    return tuple(tuple(space) for space in spaces if len(space) > 1)

  @property
  def carried(self) -> list[str]:
    """The axes that `stack` and `single` may be told of as data."""
    return ["stem", *(f"embed_{s}" for s in range(len(self.widths))),
            *(name for name in self.heads() if name in ("head_0", "features"))]

  @property
  def singles(self) -> tuple[str, ...]:
    """What stands outside of the stacks of blocks."""
    return "stem", "fixed", *(f"head_{i}" for i in range(len(self.head))), "classifier"

  def reads(self, stage: int) -> int:
    """The width that the first block of a stage reads; of the fixed block, or of stage 0, the stem's."""
    return self.channels(stage - 1) if stage else self._rounded(self.stem)

  def channels(self, stage: int) -> int:
    """The width of a stage; 0 is the fixed block."""
    chosen = getattr(self, f"embed_{stage}")
    return self._rounded(self.widths[stage] if chosen is None else chosen)

  def heads(self) -> dict[str, int]:
    """The channels behind the stages, by the names of their axes."""
    names = [*(f"head_{i}" for i in range(len(self.head) - 1)), "features"]
    chosen = {"head_0": self.head_0, "features": self.features}
    return {name: self._rounded(full if chosen.get(name) is None else chosen[name])
            for name, full in zip(names, self.head)}

  def _rounded(self, width: int) -> int:
    return derived(width, lambda width: divisible(width * self.width))

  def choices(self) -> list[str]:
    """The axes along which it nests."""
    kinds, (stem, *widths) = ("layers", "expand", "kernel"), self.carried
    blocks = [f"{kind}_{s}" for kind in kinds for s in self.stages if s or kind != "expand"]
    return [stem, *blocks, *widths]

  def hidden(self, stage: int) -> tuple[int, ...]:
    """The hidden channels of each block of a stage with expansion."""
    layers, expand = getattr(self, f"layers_{stage}"), getattr(self, f"expand_{stage}")
    expand = expand if isinstance(expand, tuple) else (expand,) * layers
    reads = [self.reads(stage)] + [self.channels(stage)] * (layers - 1)
    if len(expand) != layers:
      raise UserError(f"expand_{stage}={expand} lists {len(expand)} blocks for layers_{stage}={layers}")
    return tuple(derived(e, lambda e, n: divisible(round(n * e)), n) for n, e in zip(reads, expand))

  def member(self, subnet: Subnet) -> MobileNet:
    """The ordinary network of a sub-network; its kernels are its own, so nothing transforms them."""
    return self.clone(transforms=False, **subnet)

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network, in every stage.

    Raises:
      ValueError: An axis is no choice of this network, or the first block of a stage is left out.

    Example:
      >>> sizes = MobileNet(10).sizes(Subnet(layers_2=2, expand_2=(3, 6), embed_2=32))
      >>> sizes["embed_2"], sizes["hidden_2"], sizes["squeeze_2"]
      (32, (72, 192), (24, 48))
    """
    for axis in subnet:
      if axis not in self.choices():
        raise one_of(f"axis of {type(self).__name__}", axis, self.choices())
    small = self.member(subnet)
    sizes: dict[str, Any] = {"stem": small.reads(0), "embed_0": small.channels(0)}
    if self.layers_0 is None and self.squeeze[0]:
      sizes["squeeze_0"] = squeezed(sizes["stem"])
    for stage in self.stages:
      depth = f"layers_{stage}"
      ids = kept_ids(subnet.chosen.get(depth, getattr(self, depth)))
      if not ids or ids[0] != 0:
        raise UserError(f"sub-network {subnet}: {depth} leaves out block 0, which has the stage's stride")
      hidden = small.hidden(stage) if stage else (sizes["stem"],) + (sizes["embed_0"],) * (len(ids) - 1)
      sizes |= {depth: ids, f"kernel_{stage}": getattr(small, f"kernel_{stage}"),
                f"embed_{stage}": small.channels(stage)}
      if stage:
        sizes[f"hidden_{stage}"] = hidden
      elif self.layers_0 > 1:
        sizes["carried_0"] = sizes["embed_0"]
      if self.squeeze[stage]:
        sizes[f"squeeze_{stage}"] = tuple(squeezed(size) for size in hidden)
    return Subnet(**sizes | small.heads())

  def rates(self, stage: int) -> list[float] | None:
    """The rate of drop path of each block of a stage; None where none is dropped."""
    if not self.drop_path or stage < len(self.widths) - self.drop_path_stages:
      return None
    depths = [1] * (self.layers_0 is None) + [int(getattr(self, f"layers_{s}")) for s in self.stages]
    return [self.drop_path * (sum(depths[:stage]) + i) / sum(depths) for i in range(depths[stage])]

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False, taps: bool = False) -> dict[str, Any]:
    """Applies the network.

    Args:
      images: `[batch, rows, columns, channels]`.
      train: Whether batches are normalised by their own statistics although calibrated ones are there,
        and dropout is on; it uses the `dropout` rng.
      taps: Whether to return every block's output.

    Returns:
      `logits` `[batch, classes]`, `features` `[batch, head[-1]]`, and with `taps` the blocks' outputs, for
      each stage `[layers, batch, rows, columns, channels]`. In one program whose data says how many channels
      there are, taps have zeros behind them and no features are given.
    """
    typed = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    normed = dict(norm=self.norm, group=self.group, epsilon=self.epsilon, **typed)
    first = functools.partial(ConvNorm, "channels", "stem", kernel=3, stride=self.stem_stride,
                              act=self.stem_activation, **normed)
    x = single(first, images, name="stem", sizes={"features": self.reads(0)}, writes=self.reads(0),
               train=train)
    options = dict(shortcut=self.shortcuts, zero_gamma=self.zero_gamma, **normed)
    if self.layers_0 is None:
      fixed = functools.partial(InvertedResidual, 0, "stem", stride=self.strides[0], squeeze=self.squeeze[0],
                                act=self.activations[0], **options)
      x = single(fixed, x, name="fixed", sizes={"width": self.channels(0)}, reads=self.reads(0),
                 writes=self.channels(0), train=train)
    outputs = []
    for s in self.stages:
      block = functools.partial(
        InvertedResidual, s, squeeze=self.squeeze[s], act=self.activations[s], choice=f"kernel_{s}",
        transforms=self.transforms, **options)
      sizes = ({"hidden": self.hidden(s)} if s else {}) | {
        "width": self.channels(s), "kernel": getattr(self, f"kernel_{s}")}
      rates = self.rates(s)
      x, tap = stack(
        functools.partial(block, reads=f"embed_{s}", shortcut=False), x, layers=getattr(self, f"layers_{s}"),
        lead=functools.partial(block, reads=f"embed_{s - 1}" if s else "stem", stride=self.strides[s]),
        sizes=sizes, name=f"stage_{s}", depth=f"layers_{s}",
        constants={"drop_path": rates} if rates else None, remat=self.remat, taps=taps,
        unroll=self.unroll, reads=self.reads(s), writes=self.channels(s), train=train)
      outputs.append(tap)

    last, ((name, width), *projections) = self.stages[-1], self.heads().items()
    head = functools.partial(ConvNorm, f"embed_{last}", name, act=self.head_activation, **normed)
    x = single(head, x, name="head_0", sizes={"features": width}, reads=self.channels(last), writes=width,
               train=train)
    x = x.mean((1, 2), keepdims=True)
    for i, (writes, size) in enumerate(projections, 1):
      projection = functools.partial(Convolution, name, writes, **typed)
      x = single(projection, x, name=f"head_{i}", sizes={"features": size}, reads=width, writes=size)
      x, name, width = activation(self.head_activation)(x), writes, size
    features = x[:, 0, 0]
    # Where data says how many there are, zeros behind them would pass for features.
    result = {} if is_data(width) else {"features": features}
    if self.classes:
      features = nn.Dropout(self.dropout, deterministic=not train)(features)
      classifier = functools.partial(Linear, "features -> classes", (self.classes,), **typed)
      result["logits"] = single(classifier, features, name="classifier", sizes={}, reads=width)
    return result | ({"taps": tuple(outputs)} if taps else {})


def space(model: MobileNet, layers=(2, 3, 4), expand=(3, 4, 6), kernel=(3, 5, 7), tie: str = "block",
          couple: Mapping[str, Sequence] | None = None, **others: Sequence[int]) -> Space:
  """The family of a network. In a config it is spelled, or `config.space = space(model).to_json()`.

  Args:
    model: The largest network. Choices above what a stage of it has are left out.
    layers: Depths of a stage.
    expand: Expansions of a block.
    kernel: Sides of a depthwise kernel.
    tie: `"block"`: expansion and kernel are free in every block (Once-for-All); `"stage"`: the blocks of a
      stage have one of each (AttentiveNAS); `"depth"`: and the expansion goes with the depth, the
      shallowest with the narrowest (CompOFA, 2104.12642).
    couple: Joint choices of further axes, as `Space` takes them.
    **others: Choices of single axes, in place of these or beside them: `layers_1=(1, 2)`,
      `embed_1=(16, 24)`, `stem=(16, 24)`.

  Raises:
    ValueError: An unknown way to tie, or an axis that the network has not.

  Example:
    >>> from nestnet.models.mobilenet_v3 import MobileNetV3
    >>> space(MobileNetV3(1000)).size == (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5
    True
    >>> space(MobileNetV3(1000), kernel=(7,), tie="depth").size
    243
  """
  if tie not in ("block", "stage", "depth"):
    raise one_of("way to tie a space", tie, ("block", "stage", "depth"))
  for axis in others:
    if axis not in model.choices():
      raise one_of(f"axis of {type(model).__name__}", axis, model.choices())
  given = {"layers": layers, "expand": expand, "kernel": kernel}
  choices: dict[str, tuple[int, ...]] = {}
  for axis in model.choices():
    kind = axis.rpartition("_")[0]
    if axis in others:
      choices[axis] = tuple(others[axis])
    elif kind in given:
      full = getattr(model, axis)
      choices[axis] = tuple(size for size in given[kind] if size <= full) or (full,)
  couple = dict(couple or {})
  for s in range(1, len(model.widths)) if tie == "depth" else ():
    axes = f"layers_{s}", f"expand_{s}"
    full = tuple(getattr(model, axis) for axis in axes)
    rows = zip(others.get(axes[0], layers), others.get(axes[1], expand))
    couple[" ".join(axes)] = [row for row in rows if row[0] <= full[0] and row[1] <= full[1]] or [full]
    choices = {axis: sizes for axis, sizes in choices.items() if axis not in axes}
  free = [axis for axis in choices if re.match("expand|kernel", axis)] if tie == "block" else []
  return Space(**choices, couple=couple, per_layer=free)
