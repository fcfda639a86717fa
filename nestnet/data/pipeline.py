"""The input pipeline: batches as a function of (seed, step).

Work is vectorised over the batch: a Python call for each example would cost much of a small step.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import operator
import sys

import grain
import numpy as np

from nestnet import errors
from nestnet.data import sources
from nestnet.data.text import Text

Augment = Callable[[np.ndarray, "Draws"], np.ndarray]


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


class Batches(grain.MapDataset):
  """Endless batches of a split, in an order drawn anew for every epoch.

  `batches[step]` is a pure function of (seed, step), for any step in any order: `image` float32
  `[batch_size / process_count, height, width, channels]` (uint8 images come out in [-1, 1],
  floating ones as they are) and `label` int32 `[batch_size / process_count]`; of text, `tokens` int32
  `[batch_size / process_count, length + 1]`. Host i gets, and reads, the i-th equal share of the global
  batch. An epoch sees every example (every window of a text) once; a batch may span two epochs.

  It is a Grain `MapDataset`. Where decoding is slow (large images),
  `iter(batches[step:].to_iter_dataset(grain.ReadOptions(num_threads=8)))` reads ahead, in order.

  Args:
    dataset: Where to read.
    split: Which split to read.
    batch_size: Examples of a step, over all hosts.
    seed: Of the order and of the augmentation.
    augment: A function of images `[batch, height, width, channels]` float32, in [0, 1] if stored as
      uint8, and of `Draws` (used as a `np.random.Generator`) that gives images of the same shape;
      None for none. See `nestnet.data.augment`.
    process_index: Which host this is.
    process_count: Number of hosts, which must divide `batch_size`.

  Raises:
    errors.UserError: If an argument is out of range.

  Example:

  >>> import tempfile
  >>> batches = Batches(sources.load("digits", tempfile.mkdtemp()), batch_size=32)
  >>> batches[1_000]["image"].shape, batches[1_000]["label"].shape
  ((32, 8, 8, 1), (32,))
  """

  def __init__(
      self,
      dataset: sources.Dataset | Text,
      split: str = "train",
      batch_size: int = 128,
      seed: int = 0,
      augment: Augment | None = None,
      process_index: int = 0,
      process_count: int = 1,
  ):
    super().__init__()
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
      raise errors.UserError(
          f"batch size: got {batch_size}, allowed: a positive multiple of the {process_count}"
          " processes")
    if not 0 <= process_index < process_count:
      raise errors.UserError(
          f"process index: got {process_index}, allowed: 0 to {process_count - 1}")
    if seed < 0:
      raise errors.UserError(f"seed of the data: got {seed}, allowed: 0 or more")
    self._source = dataset.split(split)
    self._batch_size = batch_size
    self._seed = seed
    self._augment = augment
    share = batch_size // process_count
    self._rows = slice(process_index * share, (process_index + 1) * share)

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size

  def __getitem__(self, step: int | slice) -> dict[str, np.ndarray] | grain.MapDataset:
    if isinstance(step, slice):
      return self.slice(step)
    step = operator.index(step)
    if step < 0:
      raise errors.UserError(f"step: got {step}, allowed: 0 or more")
    draws = Draws(self._seed, step, self._batch_size, self._rows)
    augment = self._augment and (lambda images: self._augment(images, draws))
    return self._source.batch(self._indices(step), augment)

  def _indices(self, step: int) -> np.ndarray:
    start = step * self._batch_size
    places = np.arange(start + self._rows.start, start + self._rows.stop)
    epochs, places = np.divmod(places, len(self._source))
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      order = _order(self._seed, int(epoch), len(self._source))
      indices[epochs == epoch] = order[places[epochs == epoch]]
    return indices


def arrays(dataset: sources.Dataset | Text, split: str, most: int = 0) -> dict[str, np.ndarray]:
  """Returns a whole split in its stored order, scaled as in `Batches` and not augmented.

  Args:
    dataset: Where to read.
    split: Which split to read.
    most: At most so many examples, evenly spread over the split, always the same; 0: all.

  Returns:
    `image` float32 `[examples, height, width, channels]` and `label` int32 `[examples]`; of text as
    `Windows.evaluated` has it.

  Example:

  >>> import tempfile
  >>> arrays(sources.load("digits", tempfile.mkdtemp()), "test")["image"].shape
  (360, 8, 8, 1)
  """
  source = dataset.split(split)
  count = min(most or len(source), len(source))
  return source.evaluated(np.arange(count) * len(source) // count)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
  # Grain's own shuffle asks for one index at a time, in Python.
  order = np.random.default_rng((seed, epoch, 0)).permutation(length)
  order.flags.writeable = False
  return order
