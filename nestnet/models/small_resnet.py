"""A ResNet-D for tiny images."""

from __future__ import annotations

from nestnet.models.resnet50d import ResNet50D
from nestnet.subnet import Size


class SmallResNet(ResNet50D):
  """Three stages, for images of about 12 x 12 pixels such as those of `digits_clutter`.

  Example:
    >>> model = SmallResNet(10)
    >>> [(model.channels(s), model.hidden(s)) for s in model.stages]
    [(16, 16), (24, 24), (32, 32)]
  """

  layers_1: int = 3
  layers_2: int = 3
  layers_3: int = 3
  expand_1: Size = 100
  expand_2: Size = 100
  expand_3: Size = 100
  stem: int = 16
  widths: tuple[int, ...] = (16, 24, 32)
  pool: bool = False
  strides: tuple[int, ...] = (1, 2, 1)
  # Its stacks are short: loops over them cost more than they save.
  unroll: int = 2
