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
from nestnet.data.text import Windows
from nestnet.data.tokenization import BYTES, Tokenizer, tokenizer
from nestnet.decoder_checks import Tokens
from nestnet.decoder_steps import unrolled
from nestnet.drafts import check_inside
from nestnet.errors import MissingFileError, UserError
from nestnet.generate import TIE, batches, generate
from nestnet.interop.folder import load
from nestnet.interop.hugging_face import end_tokens
from nestnet.models.decoder import Decoder
from nestnet.report import aligned, human
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
    test: The test split of a run's text.
    special: Whether a prompt gets the special tokens that the tokenizer puts around a text; else it begins
      as a document of a run.
    ends: Further tokens that end a text, beside that of the tokenizer.
  """

  module: nn.Module
  variables: Mapping[str, Any]
  tokenizer: Tokenizer
  subnet: Subnet | None = None
  space: Space | None = None
  test: Windows | None = None
  special: bool = False
  ends: tuple[int, ...] = ()

  def draft(self, text: str) -> Subnet:
    """A member to draft with, by its text form; axes that it leaves out are those of this network.

    Returns:
      The member in the coordinates of this network.

    Raises:
      ValueError: It is not inside this network, or outside the space.
    """
    if self.space is None:
      member = Subnet.parse(text)
      check_inside(self.module, member)
      return member
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
    """The tokens of a text, no special ones around it."""
    return [int(token) for token in self.tokenizer.encode([text.encode()])[0]]

  def prompt(self, text: str) -> list[int]:
    """The tokens of a text to go on from."""
    encode = self.tokenizer.encode_prompts if self.special else None
    return [int(token) for token in encode([text.encode()])[0]] if encode else self.tokens(text)

  def held_out(self, count: int, tokens: int) -> list[list[int]]:
    """So many stretches of the test split, spread over it.

    Raises:
      ValueError: The network is not of a run, or the split has too few tokens.
    """
    if self.test is None:
      raise UserError(f"--held_out={count} is of a run, --workdir; --folder holds a network without its text")
    return self.test.stretches(count, tokens).tolist()

  def stop(self, texts: Sequence[str]) -> list[int]:
    """The tokens that end a text: that between documents, those of its folder, and given ones.

    Raises:
      ValueError: A text is not one token.
    """
    found = [self.tokens(text) for text in texts]
    for text, tokens in zip(texts, found):
      if len(tokens) != 1:
        raise UserError(f"stop: {text!r} is {len(tokens)} tokens; allowed is the text of one")
    return list(dict.fromkeys([self.tokenizer.end, *self.ends, *(token for (token,) in found)]))

  def text(self, tokens: Sequence[int], stop: Sequence[int]) -> str:
    """The text of new tokens, without the one that ended it."""
    return self.tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in stop else tokens)


def opened(workdir: Path | None = None, folder: Path | None = None, subnet: str | None = None) -> Writer:
  """The network that is to write.

  Args:
    workdir: A run with a checkpoint.
    folder: Or a network by itself, as `experiments.extract` writes it, with its `tokenizer.json`, if any.
      Special tokens and ends of texts are then those of `transformers`.
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
    writer = Writer(run.supernet.module(member), run.step.member(state, member), read, member, space)
    return dataclasses.replace(_checked(writer, workdir), test=run.dataset.split("test"))
  if subnet:
    raise UserError(f"--subnet={subnet} is of a run, --workdir; --folder holds one network")
  module, variables = load(folder)
  read = tokenizer(folder) if (pathlib.Path(folder) / "tokenizer.json").exists() else BYTES
  writer = _checked(Writer(module, variables, read, special=True), folder)
  # One that the network does not know it never writes.
  known = tuple(token for token in end_tokens(folder) if 0 <= token < writer.module.vocab)
  return dataclasses.replace(writer, ends=known)


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
    ValueError: The file is damaged.
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
  return texts


def generate_run(writer: Writer, texts: Sequence[str], *, held_out: int | None = None,
                 prompt_tokens: int = 32, batch_size: int | None = None, stop: Sequence[str] = (),
                 drafts: Sequence[str] = (), draft_tokens: Sequence[int] = (4,),
                 share_cache: bool | None = None, **options: Any
                 ) -> tuple[list[str], dict[tuple[str, int], Report]]:
  """What a network writes behind texts; with drafts, each measured against plain decoding.

  Args:
    writer: The network.
    texts: Prompts.
    held_out: How many further prompts are taken from the run's test split, to measure drafts.
    prompt_tokens: How long each of these is.
    batch_size: How many prompts are decoded together; all by default.
    stop: Texts of tokens that end one, beside the token between documents.
    drafts: Members that draft, in text form.
    draft_tokens: As in `nestnet.speculative.speculate`, one number or several.
    share_cache: As there.
    **options: As of `nestnet.generate.generate`.

  Returns:
    What follows each text, and the report of each draft with each number of drafted tokens.

  Raises:
    ValueError: There are no prompts, or held-out ones and no draft; or as those functions.
  """
  if held_out is not None and not drafts:
    raise UserError(f"--held_out={held_out} measures drafts; give --draft=SPEC, or texts with --prompt")
  if not texts and held_out is None:
    raise UserError("no prompts; give --prompt, --prompts=FILE, or --held_out=N with --draft")
  ends = writer.stop(stop)
  tokens: list[Tokens] = [writer.prompt(text) for text in texts]
  if held_out is not None:
    tokens += writer.held_out(held_out, prompt_tokens)
  # All of them first, so that a wrong one is told before others are measured.
  members = {text: writer.draft(text) for text in drafts}
  reports = {
    (text, count): measure(
      writer.module, writer.variables, member, tokens, draft_tokens=count, stop=ends, share_cache=share_cache,
      groups=writer.space and writer.space.groups, batch_size=batch_size, **options)
    for text, member in members.items() for count in draft_tokens}
  if reports:
    new = next(iter(reports.values())).speculated.tokens
  else:
    network = unrolled(writer.module, writer.variables)
    new = [row for batch in batches(tokens, batch_size)
           for row in generate(*network, batch, stop=ends, **options)]
  return [writer.text(row, ends) for row in new[:len(texts)]], reports


def table(reports: Mapping[tuple[str, int], Report]) -> str:
  """Lines for the terminal: one for each draft, and what their columns mean."""
  lines = [("draft", "drafted", "params", "cache", "accepted", "tokens/call", "tokens/s", "plain", "speed-up",
            "quartiles", "equal", "ties", "other")]
  for (text, count), report in reports.items():
    own, found = report.speculated, report.differences
    lower, median, upper = report.quartiles
    rows = "---"
    if found:
      rows = f"{found.equal} of {len(own.tokens)}", str(found.ties), str(len(found.other))
    lines.append((
      text, str(count), human(report.params), "shared" if own.shared else "own", f"{own.acceptance:.1%}",
      f"{own.tokens_per_call:.2f}", f"{report.tokens_per_second:.1f}",
      f"{report.plain_tokens_per_second:.1f}", f"{median:.2f}", f"{lower:.2f} to {upper:.2f}", *rows))
  return (f"{aligned(lines)}\n"
          "tokens/call: of the target, plainly 1; speed-up: the median of pairs with plain decoding;\n"
          "equal: rows that are the target's own greedy tokens; ties: those that first differ where its two\n"
          f"best logits are within {TIE:g}; other: those that differ elsewhere")
