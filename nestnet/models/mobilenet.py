"""Networks of inverted residual blocks (1801.04381) in stages: MobileNetV3 and ProxylessNAS.

Depth, and in each block the expansion and the size of the kernel, are choices, as in Once-for-All
(1908.09791); the widths of the stages are fixed.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.errors import UserError, one_of
from nestnet.models.convolution import ConvNorm, Convolution, SqueezeExcite, activation, divisible
from nestnet.models.layers import Linear
from nestnet.models.stack import stack
from nestnet.space import Space
from nestnet.subnet import Size, Subnet, kept_ids

STAGES = 6


class MobileNet(nn.Module):
  """Images `[batch, rows, columns, channels]` to `logits` and `features`.

  `layers_1`, `expand_1` and `kernel_1`, up to the number of stages, are the axes along which it nests;
  `expand` and `kernel` may be tuples with one size a block. They are choices: `sizes` says how long the
  axes of the parameters are for them. The first block of a stage has its stride and is always there.

  Attributes:
    classes: Number of classes; 0 for a backbone without a head.
    layers_1: Number of blocks in the first stage; so for the others. Fields of stages that `widths`
      does not list are without effect.
    expand_1: Hidden channels of a block as a multiple of the channels that it reads.
    kernel_1: Side of the depthwise kernel, odd.
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
    epsilon: Of the batch normalisation.
    dropout: Rate of dropout on the features.
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over the equal blocks of a stage.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  classes: int
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
  kernel_1: Size = 7
  kernel_2: Size = 7
  kernel_3: Size = 7
  kernel_4: Size = 7
  kernel_5: Size = 7
  kernel_6: Size = 7
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
  epsilon: float = 1e-5
  dropout: float = 0.0
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
    if not 0 <= self.dropout < 1:
      raise UserError(f"{name}: dropout={self.dropout}; allowed is [0, 1)")
    for stage in self.stages:
      kernel = getattr(self, f"kernel_{stage}")
      for size in kernel if isinstance(kernel, tuple) else (kernel,):
        if isinstance(size, int) and not size % 2:
          raise UserError(f"{name}: kernel_{stage}={kernel}; allowed are odd sizes")
    super().__post_init__()

  @property
  def stages(self) -> range:
    """The stages, counted from 1."""
    return range(1, len(self.widths))

  @property
  def tied(self) -> tuple[tuple[str, ...], ...]:
    """Axes whose units are the same: those of stages that a residual connection joins."""
    widths = [divisible(self.stem * self.width), *(self.channels(s) for s in (0, *self.stages))]
    spaces = [["stem"]]
    for stage, (reads, writes) in enumerate(zip(widths, widths[1:])):
      if self.strides[stage] != 1 or reads != writes:
        spaces.append([])
      spaces[-1].append(f"embed_{stage}")
    return tuple(tuple(space) for space in spaces if len(space) > 1)

  def channels(self, stage: int) -> int:
    """The width of a stage; 0 is the fixed block."""
    return divisible(self.widths[stage] * self.width)

  def hidden(self, stage: int) -> tuple[int, ...]:
    """The hidden channels of each block of a stage."""
    layers, expand = getattr(self, f"layers_{stage}"), getattr(self, f"expand_{stage}")
    expand = expand if isinstance(expand, tuple) else (expand,) * layers
    reads = [self.channels(stage - 1)] + [self.channels(stage)] * (layers - 1)
    if len(expand) != layers:
      raise UserError(f"expand_{stage}={expand} lists {len(expand)} blocks for layers_{stage}={layers}")
    return tuple(divisible(round(channels * e)) for channels, e in zip(reads, expand))

  def member(self, subnet: Subnet) -> MobileNet:
    """The ordinary network of a sub-network; its kernels are its own, so nothing transforms them."""
    return self.clone(transforms=False, **subnet)

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network, in every stage.

    Raises:
      ValueError: An axis is no choice of this network, or the first block of a stage is left out.

    Example:
      >>> str(MobileNet(10, widths=(16, 24), strides=(1, 2), squeeze=(False, True),
      ...               activations=("relu", "relu")).sizes(Subnet(layers_1=2, expand_1=(3, 6), kernel_1=5)))
      'layers_1=2,hidden_1=48:144,kernel_1=5,squeeze_1=16:40'
    """
    allowed = [f"{axis}_{stage}" for stage in self.stages for axis in ("layers", "expand", "kernel")]
    for axis in subnet:
      if axis not in allowed:
        raise one_of(f"axis of {type(self).__name__}", axis, allowed)
    small, sizes = self.member(subnet), {}
    for stage in self.stages:
      depth = f"layers_{stage}"
      ids = kept_ids(subnet.chosen.get(depth, getattr(self, depth)))
      if not ids or ids[0] != 0:
        raise UserError(f"sub-network {subnet}: {depth} leaves out block 0, which has the stage's stride")
      hidden = small.hidden(stage)
      sizes |= {depth: ids, f"hidden_{stage}": hidden, f"kernel_{stage}": getattr(small, f"kernel_{stage}")}
      if self.squeeze[stage]:
        sizes[f"squeeze_{stage}"] = tuple(squeezed(size) for size in hidden)
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
      `logits` `[batch, classes]`, `features` `[batch, head[-1]]`, and with `taps` the blocks' outputs, for
      each stage `[layers, batch, rows, columns, channels]`.
    """
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = dict(epsilon=self.epsilon, **dtypes)
    stem = divisible(self.stem * self.width)
    x = ConvNorm("channels", "stem", stem, 3, self.stem_stride, self.stem_activation, name="stem", **norm)(
      images, train)
    x = InvertedResidual(0, "stem", self.channels(0), None, 3, self.strides[0], self.squeeze[0],
                         self.activations[0], name="fixed", **norm)(x, {}, train=train)
    outputs = []
    for s in self.stages:
      block = functools.partial(
        InvertedResidual, s, width=self.channels(s), squeeze=self.squeeze[s], act=self.activations[s],
        transforms=self.transforms, **norm)
      x, tap = stack(
        functools.partial(block, reads=f"embed_{s}"), x, layers=getattr(self, f"layers_{s}"),
        lead=functools.partial(block, reads=f"embed_{s - 1}", stride=self.strides[s]),
        sizes={"hidden": self.hidden(s), "kernel": getattr(self, f"kernel_{s}")}, name=f"stage_{s}",
        depth=f"layers_{s}", remat=self.remat, taps=taps, unroll=self.unroll, train=train)
      outputs.append(tap)

    reads = f"embed_{self.stages[-1]}"
    spaces = [f"head_{i}" for i in range(len(self.head) - 1)] + ["features"]
    head = [divisible(size * self.width) for size in self.head]
    x = ConvNorm(reads, spaces[0], head[0], act=self.head_activation, name="head_0", **norm)(x, train)
    x = x.mean((1, 2), keepdims=True)
    for i in range(1, len(head)):
      x = Convolution(spaces[i - 1], spaces[i], head[i], name=f"head_{i}", **dtypes)(x)
      x = activation(self.head_activation)(x)
    result = {"features": x[:, 0, 0]}
    if self.classes:
      features = nn.Dropout(self.dropout, deterministic=not train)(result["features"])
      result["logits"] = Linear("features -> classes", (self.classes,), name="classifier", **dtypes)(features)
    return result | ({"taps": tuple(outputs)} if taps else {})


def squeezed(hidden: int) -> int:
  """The hidden units of squeeze-excite on so many channels."""
  return divisible(hidden // 4)


class InvertedResidual(nn.Module):
  """Expansion, depthwise convolution, squeeze-excite and projection, on a residual branch where it fits.

  Attributes:
    stage: Its stage, in the names of its axes.
    reads: Axis of the channels that it reads.
    width: Channels that it writes.
    hidden: Channels between; None: those that it reads, not expanded.
    kernel: Side of the depthwise kernel.
    stride: Of the depthwise convolution.
    squeeze: Whether there is squeeze-excite.
    act: Name of the activation.
    transforms: As in `Convolution`.
    epsilon: Of the normalisation.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  stage: int
  reads: str
  width: int
  hidden: int | None
  kernel: int
  stride: int = 1
  squeeze: bool = False
  act: str = "relu"
  transforms: bool = False
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, train):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, width]`."""
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = dict(epsilon=self.epsilon, **dtypes)
    y, s = x, self.stage
    hidden, choice = (f"hidden_{s}", f"kernel_{s}") if self.hidden else (self.reads, None)
    if self.hidden:
      y = ConvNorm(self.reads, hidden, self.hidden, act=self.act, name="expand", **norm)(y, train)
    y = ConvNorm(None, hidden, y.shape[-1], self.kernel, self.stride, self.act, choice=choice,
                 transforms=self.transforms, name="depthwise", **norm)(y, train)
    if self.squeeze:
      y = SqueezeExcite(hidden, f"squeeze_{s}", squeezed(y.shape[-1]), name="squeeze", **dtypes)(y)
    y = ConvNorm(hidden, f"embed_{s}", self.width, name="project", **norm)(y, train)
    return x + y if self.stride == 1 and x.shape[-1] == self.width else y


def space(model: MobileNet, layers=(2, 3, 4), expand=(3, 4, 6), kernel=(3, 5, 7)) -> Space:
  """The family of a network: depth in each stage, expansion and kernel in each block.

  Choices above what a stage of `model` has are left out.

  Example:
    >>> from nestnet.models.mobilenet_v3 import MobileNetV3
    >>> space(MobileNetV3(1000)).size == (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5
    True
  """
  choices: dict[str, tuple[int, ...]] = {}
  for axis, sizes in (("layers", layers), ("expand", expand), ("kernel", kernel)):
    for s in model.stages:
      full = getattr(model, f"{axis}_{s}")
      choices[f"{axis}_{s}"] = tuple(size for size in sizes if size <= full) or (full,)
  free = [axis for axis in choices if re.match("expand|kernel", axis)]
  return Space(**choices, per_layer=free)
