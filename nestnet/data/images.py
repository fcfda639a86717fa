"""Data sets of labelled images: their splits, by random access, and what batches have of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

from google.protobuf import json_format
import numpy as np

from nestnet import errors
from nestnet.data import digits
from nestnet.data import resampling
from nestnet.data.crops import Crops

# Splits of at most this many pixels are decoded once and kept; larger ones are read every time.
MEMORY_PIXELS = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set, by random access.

  Attributes:
    name: What messages call it, e.g. `digits/train`.
    examples: Any sequence of mappings with an `image` `[height, width, channels]`, uint8 or
      floating, and a `label`.
    classes: Number of classes; labels are 0 to `classes - 1`.
    shape: `(height, width, channels)` of every image.
    high: The largest value that a stored uint8 image takes.
    folder: Where its files lie, if it was prepared by TensorFlow Datasets.
    side: Of the squares to which whole images are resized for networks; 0: they are not.
  """

  name: str
  examples: Sequence[Mapping[str, Any]]
  classes: int
  shape: tuple[int, int, int]
  high: int = 255
  folder: pathlib.Path | None = None
  side: int = 0

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self.examples[range(len(self))[index]]

  def batch(self, indices: np.ndarray, augment: Callable[[np.ndarray], np.ndarray] | None = None,
            cut: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None) -> dict[str, np.ndarray]:
    """Reads examples as networks are given them.

    Args:
      indices: Which examples, `[batch]`.
      augment: From images `[batch, height, width, channels]` float32 to images of the same shape.
      cut: From such images to crops of them, by name.

    Returns:
      `image` float32 `[batch, height, width, channels]`, `label` int32 `[batch]`, and what `cut` gave. Images
      that are stored as uint8 are in [0, 1] for `augment` and `cut`, and come out in [-1, 1].

    Raises:
      errors.UserError: As `read`, or `augment` gives another shape.
    """
    stored, labels = self.read(indices)
    integral = stored.dtype == np.uint8
    images = stored.astype(np.float32)
    if integral:
      images *= np.float32(1 / self.high)
    made = dict(cut(images)) if cut else {}
    image = _augmented(images, augment)
    made = {"image": resampling.resized(image, self.side) if self.side else image, **made}
    if integral:
      made = {name: x * np.float32(2) - np.float32(1) for name, x in made.items()}
    return {**made, "label": labels}

  def evaluated(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The same as an evaluation needs it."""
    return self.batch(indices)

  def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads examples as they are stored.

    Args:
      indices: Which examples, `[batch]`.

    Returns:
      Images `[batch, height, width, channels]`, uint8 or float32, and labels, int32 `[batch]`.

    Raises:
      errors.UserError: If an image or label does not have the declared shape, type or range, or the
        files are damaged.
    """
    if len(self) * int(np.prod(self.shape)) <= MEMORY_PIXELS:
      images, labels = self._memory
      return images[indices], labels[indices]
    return self._decode(indices)

  @functools.cached_property
  def _memory(self) -> tuple[np.ndarray, np.ndarray]:
    return self._decode(np.arange(len(self)))

  def _decode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with whole(self.name, self.folder):
      examples = [self.examples[int(index)] for index in indices]
    images = [np.asarray(example["image"]) for example in examples]
    labels = np.array([int(example["label"]) for example in examples], np.int32)
    for index, image in zip(indices, images):
      if image.shape != self.shape:
        raise errors.UserError(
            f"{self.name}, example {index}: image of shape {image.shape}, allowed: {self.shape},"
            " as the first of train; all images need one size")
    images = np.stack(images)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
      raise errors.UserError(
          f"{self.name}: images of type {images.dtype}, allowed: uint8 or floating")
    outside = (labels < 0) | (labels >= self.classes)
    if outside.any():
      raise errors.UserError(
          f"{self.name}, example {indices[outside][0]}: label {labels[outside][0]},"
          f" allowed: 0 to {self.classes - 1}")
    return images if images.dtype == np.uint8 else images.astype(np.float32), labels


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set of images.

  Attributes:
    name: The name it was loaded by.
    classes: Number of classes.
    shape: `(height, width, channels)` of every image.
    splits: The sources `train`, `validation` and `test`.
    crops: Which crops of its images batches have; None for none.
  """

  name: str
  classes: int
  shape: tuple[int, int, int]
  splits: Mapping[str, Source]
  crops: Crops | None = None

  task = "classification"
  recorded = {}
  about = ""

  @property
  def entries(self) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of an example's entries in a batch."""
    whole = {"image": (self.shape, np.float32), "label": ((), np.int32)}
    if not self.crops:
      return whole
    side, channels = self.crops.global_crops_size, self.shape[2]
    return whole | {"image": ((side, side, channels), np.float32)} | self.crops.entries(channels)

  @property
  def sizes(self) -> dict[str, int]:
    """Fields of a model that follow from the data."""
    return {"classes": self.classes}

  @property
  def facts(self) -> dict[str, Any]:
    """What a config may state of it."""
    return {"shape": list(self.shape), "classes": self.classes}

  def split(self, name: str) -> Source:
    """Returns the source of a split; raises `errors.UserError` with the allowed names."""
    if name not in self.splits:
      raise errors.one_of(f"split of {self.name}", name, self.splits)
    return self.splits[name]

  def cropped(self, crops: Crops) -> Dataset:
    """Returns the set with crops in its batches; whole images are then of the global crops' size.

    Raises:
      errors.UserError: The crops cannot be made of its images.

    Example:

    >>> dataset = Dataset("photos", 10, (256, 320, 3), {}).cropped(Crops(local_crops_number=0))
    >>> dataset.entries["image"][0], dataset.entries["global"][0]
    ((224, 224, 3), (2, 224, 224, 3))
    """
    crops.check(self.name, self.shape)
    side = crops.global_crops_size
    splits = {split: dataclasses.replace(source, side=side) for split, source in self.splits.items()}
    return dataclasses.replace(self, crops=crops, splits=splits)


@contextlib.contextmanager
def whole(name: str, folder: pathlib.Path | None) -> Iterator[None]:
  """Turns what readers raise on damaged files (they verify a checksum) into a clear message."""
  try:
    yield
  except NotImplementedError:
    # A kind of RuntimeError, but no damage: what TFDS raises for files that are no array_record.
    raise
  except (RuntimeError, json_format.ParseError) as error:
    if folder is None:
      raise
    again = f"load {name!r} again" if name.partition("/")[0] in digits.OWN else "prepare it again"
    raise errors.UserError(
        f"data set {name!r}: damaged files in {folder} ({error}); delete that folder and {again}"
    ) from error


def _augmented(images: np.ndarray, augment: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
  if augment is None:
    return images
  augmented = np.asarray(augment(images), np.float32)
  if augmented.shape != images.shape:
    raise errors.UserError(f"augmented images: got shape {augmented.shape}, allowed: {images.shape}")
  return augmented
