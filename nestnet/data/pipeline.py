"""The input pipeline: batches as a function of (seed, step).

Work is vectorised over the batch: a Python call for each example would cost much of a small step.
"""

from __future__ import annotations

from collections.abc import Collection
import functools
import operator
import sys

import grain
import numpy as np

from nestnet import errors
from nestnet.data import crops
from nestnet.data import images
from nestnet.data.draws import Augment
from nestnet.data.draws import Draws
from nestnet.data.text import Text


class Batches(grain.MapDataset):
  """Endless batches of a split, in an order drawn anew for every epoch.

  `batches[step]` is a pure function of (seed, step), for any step in any order: `image` float32
  `[batch_size / process_count, height, width, channels]` (uint8 images come out in [-1, 1],
  floating ones as they are) and `label` int32 `[batch_size / process_count]`; of text, `tokens` int32
  `[batch_size / process_count, length + 1]`. With the crops of a data set that has them: `global` float32
  `[batch_size / process_count, 2, side, side, channels]`, scaled as images are, likewise `local`, and `mask`
  bool `[batch_size / process_count, 2, patches]`, the last two where there are any. Host i gets, and reads,
  the i-th equal share of the global batch. An epoch sees every example (every window of a text) once; a
  batch may span two epochs.

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
    entries: Which entries batches have, of `dataset.entries`; all by default.

  Raises:
    errors.UserError: If an argument is out of range.

  Example:

  >>> import tempfile
  >>> from nestnet.data import load
  >>> batches = Batches(load("digits", tempfile.mkdtemp()), batch_size=32)
  >>> batches[1_000]["image"].shape, batches[1_000]["label"].shape
  ((32, 8, 8, 1), (32,))
  """

  def __init__(
      self,
      dataset: images.Dataset | Text,
      split: str = "train",
      batch_size: int = 128,
      seed: int = 0,
      augment: Augment | None = None,
      process_index: int = 0,
      process_count: int = 1,
      entries: Collection[str] | None = None,
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
    self._entries = tuple(dataset.entries if entries is None else entries)
    for name in self._entries:
      if name not in dataset.entries:
        raise errors.one_of(f"entry of batches of {dataset.name}", name, dataset.entries)
    self._source = dataset.split(split)
    self._crops = dataset.crops if set(self._entries) & set(crops.ENTRIES) else None
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
    augment = self._augment and (lambda whole: self._augment(whole, draws))
    indices = self._indices(step)
    if self._crops is None:
      batch = self._source.batch(indices, augment)
    else:
      batch = self._source.batch(indices, augment, lambda whole: self._crops.cut(whole, draws))
    if "mask" in self._entries:
      batch["mask"] = self._crops.masks(len(indices), draws)
    return {name: batch[name] for name in self._entries}

  def _indices(self, step: int) -> np.ndarray:
    start = step * self._batch_size
    places = np.arange(start + self._rows.start, start + self._rows.stop)
    epochs, places = np.divmod(places, len(self._source))
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
      order = _order(self._seed, int(epoch), len(self._source))
      indices[epochs == epoch] = order[places[epochs == epoch]]
    return indices


def arrays(dataset: images.Dataset | Text, split: str, most: int = 0) -> dict[str, np.ndarray]:
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
  >>> from nestnet.data import load
  >>> arrays(load("digits", tempfile.mkdtemp()), "test")["image"].shape
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
