"""ProxylessNAS (1812.00332) with the space of Once-for-All (1908.09791)."""

from __future__ import annotations

from nestnet.models.mobilenet import MobileNet


# Fields of a variant for images of 32 x 32: the stem has no stride, the whole one of 8.
SMALL_IMAGES = {"stem_stride": 1, "strides": (1, 1, 2, 2, 1, 2, 1)}


class ProxylessNAS(MobileNet):
  """Six stages, the last one of a single block, without squeeze-excite; ReLU6 everywhere.

  Example:
    >>> ProxylessNAS(1000).channels(6)
    416
  """

  layers_6: int = 1
  width: float = 1.3
  stem: int = 32
  widths: tuple[int, ...] = (16, 24, 40, 80, 96, 192, 320)
  head: tuple[int, ...] = (1280,)
  strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
  squeeze: tuple[bool, ...] = (False,) * 7
  activations: tuple[str, ...] = ("relu6",) * 7
  stem_activation: str = "relu6"
  head_activation: str = "relu6"
  epsilon: float = 1e-3
