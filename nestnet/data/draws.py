"""The random numbers of a batch, the same for an example over any number of hosts."""

from __future__ import annotations

from collections.abc import Callable
import functools

import numpy as np

from nestnet import errors


class Draws:
  """The random numbers of one global batch, of which a host gets those of its own examples.

  Used like a `np.random.Generator`, with the methods below. Every draw has `size=(batch, ...)`,
  `batch` being the number of images at hand: an example then gets the same numbers whichever host
  reads it, however many hosts there are. Draw per example, not per pixel: every host draws for the
  whole global batch.

  Args:
    seed: Of the run's data.
    step: Which step.
    batch_size: Examples of a step, over all hosts.
    rows: Which of them are this host's.

  Example:

  >>> one, two = Draws(0, 7, 128, slice(0, 128)), Draws(0, 7, 128, slice(64, 128))
  >>> bool((one.uniform(-1, 1, (128, 2))[64:] == two.uniform(-1, 1, (64, 2))).all())
  True
  """

  def __init__(self, seed: int, step: int, batch_size: int, rows: slice):
    self._generator = np.random.default_rng((seed, step, 1))
    self._batch_size = batch_size
    self._rows = rows

  def _share(self, draw: Callable[..., np.ndarray], size: int | tuple[int, ...]) -> np.ndarray:
    size = (size,) if np.ndim(size) == 0 else tuple(size)
    here = self._rows.stop - self._rows.start
    if not size or size[0] != here:
      raise errors.UserError(
          f"size of a random draw: got {size}, allowed: ({here}, ...), a draw for each image")
    return draw(size=(self._batch_size, *size[1:]))[self._rows]

  def random(self, size: int | tuple[int, ...]) -> np.ndarray:
    """Returns uniform numbers in [0, 1)."""
    return self._share(self._generator.random, size)

  def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> np.ndarray:
    """Returns uniform numbers in [low, high)."""
    return self._share(functools.partial(self._generator.uniform, low, high), size)

  def normal(self, loc: float, scale: float, size: int | tuple[int, ...]) -> np.ndarray:
    """Returns normal numbers of mean `loc` and standard deviation `scale`."""
    return self._share(functools.partial(self._generator.normal, loc, scale), size)

  def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
    """Returns integers from `low` to `high - 1`."""
    return self._share(functools.partial(self._generator.integers, low, high), size)

  def stratified(self, size: int | tuple[int, ...]) -> np.ndarray:
    """Returns uniform numbers in [0, 1), of which the global batch has one in each of equal parts.

    So exactly half of them, over all hosts, are below a half.
    """
    return self._share(self._stratified, size)

  def _stratified(self, size: tuple[int, ...]) -> np.ndarray:
    parts = self._generator.permutation(int(np.prod(size))).reshape(size)
    return (parts + self._generator.random(size)) / parts.size


Augment = Callable[[np.ndarray, Draws], np.ndarray]
