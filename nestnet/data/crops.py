"""Multi-crop batches: of every image two global crops, smaller local ones, and masks of patches.

What DINO, DINOv2 and POA train on (POA, 2408.01031, sections 3 and C; DINOv2, 2304.07193). Options have
the names of DINOv2's configuration, and its defaults.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from nestnet import errors
from nestnet.data import views
from nestnet.data.draws import Draws

GLOBAL = 2
ENTRIES = ("global", "local", "mask")

# Blocks of a mask: how many are tried, their smallest area in patches, and the ratios of their sides.
BLOCKS = 10
LEAST_BLOCK = 4
BLOCK_RATIO = (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class Crops:
  """Which crops a batch has of each of its images.

  Two global crops, of which a network's teacher sees the whole, and local ones; and masks over the
  patches of some of the global crops (iBOT, 2111.07832).

  Attributes:
    augment: `digits`, `dinov2`, `dinov2_code`, `none`, or a user's `package.module:function`, as in
      `nestnet.data.views`.
    global_crops_size: Side of the global crops, in pixels, at most that of the images. Networks are made
      for it, and evaluated on whole images, resized to it where they are larger.
    global_crops_scale: Smallest and largest share of the image's area that they show.
    local_crops_number: How many local crops there are.
    local_crops_size: Their side.
    local_crops_scale: As that of the global crops.
    mask_sample_probability: How many of a batch's global crops have a mask; 0: there are no masks.
    mask_ratio_min_max: Smallest and largest share of the patches that a mask hides.
    mask_patch: Side of the patches that masks hide, in pixels, which must divide the global crops.

  Raises:
    errors.UserError: If an option is out of its range.

  Example:

  >>> crops = Crops("digits", 12, local_crops_number=2, local_crops_size=6)
  >>> {name: shape for name, (shape, _) in crops.entries(channels=1).items()}
  {'global': (2, 12, 12, 1), 'local': (2, 6, 6, 1)}
  """

  augment: str = "dinov2"
  global_crops_size: int = 224
  global_crops_scale: tuple[float, float] = (0.32, 1.0)
  local_crops_number: int = 8
  local_crops_size: int = 96
  local_crops_scale: tuple[float, float] = (0.05, 0.32)
  mask_sample_probability: float = 0.0
  mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
  mask_patch: int = 0

  def __post_init__(self):
    views.by_name(self.augment)
    for name in ("global_crops_size", "local_crops_size"):
      if not _whole(getattr(self, name), 1):
        raise _wrong(name, getattr(self, name), "a whole number of at least 1, in pixels")
    if not _whole(self.local_crops_number, 0):
      raise _wrong("local_crops_number", self.local_crops_number, "a whole number of at least 0")
    for name in ("global_crops_scale", "local_crops_scale", "mask_ratio_min_max"):
      if not _range(value := getattr(self, name)):
        raise _wrong(name, value, "two shares above 0, at most 1, the smaller one first, such as (0.1, 0.5)")
    if not (_number(self.mask_sample_probability) and 0 <= self.mask_sample_probability <= 1):
      raise _wrong("mask_sample_probability", self.mask_sample_probability, "a share from 0 to 1")
    if not _whole(self.mask_patch, 0):
      raise _wrong("mask_patch", self.mask_patch, "a whole number of at least 1, in pixels")
    if self.mask_sample_probability and (not self.mask_patch or self.global_crops_size % self.mask_patch):
      raise _wrong("mask_patch", self.mask_patch,
                   f"with masks (mask_sample_probability={self.mask_sample_probability}) the side of a patch "
                   f"that divides global_crops_size={self.global_crops_size}")

  @property
  def views(self) -> tuple[views.View, ...]:
    """The crops of an image, the global ones first."""
    counts = {"global": GLOBAL, "local": self.local_crops_number}
    return tuple(
        views.View(kind, i, getattr(self, f"{kind}_crops_size"), getattr(self, f"{kind}_crops_scale"))
        for kind, count in counts.items() for i in range(count))

  def entries(self, channels: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of what it adds to an example, the images having so many channels."""
    made = {"global": ((GLOBAL, *self._square("global"), channels), np.float32)}
    if self.local_crops_number:
      made["local"] = ((self.local_crops_number, *self._square("local"), channels), np.float32)
    if self.mask_sample_probability:
      made["mask"] = ((GLOBAL, self._patches ** 2), np.bool_)
    return made

  def check(self, name: str, shape: tuple[int, int, int]) -> None:
    """Raises `errors.UserError` unless crops can be made of the images of a data set.

    Args:
      name: Of the data set, for the message.
      shape: `(height, width, channels)` of its images.
    """
    for view in self.views:
      if view.side > min(shape[:2]):
        raise _wrong(f"{view.kind}_crops_size", view.side,
                     f"at most {min(shape[:2])}: the images of {name} have {shape[0]} x {shape[1]} pixels")
    # A function of the user's, and the channels.
    self.cut(np.zeros((1, *shape), np.float32), Draws(0, 0, 1, slice(0, 1)))

  def cut(self, images: np.ndarray, draws: Draws) -> dict[str, np.ndarray]:
    """Makes the crops of images.

    Args:
      images: `[batch, height, width, channels]` float32 in [0, 1].
      draws: The random numbers.

    Returns:
      `global` `[batch, 2, side, side, channels]`, and `local` `[batch, crops, side, side, channels]` if
      there are local crops; float32 in [0, 1].

    Raises:
      errors.UserError: The augmentation gives crops of another shape.
    """
    function, made = views.by_name(self.augment), {}
    for view in self.views:
      crop = np.asarray(function(images, draws, view), np.float32)
      wanted = len(images), view.side, view.side, images.shape[-1]
      if crop.shape != wanted:
        raise errors.UserError(
            f"{view.kind} crops of {self.augment}: got shape {crop.shape}, allowed: {wanted}")
      made.setdefault(view.kind, []).append(crop)
    return {kind: np.stack(crops, axis=1) for kind, crops in made.items()}

  def masks(self, batch: int, draws: Draws) -> np.ndarray:
    """Draws which patches of the global crops are hidden.

    Of the global crops of the whole batch `mask_sample_probability` have a mask, exactly. The shares of
    patches that these hide are spread evenly over `mask_ratio_min_max`. A mask is made of blocks (BEiT,
    2106.08254, algorithm 1): of an area between 4 patches and what is missing, and ratios of 0.3 to 1 / 0.3;
    what ten of them leave missing are single patches at random.

    Args:
      batch: Number of images.
      draws: The random numbers.

    Returns:
      `[batch, 2, patches]` bool, patches row by row.
    """
    side, count = self._patches, self._patches ** 2
    place = draws.stratified((batch, GLOBAL))
    # Those that have a mask are spread evenly over [0, probability), and so are the ratios.
    low, high = self.mask_ratio_min_max
    ratio = low + (high - low) * place / self.mask_sample_probability
    hidden = np.where(place < self.mask_sample_probability, np.maximum(ratio * count, 1).astype(int), 0)
    blocks = draws.random((batch, GLOBAL, BLOCKS, 4))
    mask = np.zeros((batch, GLOBAL, side, side), np.bool_)
    for i in range(BLOCKS):
      missing = hidden - mask.sum((2, 3))
      mask |= _block(blocks[:, :, i], missing, mask)
    mask = mask.reshape(batch, GLOBAL, count)
    missing = hidden - mask.sum(2)
    # The rank of each patch in a random order in which those that are hidden come last.
    rank = (draws.random(mask.shape) + mask).argsort(2).argsort(2)
    return mask | (rank < missing[..., None])

  @property
  def _patches(self) -> int:
    """Patches along a side of a global crop."""
    return self.global_crops_size // self.mask_patch

  def _square(self, kind: str) -> tuple[int, int]:
    return (getattr(self, f"{kind}_crops_size"),) * 2


def _block(drawn: np.ndarray, missing: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """A block for each mask `[batch, crops, side, side]`, empty where one would hide too much or nothing."""
  side = mask.shape[-1]
  least = np.minimum(LEAST_BLOCK, missing)
  area = least + drawn[..., 0] * (missing - least)
  ratio = np.exp(np.log(BLOCK_RATIO[0]) + drawn[..., 1] * np.log(BLOCK_RATIO[1] / BLOCK_RATIO[0]))
  tall, wide = (np.clip(np.rint(np.sqrt(x)), 1, side) for x in (area * ratio, area / ratio))
  top, left = np.floor(drawn[..., 2] * (side - tall + 1)), np.floor(drawn[..., 3] * (side - wide + 1))
  rows, columns = np.arange(side)[:, None], np.arange(side)
  top, left, tall, wide = (x[..., None, None] for x in (top, left, tall, wide))
  block = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
  return block & ((block & ~mask).sum((2, 3)) <= missing)[..., None, None]


def _number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _range(value: Any) -> bool:
  return (isinstance(value, tuple) and len(value) == 2 and all(map(_number, value))
          and 0 < value[0] <= value[1] <= 1)


def _wrong(name: str, got: Any, allowed: str) -> errors.UserError:
  return errors.UserError(f"config.data.crops.{name}: got {got}, allowed: {allowed}")
