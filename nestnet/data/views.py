"""Augmentations of multi-crop training: from images to one crop of each, vectorised over the batch.

Each takes images `[batch, height, width, channels]` in [0, 1], `draws` (used as a
`np.random.Generator` whose every draw has `size=(batch, ...)`) and the `View` that is wanted, and
gives crops `[batch, side, side, channels]` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import numpy as np

from nestnet import errors
from nestnet.data import augment
from nestnet.data import resampling
from nestnet.data.draws import Draws

# Of `digits`: pixels of the image, degrees, factors, and grey values of [0, 1].
SHIFT_PIXELS = 1.0
ROTATION_DEGREES = 15.0
CONTRAST_RANGE = (0.7, 1.3)
NOISE = 0.05

# Of `dinov2`: by how much factors of brightness, contrast and saturation differ from 1; hues are in turns.
RATIO = (3 / 4, 4 / 3)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
JITTERED = 0.8
GRAY = 0.2
BLUR_SIGMA = (0.1, 2.0)
BLUR_REACH = 4
SOLARIZED = 0.2
SOLARIZED_FROM = 128 / 255
# How often the first and the second global crop and the local ones are blurred.
BLURRED = (1.0, 0.1, 0.5)
BLURRED_BY_CODE = (0.0, 0.9, 0.5)

# Of red, green and blue in a grey value: ITU-R 601, as Pillow's.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class View:
  """One of the crops that are made of every image.

  Attributes:
    kind: `global` or `local`.
    number: Which of its kind, from 0.
    side: Of the crop, in pixels.
    scale: Smallest and largest share of the image's area that it shows.
  """

  kind: str
  number: int
  side: int
  scale: tuple[float, float]


Cut = Callable[[np.ndarray, Draws, View], np.ndarray]


def none(images: np.ndarray, draws: Draws, view: View) -> np.ndarray:
  """Crops of the image's ratio and of a random area, at a random place, resized; nothing else.

  Example:

  >>> images = np.ones((2, 12, 12, 1), np.float32)
  >>> none(images, Draws(0, 0, 2, slice(0, 2)), View("local", 0, 6, (0.2, 0.4))).shape
  (2, 6, 6, 1)
  """
  return _cropped(images, view, resampling.boxes(draws, len(images), images.shape[1:3], view.scale))


def digits(images: np.ndarray, draws: Draws, view: View) -> np.ndarray:
  """Crops for digits: as `none`, shifted, rotated, of another contrast, and noisy; never flipped.

  A shift by up to a pixel and a rotation by up to 15 degrees may take them beyond the image's edge, where
  all is 0; one bilinear resampling does these and the crop. Contrast is between 0.7 and 1.3 of what it
  was, around the crop's mean; the noise is normal, of standard deviation 0.05.

  Example:

  >>> images = np.ones((2, 12, 12, 1), np.float32)
  >>> digits(images, Draws(0, 0, 2, slice(0, 2)), View("local", 0, 6, (0.2, 0.4))).shape
  (2, 6, 6, 1)
  """
  batch = len(images)
  top, left, height, width = (
      x[:, None, None] for x in resampling.boxes(draws, batch, images.shape[1:3], view.scale))
  shift = draws.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, (batch, 2, 1, 1))
  turn = np.deg2rad(draws.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, (batch, 1, 1)))
  along = (np.arange(view.side) + 0.5) / view.side - 0.5
  y, x = along[:, None] * height, along * width
  # The middle of the image's first pixel is 1 in an image with a border.
  from_y = np.cos(turn) * y - np.sin(turn) * x + shift[:, 0] + top + height / 2 + 0.5
  from_x = np.sin(turn) * y + np.cos(turn) * x + shift[:, 1] + left + width / 2 + 0.5
  crops = resampling.bilinear(images, from_y.astype(np.float32), from_x.astype(np.float32))
  contrast = draws.uniform(*CONTRAST_RANGE, (batch, 1, 1, 1)).astype(np.float32)
  mean = crops.mean((1, 2, 3), keepdims=True)
  noise = draws.normal(0, NOISE, crops.shape).astype(np.float32)
  return np.clip(mean + contrast * (crops - mean) + noise, 0, 1)


def dinov2(images: np.ndarray, draws: Draws, view: View, blurred: tuple[float, float, float] = BLURRED
           ) -> np.ndarray:
  """Crops for natural images, as DINOv2 (2304.07193) makes them; images are gray, or red, green and blue.

  A crop of ratio 3/4 to 4/3, bicubic; half of them flipped left to right; of 0.8 brightness, contrast,
  saturation (factors of 1 +- 0.4, 0.4, 0.2) and hue (+- 0.1 of a turn) jittered, in random order; 0.2
  made gray; a Gaussian blur of sigma 0.1 to 2 over 9 pixels, of all first global crops, 0.1 of the second,
  0.5 of the local ones; 0.2 of the second global crops solarised from 128 on (dinov2/data/augmentations.py).

  These are the probabilities of blurs that DINO (2104.14294) states and DINOv2's code names. What that
  code does, and POA's with it, is their complement (facebookresearch/dinov2 pull request 411): never, 0.9,
  0.5. That is `dinov2_code` by name.

  Args:
    images: `[batch, height, width, channels]`.
    draws: The random numbers.
    view: Which crop.
    blurred: How many of the first and of the second global crops and of the local ones are blurred.

  Raises:
    errors.UserError: Images of other than 1 or 3 channels.

  Example:

  >>> images = np.ones((2, 12, 12, 3), np.float32)
  >>> dinov2(images, Draws(0, 0, 2, slice(0, 2)), View("local", 0, 6, (0.2, 0.4))).shape
  (2, 6, 6, 3)
  """
  batch, channels = len(images), images.shape[-1]
  if channels not in (1, 3):
    raise errors.UserError(f"crops of dinov2: got images of {channels} channels, allowed: 1 or 3")
  box = resampling.boxes(draws, batch, images.shape[1:3], view.scale, RATIO)
  crops = _cropped(images, view, box, draws.random(batch) < 0.5)
  _jitter(crops, draws)
  gray = draws.random(batch) < GRAY
  crops[gray] = _gray(crops[gray])
  share = blurred[2] if view.kind == "local" else blurred[min(view.number, 1)]
  blur, sigma = draws.random(batch) < share, draws.uniform(*BLUR_SIGMA, batch)
  weights = resampling.gaussian(sigma[blur], view.side, BLUR_REACH)
  crops[blur] = resampling.apply(weights, weights, crops[blur])
  if (view.kind, view.number) == ("global", 1):
    solarized = (draws.random(batch) < SOLARIZED)[:, None, None, None] & (crops >= SOLARIZED_FROM)
    crops = np.where(solarized, 1 - crops, crops)
  return crops


NAMED: dict[str, Cut] = {
    "none": none, "digits": digits, "dinov2": dinov2,
    "dinov2_code": functools.partial(dinov2, blurred=BLURRED_BY_CODE)}


def by_name(name: str) -> Cut:
  """Returns an augmentation of crops by its name.

  Args:
    name: `none`, `digits`, `dinov2`, `dinov2_code`, or a user's `package.module:function`.

  Raises:
    errors.UserError: If there is none of that name.

  Example:

  >>> by_name("digits") is digits
  True
  """
  return augment.named("augmentation of crops", name, NAMED)


def _cropped(images: np.ndarray, view: View, box: np.ndarray, flipped: np.ndarray | None = None
             ) -> np.ndarray:
  top, left, height, width = box
  rows = resampling.cubic(top, height, images.shape[1], view.side)
  columns = resampling.cubic(left, width, images.shape[2], view.side)
  if flipped is not None:
    columns[flipped] = columns[flipped, ::-1]
  return np.clip(resampling.apply(rows, columns, images), 0, 1)


def _jitter(crops: np.ndarray, draws: Draws) -> None:
  """Changes the colours of most crops, in place, as torchvision's `ColorJitter`."""
  batch = len(crops)
  jittered = draws.random(batch) < JITTERED
  order = draws.random((batch, len(JITTER))).argsort(1)
  by = draws.uniform(-1, 1, (batch, len(JITTER))).astype(np.float32)
  for turn in range(len(JITTER)):
    for i, (what, most) in enumerate(JITTER.items()):
      rows = np.flatnonzero(jittered & (order[:, turn] == i))
      if len(rows):
        amount = most * by[rows, i, None, None, None]
        crops[rows] = np.clip(_CHANGES[what](crops[rows], amount), 0, 1)


def _brighter(crops: np.ndarray, by: np.ndarray) -> np.ndarray:
  return crops * (1 + by)


def _contrasted(crops: np.ndarray, by: np.ndarray) -> np.ndarray:
  mean = _gray(crops).mean((1, 2, 3), keepdims=True)
  return mean + (1 + by) * (crops - mean)


def _saturated(crops: np.ndarray, by: np.ndarray) -> np.ndarray:
  gray = _gray(crops)
  return gray + (1 + by) * (crops - gray)


def _rehued(crops: np.ndarray, by: np.ndarray) -> np.ndarray:
  """Turns hues, leaving the largest and the smallest of red, green and blue (value and saturation)."""
  if crops.shape[-1] == 1:
    return crops
  red, green, blue = np.moveaxis(crops, -1, 0)
  # Along so short an axis, NumPy's own maximum is several times slower.
  value, least = (f(f(red, green), blue) for f in (np.maximum, np.minimum))
  chroma = value - least
  # Where there is none, any hue will do.
  safe = np.where(chroma > 0, chroma, 1)
  sixths = np.where(
      value == red, (green - blue) / safe,
      np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
  sixths = sixths[..., None] + 6 * by
  # How far red, green and blue are below the value, by the distance of the hue from theirs.
  place = (np.array([5, 3, 1], np.float32) + sixths) % 6
  below = np.clip(np.minimum(place, 4 - place), 0, 1)
  return value[..., None] - chroma[..., None] * below


_CHANGES = {"brightness": _brighter, "contrast": _contrasted, "saturation": _saturated, "hue": _rehued}


def _gray(crops: np.ndarray) -> np.ndarray:
  """What is gray of crops, `[batch, side, side, 1]`."""
  return crops if crops.shape[-1] == 1 else (crops @ LUMA)[..., None]
