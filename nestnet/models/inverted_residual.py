"""The block of MobileNetV2 and its successors."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax

from nestnet.models.convolution import ConvNorm, Convolution, Normed, SqueezeExcite, average, divisible
from nestnet.models.layers import residual


def squeezed(hidden: int) -> int:
  """The hidden units of squeeze-excite on so many channels."""
  return divisible(hidden // 4)


class InvertedResidual(Normed):
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
    choice: Axis by which the kernel's size is chosen, None: it is fixed.
    transforms: As in `Convolution`.
    shortcut: Whether what it reads is averaged over the stride and projected, to be added.
    zero_gamma: Whether the residual branch starts at 0.
  """

  stage: int
  reads: str
  width: int
  hidden: int | None = None
  kernel: int = 3
  stride: int = 1
  squeeze: bool = False
  act: str = "relu"
  choice: str | None = None
  transforms: bool = False
  shortcut: bool = False
  zero_gamma: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, constants: Mapping[str, jax.Array] | None = None, *, train: bool
               ) -> jax.Array:
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, width]`.

    Args:
      x: What it reads.
      constants: Of this layer: `drop_path`, the rate of dropping the residual branch, where one is. None:
        it is no layer of a stack.
      train: As in `MobileNet`.
    """
    y, s, writes = x, self.stage, f"embed_{self.stage}"
    # A name stands once in an array: what a projection to `writes` reads has another one.
    hidden = f"hidden_{s}" if self.hidden else f"carried_{s}" if self.reads == writes else self.reads
    residual_branch = self.shortcut or self.stride == 1 and x.shape[-1] == self.width
    if self.hidden:
      y = ConvNorm(self.reads, hidden, self.hidden, act=self.act, name="expand", **self.normed)(y, train)
    y = ConvNorm(None, hidden, y.shape[-1], self.kernel, self.stride, self.act, choice=self.choice,
                 transforms=self.transforms, name="depthwise", **self.normed)(y, train)
    if self.squeeze:
      y = SqueezeExcite(hidden, f"squeeze_{s}", squeezed(y.shape[-1]), name="squeeze", **self.typed)(y)
    y = ConvNorm(hidden, writes, self.width, zero=self.zero_gamma and residual_branch, name="project",
                 **self.normed)(y, train)
    if self.shortcut:
      x = Convolution(self.reads, writes, self.width, name="shortcut", **self.typed)(average(x, self.stride))
    return x + residual(self, y, constants, 0.0, train) if residual_branch else y
