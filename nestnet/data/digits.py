"""The embedded data sets, as TFDS builders: real scans of digits, and the same among clutter.

Both are made from the 1,797 scans (8x8, values 0 to 16) that scikit-learn ships, so they need no
network, and no TensorFlow. The splits are by *source scan*: a stratified fifth is for test, a
stratified tenth for validation, drawn once with a fixed seed.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
import functools
import os
import sys
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

CLASSES = 10
HIGH = 16
TEST_SCANS = 360
VALIDATION_SCANS = 180
SPLIT_SEED = 0

# The knobs of `digits_clutter`, in pixels and in grey values (0 to 16): see `DigitsClutter`.
CANVAS = 12
CANVASES = {"train": 10_000, "validation": 2_000, "test": 2_000}
JITTER = 1
FRAGMENTS = 8
FRAGMENT = 5
NOISE = 1.0


@functools.cache
def scans() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Cuts the 1,797 scans into splits.

  Returns:
    For each split: scans uint8 `[scans, 8, 8]`, their labels `[scans]`, and their numbers among the
    1,797 `[scans]`.

  Example:

  >>> {split: len(labels) for split, (_, labels, _) in scans().items()}
  {'train': 1257, 'validation': 180, 'test': 360}
  """
  from sklearn import datasets
  from sklearn import model_selection

  whole = datasets.load_digits()
  cut = functools.partial(model_selection.train_test_split, random_state=SPLIT_SEED)
  rest, test = cut(np.arange(len(whole.target)), test_size=TEST_SCANS, stratify=whole.target)
  train, validation = cut(rest, test_size=VALIDATION_SCANS, stratify=whole.target[rest])
  numbers = {"train": train, "validation": validation, "test": test}
  return {s: (whole.images[n].astype(np.uint8), whole.target[n], n) for s, n in numbers.items()}


def clutter(split: str) -> dict[str, np.ndarray]:
  """Draws the canvases of a split of `digits_clutter`, from the scans of that split alone.

  Args:
    split: `train`, `validation` or `test`.

  Returns:
    `image` uint8 `[canvases, 12, 12, 1]`, `label` `[canvases]`, and `sources` int32
    `[canvases, 1 + FRAGMENTS]`: among the 1,797, the number of the digit's scan, then of the
    fragments' scans.

  Example:

  >>> clutter("test")["image"].shape
  (2000, 12, 12, 1)
  """
  images, labels, numbers = scans()[split]
  count, size = CANVASES[split], images.shape[-1]
  rng = np.random.default_rng((SPLIT_SEED, list(CANVASES).index(split)))
  chosen = rng.integers(0, len(images), (count, 1 + FRAGMENTS))
  # Every scan of the split is the digit of as many canvases as any other, give or take one.
  chosen[:, 0] = rng.permutation(np.arange(count) % len(images))
  canvases = np.zeros((count, CANVAS, CANVAS))
  every = np.arange(count)[:, None, None]

  def window(extent: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = rng.integers(low, high + 1, (2, count, 1, 1))
    return rows + np.arange(extent)[:, None], columns + np.arange(extent)

  for column in range(1, 1 + FRAGMENTS):
    source = images[(chosen[:, column, None, None], *window(FRAGMENT, 0, size - FRAGMENT))]
    place = every, *window(FRAGMENT, 0, CANVAS - FRAGMENT)
    canvases[place] = np.maximum(canvases[place], source)
  middle = (CANVAS - size) // 2
  canvases[every, *window(size, middle - JITTER, middle + JITTER)] = images[chosen[:, 0]]
  canvases += rng.normal(0, NOISE, canvases.shape)
  return {
      "image": np.clip(np.rint(canvases), 0, HIGH).astype(np.uint8)[..., None],
      "label": labels[chosen[:, 0]],
      "sources": numbers[chosen].astype(np.int32),
  }


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What both builders share. Features are `Tensor`: `Image` does not encode without TensorFlow."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded; TFDS's own way to learn that imports a package that it does not require.
  url_infos = None
  SHAPE: tuple[int, int, int]
  SOURCES: int

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self,
        description=type(self).__doc__,
        homepage="https://archive.ics.uci.edu/dataset/80",
        supervised_keys=("image", "label"),
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=self.SHAPE, dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "sources": tfds.features.Tensor(shape=(self.SOURCES,), dtype=np.int32),
        }),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    return {split: self._generate_examples(split) for split in CANVASES}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    drawn = self._draw(split)
    for i, example in enumerate(zip(*drawn.values())):
      yield i, dict(zip(drawn, example))

  @abc.abstractmethod
  def _draw(self, split: str) -> dict[str, np.ndarray]:
    """The columns of a split, one entry an example."""

  # TFDS says "Downloading" here, and to standard output.
  def _log_download_bytes(self):
    print(f"Preparing {self.name} in {self.data_dir}", file=sys.stderr)

  def _log_download_done(self):
    pass


class Digits(_Builder):
  """The 1,797 scans of handwritten digits, 8x8 pixels of 0 to 16, that scikit-learn ships.

  Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI. Train 1,257,
  validation 180, test 360. `sources` holds the number of the scan.
  """

  SHAPE = (8, 8, 1)
  SOURCES = 1

  def _draw(self, split: str) -> dict[str, np.ndarray]:
    images, labels, numbers = scans()[split]
    sources = numbers[:, None].astype(np.int32)
    return {"image": images[..., None], "label": labels, "sources": sources}


class DigitsClutter(_Builder):
  """A scanned digit on a canvas of 12x12 pixels, among fragments of other digits, under noise.

  Eight fragments (`FRAGMENTS`) of 5x5 pixels (`FRAGMENT`), cut at random from random scans, lie
  anywhere on the canvas. The digit, 8x8, covers them, at most 1 pixel (`JITTER`) from the middle
  each way. Normal noise of standard deviation 1 (`NOISE`, of 16) is added to all. Train 10,000
  canvases, validation 2,000, test 2,000, from 1,257, 180 and 360 scans: a canvas uses no scan of
  another split. `sources` holds the number of the digit's scan, then those of the fragments.

  Hard enough to tell sizes apart. Test accuracy in percent of networks trained alone (3 seeds, on 2
  CPU cores; `separate` in docs/results/digits_clutter.md, which names its command and budget):

    ViT, 202,378 parameters                 96.4
    ViT, 14,154 parameters                  90.1
    nearest neighbours on pixels (k = 10)   82.6   (tests/data/test_digits.py)

  The neighbours' bank is the training canvases.
  """

  SHAPE = (CANVAS, CANVAS, 1)
  SOURCES = 1 + FRAGMENTS

  def _draw(self, split: str) -> dict[str, np.ndarray]:
    return clutter(split)


OWN = {"digits": Digits, "digits_clutter": DigitsClutter}


def prepare(
    builder: type[tfds.core.DatasetBuilder], data_dir: str | os.PathLike[str] | None = None
) -> tfds.core.DatasetBuilder:
  """Returns a builder whose data stands in `data_dir`, writing it first if it is not there.

  Several processes may do so at once: TFDS writes into a folder of its own and renames it when it
  is complete; who comes second finds the data there.

  Args:
    builder: `Digits` or `DigitsClutter`.
    data_dir: Where prepared data lives; TFDS's default if None.

  Raises:
    OSError: If the folder cannot be written.

  Example:

  >>> import tempfile
  >>> len(prepare(Digits, tempfile.mkdtemp()).as_data_source("test"))
  360
  """
  made = builder(data_dir=data_dir, file_format="array_record")
  if made.data_path.exists():
    return made
  tfds.disable_progress_bar()
  try:
    made.download_and_prepare()
  except OSError:
    if not made.data_path.exists():
      raise
  finally:
    tfds.enable_progress_bar()
  return builder(data_dir=data_dir, file_format="array_record")
