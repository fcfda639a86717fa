"""A plain ResNet for tiny images."""

from __future__ import annotations

from nestnet.models.resnet import ResNet


class TinyResNet(ResNet):
  """Three stages, for images of about 12 x 12 pixels such as those of `digits_clutter`.

  It is POA's network at a sixteenth of its widths: its members have 4, 6 or 8 hidden channels in the first
  stage, and `groups=2` are POA's groups of 2, 3 and 4 channels there.

  Example:
    >>> model = TinyResNet(10)
    >>> [(width, model.hidden(s)) for s, width in zip(model.stages, model.widths)]
    [(16, 8), (32, 16), (64, 32)]
    >>> from nestnet.models.resnet import space
    >>> space(model, (4, 6, 8), (2, 3, 4), (2, 3, 4)).size
    27
  """

  layers_1: int = 2
  layers_2: int = 4
  layers_3: int = 4
  width: int = 8
  stem: int = 16
  widths: tuple[int, ...] = (16, 32, 64)
  stem_kernel: int = 3
  stem_stride: int = 1
  pool: bool = False
  strides: tuple[int, ...] = (1, 2, 2)
  group: int = 2
