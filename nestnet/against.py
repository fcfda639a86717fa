"""Members of a run beside the largest network of a run: do they continue texts alike?

MatFormer (2310.07707, section 3.4) compares the sizes of one nested network so with networks trained apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from nestnet import evaluation, processes, runs
from nestnet.build import Run
from nestnet.decoder_checks import unpadded
from nestnet.errors import UserError
from nestnet.evaluators.consistency import Pair, consistency
from nestnet.evaluators.language_modelling import BATCH
from nestnet.logs import Progress
from nestnet.models.decoder import Decoder
from nestnet.sharding import local
from nestnet.steps import TrainState
from nestnet.subnet import Subnet


def largest(workdir: str | os.PathLike[str], run: Run) -> Pair:
  """The largest network of the run in a folder, to be compared with members of a run.

  Args:
    workdir: The folder, which may be that of the run itself.
    run: Whose members will be compared.

  Raises:
    ValueError: One of the two is no run of text, or their tokens or contexts differ.
    FileNotFoundError: There is no run, or no checkpoint yet.
  """
  _check_text(run, "the run to evaluate")
  other, _, state = runs.opened(workdir)
  _check_text(other, workdir)
  own, there = run.supernet.model, other.supernet.model
  if own.vocab != there.vocab:
    raise UserError(f"{workdir}: its network has {there.vocab} tokens, that of the run to evaluate has "
                    f"{own.vocab}; allowed is one vocabulary")
  if len({r.dataset.facts.get("tokenizer_sha256") for r in (run, other)}) > 1:
    raise UserError(f"{workdir}: its tokenizer is not that of the run to evaluate; allowed is one for both")
  if there.context < run.dataset.length:
    raise UserError(f"{workdir}: the context of its network is {there.context}; allowed is at least the "
                    f"{run.dataset.length} tokens of a window of the run to evaluate")
  return evaluation.member(other.step, local(state), other.supernet.space.largest, [])


def compared(run: Run, state: TrainState, subnets: Iterable[Subnet], other: Pair, show_progress: bool = False
             ) -> list[dict[str, float]]:
  """`agreement` and `kl` of each member with another network, as `consistency` has them.

  The prefixes are those after which an evaluation on the test split predicts a token.

  Args:
    run: The family and its data.
    state: Whose weights.
    subnets: Which members.
    other: Such as from `largest`.
    show_progress: Whether to show it.
  """
  subnets, state, rows = list(subnets), local(state), []
  texts = [text[:-1] for text in unpadded(evaluation.held(run, "test")["tokens"]) if len(text) > 1]
  size = max(1, BATCH // max(map(len, texts), default=1))
  progress = Progress(len(subnets), label="compare") if show_progress and processes.first() else None
  for subnet in subnets:
    found = dict(consistency(evaluation.member(run.step, state, subnet, []), other, texts, size))
    rows.append({name: found[name] for name in ("agreement", "kl")})
    if progress:
      progress.update(len(rows), rows[-1])
  if progress:
    progress.close()
  return rows


def _check_text(run: Run, what: str | os.PathLike[str]) -> None:
  if not isinstance(run.supernet.model, Decoder):
    raise UserError(f"agreement on the next token: {what} has a {type(run.supernet.model).__name__}; allowed "
                    "is a Decoder of text")
