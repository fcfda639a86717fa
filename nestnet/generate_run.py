"""From a run or a folder, and texts, to texts: what `experiments.generate` does."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from nestnet import runs
from nestnet.data.tokenization import BYTES, Tokenizer, tokenizer
from nestnet.errors import MissingFileError, UserError
from nestnet.generate import generate
from nestnet.interop.folder import load
from nestnet.models.decoder import Decoder
from nestnet.space import Space
from nestnet.speculative import Report, measure
from nestnet.subnet import Subnet, unfolded

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Writer:
  """A network that writes text.

  Attributes:
    module: A decoder.
    variables: Its variables.
    tokenizer: Its tokens.
    subnet: Which member of the family it is; None where it comes from a folder.
    space: The family, of a run.
  """

  module: nn.Module
  variables: Mapping[str, Any]
  tokenizer: Tokenizer
  subnet: Subnet | None = None
  space: Space | None = None

  def draft(self, text: str) -> Subnet:
    """A member to draft with, by its text form; axes that it leaves out are those of this network.

    Returns:
      The member in the coordinates of this network.

    Raises:
      ValueError: It is not inside this network, or outside the space.
    """
    if self.space is None:
      return Subnet.parse(text)
    if text.strip() in ("smallest", "largest"):
      member = self.space.subnet(text)
    else:
      own = unfolded(Subnet.parse(text), self.space.axes).chosen
      member = self.space.subnet(Subnet(**{**self.subnet.chosen, **own}))
    try:
      return member.within(self.subnet)
    except UserError:
      raise UserError(f"the draft {member} is larger than the target {self.subnet}; allowed are members "
                      "inside it") from None

  def tokens(self, text: str) -> list[int]:
    """The tokens of a text."""
    return [int(token) for token in self.tokenizer.encode([text.encode()])[0]]

  def stop(self, texts: Sequence[str]) -> list[int]:
    """The tokens that end a text: that between documents, and given ones.

    Raises:
      ValueError: A text is not one token.
    """
    found = [self.tokens(text) for text in texts]
    for text, tokens in zip(texts, found):
      if len(tokens) != 1:
        raise UserError(f"stop: {text!r} is {len(tokens)} tokens; allowed is the text of one")
    return list(dict.fromkeys([self.tokenizer.end, *(token for (token,) in found)]))

  def text(self, tokens: Sequence[int], stop: Sequence[int]) -> str:
    """The text of new tokens, without the one that ended it."""
    return self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in stop else tokens)


def opened(workdir: Path | None = None, folder: Path | None = None, subnet: str | None = None) -> Writer:
  """The network that is to write.

  Args:
    workdir: A run with a checkpoint.
    folder: Or a network by itself, as `experiments.extract` writes it, with its `tokenizer.json`, if any.
    subnet: Which member of the run; the largest by default.

  Raises:
    ValueError: Neither or both are given, or what is there writes no text.
    FileNotFoundError: There is no run, or no network.
  """
  if (workdir is None) == (folder is None):
    raise UserError("give either a run or a network by itself: --workdir or --folder")
  if workdir is not None:
    run, _, state = runs.opened(workdir)
    space = run.supernet.space
    member = space.subnet(subnet or "largest")
    read = tokenizer(run.config["data"].get("tokenizer") or "")
    return _checked(Writer(run.supernet.module(member), run.step.member(state, member), read, member, space),
                    workdir)
  if subnet:
    raise UserError(f"--subnet={subnet} is of a run, --workdir; --folder holds one network")
  module, variables = load(folder)
  read = tokenizer(folder) if (pathlib.Path(folder) / "tokenizer.json").exists() else BYTES
  return _checked(Writer(module, variables, read), folder)


def _checked(writer: Writer, where: Path) -> Writer:
  if not isinstance(writer.module, Decoder):
    raise UserError(f"{where} holds a {type(writer.module).__name__}; allowed is a Decoder")
  there, own = writer.module.vocab, writer.tokenizer
  if own.vocab > there or (own is BYTES and there != BYTES.vocab):
    raise UserError(f"{where}: the network has {there} tokens, the tokenizer ({own.name}) {own.vocab}; "
                    "unless tokens are bytes, a tokenizer.json must stand beside the weights")
  return writer


def prompts(given: Sequence[str], file: Path | None) -> list[str]:
  """The texts to go on from.

  Args:
    given: Texts.
    file: Further ones: one a line, or where its name ends in `.json` a list.

  Raises:
    ValueError: There are none, or the file is damaged.
    FileNotFoundError: There is no such file.
  """
  texts = list(given)
  if file is not None:
    path = pathlib.Path(file)
    if not path.is_file():
      raise MissingFileError(f"prompts: no file {path}")
    try:
      content = path.read_text(encoding="utf-8")
      more = json.loads(content) if path.suffix == ".json" else content.splitlines()
    except ValueError as error:
      raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(more, list) or not all(isinstance(text, str) for text in more):
      raise UserError(f"{path}: allowed is a list of texts")
    texts += more
  if not texts:
    raise UserError("no prompts; give --prompt or --prompts=FILE")
  return texts


def generate_run(writer: Writer, texts: Sequence[str], *, stop: Sequence[str] = (), draft: str | None = None,
                 draft_tokens: int = 4, share_cache: bool | None = None, **options: Any
                 ) -> tuple[list[str], Report | None]:
  """What a network writes behind texts; with a draft, measured against plain decoding.

  Args:
    writer: The network.
    texts: The prompts, decoded together.
    stop: Texts of tokens that end one, beside the token between documents.
    draft: A member that drafts, in text form.
    draft_tokens: As in `nestnet.speculative.speculate`.
    share_cache: As there.
    **options: As of `nestnet.generate.generate`.

  Returns:
    Each continuation, and with a draft the report.
  """
  ends = writer.stop(stop)
  tokens = [writer.tokens(text) for text in texts]
  report = None
  if draft is None:
    new = generate(writer.module, writer.variables, tokens, stop=ends, **options)
  else:
    report = measure(
      writer.module, writer.variables, writer.draft(draft), tokens, draft_tokens=draft_tokens, stop=ends,
      share_cache=share_cache, groups=writer.space and writer.space.groups, **options)
    new = report.speculated.tokens
  return [writer.text(row, ends) for row in new], report
