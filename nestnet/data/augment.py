"""Augmentations: functions of a batch of images and of random draws, vectorised over the batch.

Each takes images `[batch, height, width, channels]` in [0, 1] and `draws`, used as a
`np.random.Generator` whose every draw has `size=(batch, ...)`, and gives images of the same shape.
What comes in from outside an image is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nestnet import errors
from nestnet import imports
from nestnet.data import resampling
from nestnet.data.draws import Augment
from nestnet.data.draws import Draws

SHIFT_PIXELS = 0.5
ROTATION_DEGREES = 8.0
SCALE_RANGE = (0.9, 1.1)
CROP_PADDING = 4


def digits(images: np.ndarray, draws: Draws) -> np.ndarray:
  """Shifts by up to half a pixel, rotates by up to 8 degrees, scales by up to a tenth; never flips.

  One bilinear resampling does all three.

  Args:
    images: `[batch, height, width, channels]`.
    draws: The random numbers.

  Returns:
    Images of the same shape.

  Example:

  >>> images = np.ones((2, 8, 8, 1), np.float32)
  >>> digits(images, Draws(0, 0, 2, slice(0, 2))).shape
  (2, 8, 8, 1)
  """
  batch, height, width, _ = images.shape
  turn = np.deg2rad(draws.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, (batch, 1, 1)))
  scale = draws.uniform(*SCALE_RANGE, (batch, 1, 1))
  shift = draws.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, (batch, 2, 1, 1)).astype(np.float32)
  cos = (np.cos(turn) / scale).astype(np.float32)
  sin = (np.sin(turn) / scale).astype(np.float32)
  y = np.arange(height, dtype=np.float32)[:, None] - (height - 1) / 2
  x = np.arange(width, dtype=np.float32) - (width - 1) / 2
  # Where each pixel comes from, in an image with a border (hence + 1).
  from_y = cos * y - sin * x + shift[:, 0] + (height + 1) / 2
  from_x = sin * y + cos * x + shift[:, 1] + (width + 1) / 2
  return resampling.bilinear(images, from_y, from_x)


def crop_flip(images: np.ndarray, draws: Draws) -> np.ndarray:
  """Pads by 4 pixels, crops at random to the size that was, flips half of them left to right.

  The standard augmentation of CIFAR (He et al. 2016, "Deep Residual Learning", section 4.2).

  Args:
    images: `[batch, height, width, channels]`.
    draws: The random numbers.

  Returns:
    Images of the same shape.

  Example:

  >>> images = np.ones((2, 32, 32, 3), np.float32)
  >>> crop_flip(images, Draws(0, 0, 2, slice(0, 2))).shape
  (2, 32, 32, 3)
  """
  batch, height, width, _ = images.shape
  shift = draws.integers(0, 2 * CROP_PADDING + 1, (batch, 2, 1))
  flip = draws.integers(0, 2, (batch, 1)) == 1
  rows = shift[:, 0] + np.arange(height)
  columns = shift[:, 1] + np.where(flip, np.arange(width)[::-1], np.arange(width))
  border = (CROP_PADDING, CROP_PADDING)
  padded = np.pad(images, ((0, 0), border, border, (0, 0)))
  return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


NAMED: dict[str, Augment | None] = {"none": None, "digits": digits, "crop_flip": crop_flip}


def by_name(name: str) -> Augment | None:
  """Returns an augmentation by its name.

  Args:
    name: `none` (gives None), `digits`, `crop_flip`, or a user's `package.module:function`.

  Raises:
    errors.UserError: If there is none of that name.

  Example:

  >>> by_name("crop_flip") is crop_flip
  True
  """
  return named("augmentation", name, NAMED)


def named(what: str, name: str, known: Mapping[str, Callable[..., Any] | None]) -> Callable[..., Any] | None:
  """Returns one of the functions in `known`, or a user's own; raises as `by_name`."""
  if ":" not in name:
    if name not in known:
      raise errors.one_of(what, name, [*known, "package.module:function"])
    return known[name]
  function = imports.by_path(name, what)
  if not callable(function):
    raise errors.UserError(f"{what} {name!r}: got {type(function).__name__}, allowed: a function")
  return function
