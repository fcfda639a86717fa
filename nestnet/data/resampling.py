"""Images to other pixels: where crops lie, and what is read there; vectorised over the batch."""

from __future__ import annotations

import functools

import numpy as np

from nestnet.data.draws import Draws

ATTEMPTS = 10


def boxes(draws: Draws, batch: int, shape: tuple[int, int], scale: tuple[float, float],
          ratio: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
  """Draws where crops lie in their images.

  The share of the image's area and the logarithm of the ratio of width to height are uniform; of ten
  attempts the first that fits into the image counts, and where none does the first, with the image's
  own ratio. The place is uniform. As torchvision's `RandomResizedCrop`, but not rounded to pixels, and
  always of an area in `scale`.

  Args:
    draws: The random numbers.
    batch: Number of images.
    shape: `(height, width)` of an image.
    scale: Smallest and largest share of the area, in (0, 1].
    ratio: Smallest and largest ratio of width to height.

  Returns:
    `[4, batch]`: top, left, height and width, in pixels.

  Example:

  >>> top, left, height, width = boxes(Draws(0, 0, 2, slice(0, 2)), 2, (8, 8), (0.25, 0.25))
  >>> height.tolist(), width.tolist()
  ([4.0, 4.0], [4.0, 4.0])
  """
  share = draws.uniform(*scale, (batch, ATTEMPTS))
  ratios = np.exp(draws.uniform(*np.log(ratio), (batch, ATTEMPTS)))
  area = share * (shape[0] * shape[1])
  heights, widths = np.sqrt(area / ratios), np.sqrt(area * ratios)
  fits = (heights <= shape[0]) & (widths <= shape[1])
  first = np.arange(batch), fits.argmax(1)
  own = np.sqrt(share[:, 0])
  height = np.where(fits.any(1), heights[first], own * shape[0])
  width = np.where(fits.any(1), widths[first], own * shape[1])
  place = draws.random((batch, 2))
  return np.stack([place[:, 0] * (shape[0] - height), place[:, 1] * (shape[1] - width), height, width])


def bilinear(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Reads images between their pixels; outside of them is 0.

  Args:
    images: `[batch, height, width, channels]` float32.
    y: Rows `[batch, rows, columns]` float32, of the image with a border of one pixel: its first row is 1.
    x: Columns likewise.

  Returns:
    `[batch, rows, columns, channels]` float32.

  Example:

  >>> images = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
  >>> bilinear(images, np.full((1, 1, 1), 1.5, np.float32), np.full((1, 1, 1), 1.5, np.float32)).item()
  1.5
  """
  batch, height, width, channels = images.shape
  y, x = np.clip(y, 0, height + 1), np.clip(x, 0, width + 1)
  top, left = np.minimum(y.astype(np.int32), height), np.minimum(x.astype(np.int32), width)
  down, right = (y - top)[..., None], (x - left)[..., None]
  padded = np.zeros((batch, height + 2, width + 2, channels), np.float32)
  padded[:, 1:-1, 1:-1] = images
  pixels = padded.reshape(-1, channels)
  corner = np.arange(batch, dtype=np.int32)[:, None, None] * (height + 2)
  corner = (corner + top) * (width + 2) + left
  upper, upper_right, lower, lower_right = (
      pixels.take(corner + offset, 0) for offset in (0, 1, width + 2, width + 3))
  upper += (upper_right - upper) * right
  lower += (lower_right - lower) * right
  return upper + (lower - upper) * down


def cubic(start: np.ndarray, extent: np.ndarray, length: int, side: int) -> np.ndarray:
  """The weights of bicubic resampling along one dimension, as Pillow has them, antialiasing included.

  Args:
    start: Where the part that is read begins, in pixels, `[batch]`.
    extent: How long it is, `[batch]`.
    length: Pixels of the image.
    side: Pixels of the result.

  Returns:
    `[batch, side, length]` float32; the weights of a pixel of the result sum to 1.

  Example:

  >>> cubic(np.zeros(1), np.full(1, 2.0), length=2, side=2)[0].tolist()
  [[1.0, 0.0], [0.0, 1.0]]
  """
  step = (extent / side)[:, None, None]
  middle = start[:, None, None] + (np.arange(side)[:, None] + 0.5) * step
  # Where the result is coarser than the image, a pixel of it reads as much more.
  t = np.abs(np.arange(length) + 0.5 - middle) / np.maximum(step, 1)
  # Keys' kernel with a = -1/2.
  near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
  weights = np.where(t < 1, near, np.where(t < 2, far, 0))
  return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def gaussian(sigma: np.ndarray, side: int, reach: int) -> np.ndarray:
  """The weights of a Gaussian blur along one dimension, the image being reflected at its edges.

  Args:
    sigma: Standard deviations in pixels, `[batch]`.
    side: Pixels of the image.
    reach: How many neighbours to either side count.

  Returns:
    `[batch, side, side]` float32; the weights of a pixel of the result sum to 1.

  Example:

  >>> gaussian(np.full(1, 0.01), side=3, reach=1)[0].tolist()
  [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
  """
  offsets = np.arange(-reach, reach + 1)
  kernel = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
  kernel /= kernel.sum(1, keepdims=True)
  at = np.pad(np.arange(side), reach, mode="reflect")
  weights = np.zeros((len(sigma), side, side), np.float32)
  for i in range(2 * reach + 1):
    weights[:, np.arange(side), at[i:i + side]] += kernel[:, i, None]
  return weights


def apply(rows: np.ndarray, columns: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Applies weights along the rows and along the columns of images.

  Args:
    rows: `[batch, out_height, height]`.
    columns: `[batch, out_width, width]`.
    images: `[batch, height, width, channels]`.

  Returns:
    `[batch, out_height, out_width, channels]`.
  """
  batch, height, width, channels = images.shape
  tall, wide = rows.shape[1], columns.shape[1]
  read = (rows @ images.reshape(batch, height, width * channels)).reshape(batch, tall, width, channels)
  read = read.transpose(0, 2, 1, 3).reshape(batch, width, tall * channels)
  return (columns @ read).reshape(batch, wide, tall, channels).transpose(0, 2, 1, 3)


def resized(images: np.ndarray, side: int) -> np.ndarray:
  """Whole images as squares, by bicubic resampling that stays between an image's least and largest value.

  Args:
    images: `[batch, height, width, channels]`.
    side: Of the squares.

  Returns:
    `[batch, side, side, channels]`.

  Example:

  >>> resized(np.ones((2, 6, 8, 3), np.float32), 4).shape
  (2, 4, 4, 3)
  """
  if images.shape[1:3] == (side, side):
    return images
  rows, columns = (_whole(length, side) for length in images.shape[1:3])
  low, high = (extreme(axis=(1, 2, 3), keepdims=True) for extreme in (images.min, images.max))
  return np.clip(apply(rows, columns, images), low, high)


@functools.lru_cache(maxsize=8)
def _whole(length: int, side: int) -> np.ndarray:
  return cubic(np.zeros(1), np.full(1, float(length)), length, side)
