"""MobileNetV3 (1905.02244) with the space of Once-for-All (1908.09791)."""

from __future__ import annotations

from nestnet.models.mobilenet import MobileNet


class MobileNetV3(MobileNet):
  """The supernet of Once-for-All: five stages, squeeze-excite in the second, fourth and fifth.

  `stem_stride=1, strides=(1, 1, 2, 2, 1, 2)` is the variant for images of 32 x 32, of total stride 8.

  Example:
    >>> MobileNetV3(1000, width=1.2).channels(5)
    192
  """
