"""The block of deep ResNets (He et al., 1512.03385)."""

from __future__ import annotations

import flax.linen as nn

from nestnet.models.convolution import ConvNorm, Normed, average


class Bottleneck(Normed):
  """Three convolutions on a residual branch.

  Attributes:
    stage: Its stage, in the names of its axes.
    reads: Axis of the channels that it reads.
    width: Channels that it writes.
    hidden: Channels between.
    stride: Of the convolution of 3 x 3.
    shortcut: Whether what it reads is projected, to be added.
    averages: Whether the shortcut takes means over the stride (ResNet-D), or each first position.
    zero_gamma: Whether the residual branch starts at 0.
  """

  stage: int
  reads: str
  width: int
  hidden: int
  stride: int = 1
  shortcut: bool = False
  averages: bool = True
  zero_gamma: bool = False

  @nn.compact
  def __call__(self, x, constants, *, train):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, width]`."""
    norm = self.normed
    hidden, inner, writes = f"hidden_{self.stage}", f"inner_{self.stage}", f"embed_{self.stage}"
    y = ConvNorm(self.reads, hidden, self.hidden, act="relu", name="reduce", **norm)(x, train)
    y = ConvNorm(hidden, inner, self.hidden, 3, self.stride, "relu", name="spatial", **norm)(y, train)
    y = ConvNorm(inner, writes, self.width, zero=self.zero_gamma, name="expand", **norm)(y, train)
    if self.shortcut:
      x, stride = (average(x, self.stride), 1) if self.averages else (x, self.stride)
      x = ConvNorm(self.reads, writes, self.width, stride=stride, name="shortcut", **norm)(x, train)
    return nn.relu(x + y)
