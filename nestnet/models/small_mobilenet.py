"""A MobileNet for tiny images."""

from __future__ import annotations

from nestnet.models.mobilenet import MobileNet
from nestnet.subnet import Size


class SmallMobileNet(MobileNet):
  """Three stages, for images of about 12 x 12 pixels such as those of `digits_clutter`.

  Example:
    >>> SmallMobileNet(10).hidden(3)
    (64, 128, 128)
  """

  layers_1: int = 3
  layers_2: int = 3
  layers_3: int = 3
  expand_1: Size = 4
  expand_2: Size = 4
  expand_3: Size = 4
  kernel_1: Size = 5
  kernel_2: Size = 5
  kernel_3: Size = 5
  stem: int = 8
  widths: tuple[int, ...] = (8, 8, 16, 32)
  head: tuple[int, ...] = (96,)
  strides: tuple[int, ...] = (1, 1, 2, 1)
  squeeze: tuple[bool, ...] = (False, False, False, True)
  activations: tuple[str, ...] = ("relu", "relu", "h_swish", "h_swish")
  # Its stacks are short: loops over them cost more than they save.
  unroll: int = 2
