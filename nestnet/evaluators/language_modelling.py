"""Bits per byte and perplexity of text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.evaluators.classification import batches
from nestnet.models.switch import CHOICE
from nestnet.objectives.language import inputs_of, next_token_losses, targets_of
from nestnet.one_program import OneProgram
from nestnet.subnet import Subnet

# Tokens of a batch: their logits over a large vocabulary must fit into memory.
BATCH = 4096


def language_modelling(module: nn.Module, variables: Any, data: Mapping[str, np.ndarray],
                       subnet: Subnet = Subnet()) -> Iterator[tuple[str, float]]:
  """Yields `bits_per_byte`, `perplexity` of a token, and `loss`, the mean cross-entropy of a token in nats.

  A window is a sequence of its own: its first tokens are predicted from little.

  Args:
    module: A network from tokens `[batch, length]` to outputs with `logits` `[batch, length, vocab]`.
    variables: Its variables.
    data: `tokens` `[windows, length + 1]`, and `bytes` `[windows]` that their targets stand for.
    subnet: Of no effect: data is the same for all members.
  """
  del subnet
  total = sum(float(_loss(module, variables, tokens)) for tokens in windows(data))
  yield from _metrics(total, data)


def windows(data: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
  """Equal batches of windows; the last is filled up with windows of -1, which do not count."""
  tokens = data["tokens"]
  size = min(len(tokens), max(1, BATCH // tokens.shape[1]))
  for start, batch in zip(range(0, len(tokens), size), batches(tokens, size)):
    batch[len(tokens) - start:] = -1
    yield batch


def _sum(module, variables, tokens):
  batch = {"tokens": tokens}
  logits = module.apply(variables, inputs_of(batch))["logits"]
  return next_token_losses(logits, targets_of(batch)).sum()


_loss = jax.jit(_sum, static_argnums=0)


def language_modelling_all(one: OneProgram, variables: Mapping[str, Any], statistics: Any,
                           vectors: np.ndarray, data: Mapping[str, np.ndarray]
                           ) -> Iterator[tuple[str, np.ndarray]]:
  """The same of an array of sub-networks, `[members]`, by one compiled program.

  Args:
    one: What runs them.
    variables: The supernet's.
    statistics: Of no effect: no network of text normalises by batches.
    vectors: `[members, entries]`, as from `one.vector`.
    data: As in `language_modelling`.
  """
  del statistics
  total = sum(np.asarray(_losses(one)(variables, vectors, tokens), np.float64) for tokens in windows(data))
  yield from _metrics(total, data)


@functools.lru_cache(maxsize=8)
def _losses(one):
  """The sum of the losses of each member."""
  def score(runnable, variables, tokens):
    return _sum(runnable.module, {**runnable.cut(variables), CHOICE: runnable.choice}, tokens)

  return jax.jit(lambda variables, vectors, tokens: jax.lax.map(
    lambda vector: one.switch(score, vector, variables, tokens), jnp.asarray(vectors)))


def _metrics(total, data):
  """From summed losses in nats."""
  loss = total / max(int((data["tokens"][:, 1:] >= 0).sum()), 1)
  yield "bits_per_byte", total / (math.log(2) * float(data["bytes"].sum()))
  # A network that is not trained at all may be wrong without end; a row holds finite numbers only.
  yield "perplexity", np.exp(np.minimum(loss, 700.0))
  yield "loss", loss
