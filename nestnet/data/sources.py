"""Data sets by name: nestnet's own, those of TensorFlow Datasets, and a user's.

A source is random access, never an iterator: the input pipeline asks for any example at any step,
so a run resumes exactly with no state to save. TensorFlow itself is never needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import difflib
import os
import pathlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nestnet import errors
from nestnet import imports
from nestnet.data import digits
from nestnet.data import images
from nestnet.data import stdlib_text
from nestnet.data.text import every_tenth
from nestnet.data.text import held_out
from nestnet.data.text import Text
from nestnet.data.text import text
from nestnet.data.tokenization import tokenizer

SPLITS = ("train", "validation", "test")
STDLIB_TEXT = "stdlib_text"


def load(name: str, data_dir: str | os.PathLike[str] | None = None, length: int = 0,
         tokenizer: str | os.PathLike[str] = "") -> images.Dataset | Text:
  """Returns a data set by name. Nothing is ever downloaded.

  `digits` and `digits_clutter` prepare themselves on first use; `stdlib_text` is the running Python's own
  standard library, split by file. Any other name is one of TensorFlow Datasets (`cifar10`,
  `imagenet_resized/64x64`, `c4/en`, ...), which must stand prepared, as ArrayRecord, in `data_dir`. One
  with `image` and `label` is a set of labelled images, else one with `text` is text.

  A user's own set is named `package.module:Name`. `Name` is called without arguments (so it is a
  class or a function) and gives an object with `classes`, `train`, `test` and, if it likes,
  `validation`; each split is any sequence of `{"image": [height, width, channels], "label": int}`,
  with images uint8 (0 to 255) or floating (used as they are). Text needs no `classes`, and examples are
  `{"text": str}`:

      class Stripes:                               # in my_data.py: data.load("my_data:Stripes")
        classes = 2

        def __init__(self):
          rng = np.random.default_rng(0)
          label = rng.integers(0, 2, 600)
          image = rng.integers(0, 100, (600, 8, 8, 1)).astype(np.uint8)
          image[label == 0, ::2] += 100
          image[label == 1, :, ::2] += 100
          examples = [{"image": i, "label": l} for i, l in zip(image, label)]
          self.train, self.test = examples[:500], examples[500:]

  Where a set lacks a split: without `validation`, every tenth example of `train` (9, 19, 29, ...)
  leaves it and becomes `validation`. A TFDS set without a labelled `test` (ImageNet) is tested on
  its `validation`, as its users do, and validated on that tenth of `train`. Text without both is tested on
  every tenth document of `train`.

  Args:
    name: The data set, as above.
    data_dir: Where prepared data lives; by default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`. The
      tokens of a text are kept there too, in `nestnet_tokens`.
    length: Of text: how many tokens a network is given at once.
    tokenizer: Of text: a Hugging Face `tokenizer.json`; bytes by default.

  Raises:
    errors.UserError: If the name is unknown, files are damaged, or the set is neither one of labelled
      images of one size nor text; or an option is not one of its kind.
    FileNotFoundError: If a TFDS set is not prepared in `data_dir`; the message says how to.

  Example:

  >>> import tempfile
  >>> dataset = load("digits", data_dir=tempfile.mkdtemp())
  >>> dataset.classes, dataset.shape, {split: len(x) for split, x in dataset.splits.items()}
  (10, (8, 8, 1), {'train': 1257, 'validation': 180, 'test': 360})
  """
  of_text = {"length": length, "tokenizer": tokenizer}
  if name == STDLIB_TEXT:
    found = stdlib_text.documents()
    return _text(name, stdlib_text.splits(found), of_text,
                 hashes={"sha256": stdlib_text.sha256(found)}, about=stdlib_text.about(found))
  if re.fullmatch(r"[\w.]+:[A-Za-z_]\w*", name):
    return _own(name, of_text)
  # TFDS reads the variable once, when it is imported.
  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return _prepared(name, pathlib.Path(data_dir).expanduser(), of_text)


def _own(name: str, of_text: Mapping[str, Any]) -> images.Dataset | Text:
  made = imports.by_path(name, "data set")
  if not callable(made):
    raise errors.UserError(
        f"data set {name!r}: got {type(made).__name__}, allowed: a class or function that is called"
        " without arguments")
  made = made()
  splits = {split: getattr(made, split) for split in SPLITS if hasattr(made, split)}
  if len(train := splits.get("train", ())) and "text" in train[0] and "image" not in train[0]:
    return _text(name, splits, of_text)
  missing = [field for field in ("classes", "train", "test") if not hasattr(made, field)]
  if missing:
    raise errors.UserError(
        f"data set {name!r}: {type(made).__name__} has no {', '.join(missing)}; needed: classes,"
        " train, test (validation is optional); of text: train")
  _check_images(name, of_text)
  return _dataset(name, made.classes, splits)


def _prepared(name: str, root: pathlib.Path, of_text: Mapping[str, Any]) -> images.Dataset | Text:
  """Opens what TensorFlow Datasets wrote."""
  if name in digits.OWN:
    _check_images(name, of_text)
  with images.whole(name, root / name):
    builder = digits.prepare(digits.OWN[name], root) if name in digits.OWN else _builder(name, root)
  features = builder.info.features
  labelled_images = {"image", "label"} <= set(features or ())
  if not labelled_images and "text" not in (features or ()):
    raise errors.UserError(
        f"data set {name!r}: features {', '.join(features or ())}; needed: image and label, or text")
  # A set that was never prepared does not know its splits; opening one then fails.
  names = tuple(builder.info.splits) or ("train", "test")
  try:
    with images.whole(name, builder.data_path):
      splits = {split: builder.as_data_source(split) for split in names}
      labelled = {
          split: source for split, source in splits.items()
          if labelled_images and len(source) and int(source[0]["label"]) >= 0
      }
  except (KeyError, NotImplementedError) as error:
    there = "which is not there"
    if builder.data_path.exists():
      there = f"which holds no array_record ({error}): delete it"
    raise errors.MissingFileError(
        f"data set {name!r}: looked in {builder.data_path}, {there}. {_how_to_prepare(name, root)}"
    ) from error
  if not labelled_images:
    with images.whole(name, builder.data_path):
      return _text(builder.info.full_name, splits, of_text, root / "nestnet_tokens")
  _check_images(name, of_text)
  if "test" not in labelled and "validation" in labelled:
    labelled["test"] = labelled.pop("validation")
  high = digits.HIGH if name in digits.OWN else 255
  return _dataset(name, features["label"].num_classes, labelled, high, builder.data_path)


def _how_to_prepare(name: str, root: pathlib.Path) -> str:
  if name in digits.OWN:
    return f"Loading {name!r} again prepares it"
  return (
      "Prepare it once (downloads it; this command alone needs `pip install tensorflow`):\n"
      f"  tfds build {name} --file_format=array_record --data_dir={root}")


def _builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
  try:
    return tfds.builder(name, data_dir=root)
  except tfds.core.DatasetNotFoundError as error:
    known = {*digits.OWN, STDLIB_TEXT, *tfds.list_builders(with_community_datasets=False)}
    close = difflib.get_close_matches(name.partition("/")[0], known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise errors.UserError(
        f"unknown data set {name!r}{hint} Allowed: {', '.join((*digits.OWN, STDLIB_TEXT))}, a name of TensorFlow"
        " Datasets (https://www.tensorflow.org/datasets/catalog), or package.module:Name of your own"
    ) from error
  except ValueError as error:
    raise errors.UserError(f"data set {name!r}: {error}") from error


def _check_images(name: str, of_text: Mapping[str, Any]) -> None:
  for option, value in of_text.items():
    if value:
      raise errors.UserError(
          f"data set {name!r} has images: data.{option}={value} is for text; allowed: none")


def _text(name: str, splits: Mapping[str, Sequence[Any]], of_text: Mapping[str, Any],
          folder: pathlib.Path | None = None, **facts: Any) -> Text:
  documents = held_out(name, {split: splits[split] for split in SPLITS if split in splits})
  return text(name, documents, of_text["length"], tokenizer(of_text["tokenizer"]), folder, **facts)


def _dataset(
    name: str,
    classes: int,
    splits: Mapping[str, Sequence[Any]],
    high: int = 255,
    folder: pathlib.Path | None = None,
) -> images.Dataset:
  """Checks the splits, carves `validation` from `train` if there is none, and makes the record."""
  if not isinstance(classes, (int, np.integer)) or classes < 2:
    raise errors.UserError(
        f"data set {name!r}: classes is {classes!r}, allowed: an integer of at least 2")
  splits = dict(splits)
  for split, needed in ("train", 1 if "validation" in splits else 10), ("test", 1):
    if len(splits.get(split, ())) < needed:
      counts = ", ".join(f"{key} ({len(value)})" for key, value in splits.items()) or "none"
      raise errors.UserError(
          f"data set {name!r}: labelled splits: got {counts}; needed: {split} ({needed} or more)")
  if "validation" not in splits:
    splits["train"], splits["validation"] = every_tenth(splits["train"])
  shape = np.shape(splits["train"][0]["image"])
  if len(shape) != 3:
    raise errors.UserError(
        f"data set {name!r}: image of shape {shape}, allowed: (height, width, channels)")
  sources = {
      split: images.Source(f"{name}/{split}", splits[split], int(classes), shape, high, folder)
      for split in SPLITS
  }
  return images.Dataset(name, int(classes), shape, sources)
