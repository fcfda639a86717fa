"""Random images in the shape of data sets that are not there, to measure time and memory with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Noise(Sequence):
  """Examples of uniform noise with random labels; each is a function of its number.

  Attributes:
    length: How many.
    shape: `(height, width, channels)` of an image.
    classes: Number of classes.

  Example:

  >>> noise = Noise(10, (4, 4, 3), classes=5)
  >>> noise[7]["image"].shape, bool((noise[7]["image"] == noise[7]["image"]).all())
  ((4, 4, 3), True)
  """

  length: int
  shape: tuple[int, int, int]
  classes: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    rng = np.random.default_rng(range(self.length)[index])
    image = np.frombuffer(rng.bytes(int(np.prod(self.shape))), np.uint8).reshape(self.shape)
    return {"image": image, "label": int(rng.integers(self.classes))}


class ImageNet:
  """As many images and classes as ImageNet's, at 224 x 224: `data.name=nestnet.data.synthetic:ImageNet`."""

  classes = 1000
  train = Noise(1_281_167, (224, 224, 3), classes)
  test = Noise(50_000, (224, 224, 3), classes)
