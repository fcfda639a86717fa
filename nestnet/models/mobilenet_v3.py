"""MobileNetV3 (1905.02244) with the space of Once-for-All (1908.09791)."""

from __future__ import annotations

from nestnet.models.mobilenet import MobileNet


# Fields of the variant for images of 32 x 32 (DepS): the stem has no stride, the whole one of 8.
SMALL_IMAGES = {"stem_stride": 1, "strides": (1, 1, 2, 2, 1, 2)}


class MobileNetV3(MobileNet):
  """The supernet of Once-for-All: five stages, squeeze-excite in the second, fourth and fifth.

  `MobileNetV3(10, **SMALL_IMAGES)` is the variant for images of 32 x 32.

  Example:
    >>> MobileNetV3(1000, width=1.2).channels(5)
    192
  """
