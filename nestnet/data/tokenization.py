"""Text to numbers and back: bytes, or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nestnet import errors

# How published tokenizers call the token that ends a text, where no file beside them says.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What makes tokens of texts.

  Attributes:
    name: What messages call it.
    vocab: Tokens are 0 to `vocab - 1`.
    end: The token that stands before, between and after documents.
    encode: From a list of documents (UTF-8) to their tokens, an integer array each, without `end`.
    decode: From tokens to text.
    sha256: Of its file; empty for bytes.
    encode_prompts: As `encode`, with the special tokens that its file puts around a text, such as one that
      begins it; None where it has none.
  """

  name: str
  vocab: int
  end: int
  encode: Callable[[Sequence[bytes]], list[np.ndarray]]
  decode: Callable[[Sequence[int]], str]
  sha256: str = ""
  encode_prompts: Callable[[Sequence[bytes]], list[np.ndarray]] | None = None


# No source code holds the byte 0, and hardly any text.
BYTES = Tokenizer("bytes", 256, 0, lambda texts: [np.frombuffer(text, np.uint8) for text in texts],
                  lambda tokens: bytes(int(t) for t in tokens).decode("utf-8", "replace"))


def tokenizer(path: str | os.PathLike[str] = "") -> Tokenizer:
  """The tokenizer in a file; bytes where no path is given.

  Bytes need no file: a token is a byte, and documents end with the byte 0.

  Args:
    path: A Hugging Face `tokenizer.json`, or the folder that holds it. Documents end with the `eos_token`
      that `tokenizer_config.json` beside it names, else with the first known name that it has.

  Raises:
    ValueError: The file is damaged, has no token that ends a text, or the library `tokenizers` is not
      installed.
    FileNotFoundError: There is no such file.

  Example:
    >>> made = tokenizer()
    >>> made.vocab, made.end, made.encode([b"ab"])[0].tolist(), made.decode([104, 105])
    (256, 0, [97, 98], 'hi')
  """
  if not str(path):
    return BYTES
  file = pathlib.Path(path).expanduser()
  file = file / "tokenizer.json" if file.is_dir() else file
  if not file.is_file():
    raise errors.MissingFileError(f"tokenizer: no file {file}; allowed is a Hugging Face tokenizer.json, its "
                                  "folder, or '' for bytes")
  try:
    import tokenizers
  except ModuleNotFoundError as error:
    raise errors.UserError(
      f"tokenizer {file}: reading it needs the library tokenizers, which is not here: pip install tokenizers "
      f"({error}); allowed without it: '' for bytes") from error
  content = file.read_bytes()
  try:
    made = tokenizers.Tokenizer.from_str(content.decode())
  except Exception as error:  # The library raises nothing more special.
    raise errors.UserError(f"tokenizer {file} is damaged or no tokenizer.json: {error}") from error
  made.no_padding()
  made.no_truncation()

  def encode(texts: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
    found = made.encode_batch([text.decode("utf-8", "replace") for text in texts], add_special_tokens=special)
    return [np.array(one.ids, np.int64) for one in found]

  def decode(tokens: Sequence[int]) -> str:
    return made.decode([int(t) for t in tokens], skip_special_tokens=False)

  known = made.get_vocab(with_added_tokens=True)
  return Tokenizer(str(file), max(known.values()) + 1, known[_end(file, known)], encode, decode,
                   hashlib.sha256(content).hexdigest(), functools.partial(encode, special=True))


def _end(file: pathlib.Path, known: dict[str, int]) -> str:
  """The text of the token that ends documents."""
  beside = file.with_name("tokenizer_config.json")
  named: Any = None
  if beside.is_file():
    try:
      named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
      raise errors.UserError(f"{beside} is damaged: {error}") from error
    named = named.get("content") if isinstance(named, dict) else named
  found = [name for name in ((named,) if named else _ENDS) if name in known]
  if not found:
    raise errors.UserError(
      f"tokenizer {file} has no token that ends a text: looked for {named or ', '.join(_ENDS)}; allowed is "
      f"one of its tokens, named as eos_token in {beside.name} beside it")
  return found[0]
