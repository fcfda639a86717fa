"""Text for language models: documents joined to one stream of tokens, and cut into windows.

The stream is an end token, then each document followed by an end token. Window i holds the tokens `i *
length` to `(i + 1) * length`, so that neighbours share one token, the last target of the one and the first
input of the other: every token but the very first is predicted exactly once an epoch. Nothing stops
attention at the border of two documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nestnet import errors
from nestnet import files
from nestnet.data.tokenization import Tokenizer

# Documents that are tokenised at once.
_TOGETHER = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """One split of a text, by random access.

  Attributes:
    name: What messages call it, e.g. `stdlib_text/train`.
    tokens: The stream, `[tokens]`, in memory or mapped from a file.
    length: Tokens that a network is given at once.
    bytes_per_token: Bytes of the documents, and one for the end of each, by tokens to predict.
  """

  name: str
  tokens: np.ndarray
  length: int
  bytes_per_token: float = 1.0

  def __post_init__(self):
    """Raises `ValueError` where the stream does not fill a window."""
    if len(self.tokens) < self.length + 1:
      raise errors.UserError(
        f"{self.name}: {len(self.tokens)} tokens, too few for one window of {self.length} and the token "
        f"after it; allowed: data.length of at most {len(self.tokens) - 1}")

  def __len__(self) -> int:
    return -(-(len(self.tokens) - 1) // self.length)

  def batch(self, indices: np.ndarray, augment: Callable[[Any], Any] | None = None) -> dict[str, np.ndarray]:
    """The windows `[batch]` as `tokens` int32 `[batch, length + 1]`; -1 behind the end of the last one.

    Raises:
      errors.UserError: There is an augmentation.
    """
    if augment is not None:
      raise errors.UserError(f"{self.name}: an augmentation is for images; allowed: data.augment=none")
    places = np.asarray(indices)[:, None] * self.length + np.arange(self.length + 1)
    inside = places < len(self.tokens)
    read = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int32)
    return {"tokens": np.where(inside, read, np.int32(-1))}

  def stretches(self, count: int, tokens: int) -> np.ndarray:
    """Stretches of tokens, `[count, tokens]` int32: the middles of so many equal parts of the stream.

    Raises:
      errors.UserError: A number below 1, or parts that are shorter than a stretch.
    """
    if count < 1 or tokens < 1 or count * tokens > len(self.tokens):
      raise errors.UserError(
        f"{self.name} has {len(self.tokens)} tokens: got {count} stretches of {tokens}; allowed is at least "
        "one of at least 1, and all of them together no longer than it")
    part = len(self.tokens) // count
    places = np.arange(count)[:, None] * part + (part - tokens) // 2 + np.arange(tokens)
    return self.tokens[places].astype(np.int32)

  def evaluated(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """As `batch`, with the `bytes` that the targets of each window stand for, float64 `[batch]`.

    With a tokenizer that is their share of the split's bytes.
    """
    found = self.batch(indices)
    return found | {"bytes": (found["tokens"][:, 1:] >= 0).sum(1) * self.bytes_per_token}


@dataclasses.dataclass(frozen=True)
class Text:
  """A data set of text.

  Attributes:
    name: The name it was loaded by.
    length: Tokens that a network is given at once.
    vocab: Tokens are 0 to `vocab - 1`.
    splits: The sources `train`, `validation` and `test`.
    hashes: What else tells it from another text, by the key of `config.data` that records it.
    about: A line that says which text it is, where the name does not.
  """

  name: str
  length: int
  vocab: int
  splits: Mapping[str, Windows]
  hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  about: str = ""

  task = "language_modelling"
  crops = None

  def split(self, name: str) -> Windows:
    """Returns the source of a split; raises `errors.UserError` with the allowed names."""
    if name not in self.splits:
      raise errors.one_of(f"split of {self.name}", name, self.splits)
    return self.splits[name]

  @property
  def entries(self) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of an example's entries in a batch."""
    return {"tokens": ((self.length + 1,), np.int32)}

  @property
  def sizes(self) -> dict[str, int]:
    """Fields of a model that follow from the data."""
    return {"vocab": self.vocab}

  @property
  def facts(self) -> dict[str, Any]:
    """What a config may state of it."""
    return {"vocab": self.vocab, **self.hashes}

  @property
  def recorded(self) -> dict[str, Any]:
    """Those facts that the config of a run keeps."""
    return self.facts


def text(name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]], length: int, tokenizer: Tokenizer,
         folder: pathlib.Path | None = None, hashes: Mapping[str, str] | None = None, about: str = ""
         ) -> Text:
  """A data set from documents.

  Args:
    name: Of the set.
    splits: Documents by split: mappings with a `text`, str or bytes.
    length: Tokens that a network is given at once.
    tokenizer: What makes tokens of them.
    folder: Where their tokens are kept, once made, and mapped from; in memory by default.
    hashes: As in `Text`; that of the tokenizer is added.
    about: As in `Text`.

  Raises:
    ValueError: A length below 1, a document that is no text, or too few tokens for one window.

  Example:
    >>> from nestnet.data.tokenization import tokenizer
    >>> made = text("poem", {"train": [{"text": "ab"}, {"text": "cde"}]}, 4, tokenizer())
    >>> made.split("train").batch(np.arange(2))["tokens"].tolist()
    [[0, 97, 98, 0, 99], [99, 100, 101, 0, -1]]
  """
  if not isinstance(length, int) or length < 1:
    raise errors.UserError(
      f"data set {name!r} is text: data.length, the tokens that a network is given at once, is "
      f"{length or 'missing'}; allowed is a whole number of at least 1, such as 256")
  windows = {}
  for split, documents in splits.items():
    tokens, count = _tokens(f"{name}/{split}", documents, tokenizer, folder)
    windows[split] = Windows(f"{name}/{split}", tokens, length, count / max(len(tokens) - 1, 1))
  of_tokenizer = {"tokenizer_sha256": tokenizer.sha256} if tokenizer.sha256 else {}
  return Text(name, length, tokenizer.vocab, windows, {**(hashes or {}), **of_tokenizer}, about)


@dataclasses.dataclass(frozen=True)
class Rows(Sequence):
  """Some rows of a sequence."""

  examples: Sequence[Any]
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Any:
    return self.examples[int(self.rows[index])]


def held_out(name: str, splits: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
  """Splits of documents with what is missing of `validation` and `test` taken from the others.

  Without `test`, `validation` is the test split; without either, every tenth document (9, 19, ...) of
  `train`. Without `validation`, every tenth of what is left of `train`.

  Args:
    name: Of the data set, for the message.
    splits: Documents by split, `train` first.

  Raises:
    ValueError: There are fewer than 10 documents to take from.

  Example:
    >>> {split: list(rows) for split, rows in held_out("a", {"train": range(12)}).items()}
    {'train': [0, 1, 2, 3, 4, 5, 6, 7, 8, 11], 'test': [9], 'validation': [10]}
  """
  splits = {split: documents for split, documents in splits.items() if len(documents)}
  if "test" not in splits and "validation" in splits:
    splits["test"] = splits.pop("validation")
  for split in ("test", "validation"):
    if split in splits:
      continue
    if len(splits.get("train", ())) < 10:
      counts = ", ".join(f"{key} ({len(value)})" for key, value in splits.items()) or "none"
      raise errors.UserError(f"data set {name!r}: splits of documents: got {counts}; needed: train (10 or "
                             f"more, or a {split} of its own)")
    splits["train"], splits[split] = every_tenth(splits["train"])
  return splits


def every_tenth(train: Sequence[Any]) -> tuple[Rows, Rows]:
  """What is left of a split, and what leaves it: the examples 9, 19, 29, ..."""
  rows = np.arange(len(train))
  return Rows(train, np.delete(rows, np.s_[9::10])), Rows(train, rows[9::10])


def _tokens(name: str, documents: Sequence[Mapping[str, Any]], tokenizer: Tokenizer,
            folder: pathlib.Path | None) -> tuple[np.ndarray, int]:
  """The stream of documents, and the bytes that it stands for."""
  smallest = next(t for t in (np.uint8, np.uint16, np.uint32) if tokenizer.vocab - 1 <= np.iinfo(t).max)
  if folder is None:
    parts, counts = zip(*_stream(name, documents, tokenizer, smallest))
    return np.concatenate(parts), sum(counts)
  made_by = f"{name} {len(documents)} {tokenizer.sha256} {tokenizer.end}"
  key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
  file = folder / f"{name.replace('/', '_')}_{key}.tokens"
  record = file.with_suffix(".json")
  # Written last: where it stands, the tokens are whole.
  if not record.exists():
    made = _write(name, documents, tokenizer, file, smallest)
    files.atomic_write(record, json.dumps(made) + "\n")
  try:
    made = json.loads(record.read_text())
    tokens = np.memmap(file, smallest, "r")
    if len(tokens) != made["tokens"]:
      raise ValueError(f"{len(tokens)} tokens of {made['tokens']}")
    return tokens, made["bytes"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{name}: damaged tokens in {file} ({error}); delete {record} to make them again") from error


def _write(name: str, documents: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, file: pathlib.Path,
           kind: type) -> dict[str, int]:
  """Makes the file of a stream piece by piece, whole or not at all."""
  print(f"Tokenising {name} in {file}", file=sys.stderr)
  file.parent.mkdir(parents=True, exist_ok=True)
  written, total, count = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp"), 0, 0
  try:
    with open(written, "xb") as out:
      for tokens, size in _stream(name, documents, tokenizer, kind):
        out.write(tokens.tobytes())
        total, count = total + len(tokens), count + size
      out.flush()
      os.fsync(out.fileno())
    os.replace(written, file)
  finally:
    written.unlink(missing_ok=True)
  return {"tokens": total, "bytes": count}


def _stream(name: str, documents: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, kind: type
            ) -> Iterator[tuple[np.ndarray, int]]:
  """Pieces of the stream, with the bytes that each stands for."""
  end = np.array([tokenizer.end], kind)
  yield end, 0
  for start in range(0, len(documents), _TOGETHER):
    rows = range(start, min(start + _TOGETHER, len(documents)))
    texts = [_bytes(name, i, documents[i]) for i in rows]
    pieces = [piece for tokens in tokenizer.encode(texts) for piece in (tokens.astype(kind), end)]
    yield np.concatenate(pieces), sum(map(len, texts)) + len(texts)


def _bytes(name: str, index: int, document: Mapping[str, Any]) -> bytes:
  value = document.get("text") if isinstance(document, Mapping) else None
  if isinstance(value, (np.ndarray, np.generic)):
    value = value.item()
  if isinstance(value, str):
    return value.encode()
  if not isinstance(value, bytes):
    raise errors.UserError(
      f"{name}, document {index}: its text is of type {type(value).__name__}, allowed: str or bytes")
  return value
