"""Speculative decoding: a small network drafts tokens, the large one checks them all in one call.

With a member of its own family as the draft a network needs no second set of weights, and where their
layers keep keys and values alike no second cache (MatFormer, 2310.07707, section 4.1.1 and appendix C.1;
LayerSkip, 2404.16710, for exits after leading layers).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet import generate as plain
from nestnet.decoder_checks import Tokens, whole
from nestnet.decoder_steps import Pair, feed, prefill, unrolled
from nestnet.drafts import BEHIND, merged, prepared, sliced
from nestnet.errors import UserError
from nestnet.generate import ACCEPT, DRAFT, Differences
from nestnet.subnet import Subnet
from nestnet.timing import paired_ms


@dataclasses.dataclass(frozen=True)
class Speculated:
  """What speculative decoding wrote, and what it took.

  Attributes:
    tokens: The new tokens of each row, its stop token included.
    calls: Of the large network, by row, those for the prompt not counted; rows of a batch share theirs.
    drafted: Tokens that were drafted within the limit and not behind a stop token, by row.
    accepted: How many of these the large network accepted.
    shared: Whether the draft read the large network's cache.
  """

  tokens: list[list[int]]
  calls: tuple[int, ...]
  drafted: tuple[int, ...]
  accepted: tuple[int, ...]
  shared: bool

  @property
  def acceptance(self) -> float:
    """The share of drafted tokens that were accepted."""
    return sum(self.accepted) / sum(self.drafted)

  @property
  def tokens_per_call(self) -> float:
    """New tokens of a row for each call of the large network; plain decoding has 1."""
    return sum(map(len, self.tokens)) / sum(self.calls)


def speculate(module: nn.Module, variables: Mapping[str, Any], draft: Subnet | Pair,
              prompts: Sequence[Tokens], *, max_new_tokens: int, draft_tokens: int = 4,
              temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
              stop: Iterable[int] = (), seed: int = 0, share_cache: bool | None = None,
              groups: Mapping[str, int] | None = None) -> Speculated:
  """What a network writes behind prompts, drafted by a smaller one.

  Greedily these are the tokens of plain decoding. With a temperature they are drawn from the same
  distribution, by rejection sampling (Leviathan et al., 2211.17192, section 2.3), though they are other
  draws. Draws are pure functions of seed, row and position.

  Args:
    module: A decoder.
    variables: Its variables.
    draft: A member of the family whose largest is `module`; axes that it does not mention are whole. Or
      another network of the same vocabulary, `(module, variables)`.
    prompts: As in `nestnet.generate.generate`.
    max_new_tokens: As there.
    draft_tokens: How many tokens are drafted for each call of the large network.
    temperature: As there; the draft draws in the same way.
    top_k: As there.
    top_p: As there.
    stop: As there.
    seed: As there.
    share_cache: Whether the draft reads its slice of the large network's cache, and so has none of its own
      to fill. For leading layers of equal widths (`nestnet.drafts.leading`) that is what it would have
      written itself, and the large network goes on from their outputs: no layer runs twice for a token. For
      others, such as MatFormer's widths of the MLP, the keys and values of past tokens are then those of
      the large network: other drafts, accepted more or less often, and the same output. By default only
      leading layers of equal widths share.
    groups: As in `Space.groups`.

  Raises:
    ValueError: As `generate`; the draft is larger than the target; a cache that cannot be shared.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=2, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16, context=16)
    >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> found = speculate(model, variables, Subnet(layers=1), [[1, 2, 3]], max_new_tokens=6)
    >>> found.tokens == plain.generate(model, variables, [[1, 2, 3]], max_new_tokens=6), found.shared
    (True, True)
  """
  drafts = prepared(module, variables, draft, share_cache, groups)
  return _run(drafts, prompts, draft_tokens=draft_tokens, max_new_tokens=max_new_tokens,
              temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, seed=seed)


def _run(drafts, prompts, *, draft_tokens, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=(),
         seed=0):
  if (draft_tokens := whole(draft_tokens, "draft_tokens")) < 1:
    raise UserError(f"draft_tokens: got {draft_tokens}, allowed is at least 1")
  (module, variables), (drafter, small) = drafts.target, drafts.draft
  how, stop = plain.sampling(temperature, top_k, top_p, seed), plain.stops(module, stop)
  rows, prefilled = plain.start(module, prompts, max_new_tokens, min(module.context, drafter.context))
  rows, counts = _speculate(
    module, drafter, draft_tokens, drafts.shared, prefilled, variables, small, rows, how, stop)
  # Rows that only fill the batch count nothing.
  calls, drafted, accepted = (tuple(np.asarray(count)[:len(prompts)].tolist()) for count in counts)
  return Speculated(plain.written(rows, prompts), calls, drafted, accepted, drafts.shared is not None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _speculate(module, drafter, count, shared, prefilled, variables, small, rows, how, stop):
  """Rows at their ends; calls of the target, drafted and accepted tokens of each."""
  behind, slices = shared == BEHIND, isinstance(shared, tuple)

  def check(state):
    rows, cache, own, (calls, drafted, accepted) = state
    read = sliced(cache, shared) if slices else own
    drafts, chances, inner, read = _drafts(drafter, small, count, rows, how, read, behind, 1 if shared else 2)
    # What the draft has written to a shared cache this call writes anew.
    cache, own = (merged(cache, read, shared), None) if slices else (cache, read)
    tokens = jnp.concatenate([rows.ending(1), drafts], axis=1)
    outputs, cache = feed(module, variables, cache, tokens, rows.fed(-1, count + 1), inner=inner)
    new, right = _checked(rows, how, outputs["logits"], drafts, chances)
    after = rows.extended(new, right + 1, stop)
    tried = jnp.minimum(count, rows.limits - rows.lengths)
    # What was drafted behind the token that ends a row is of no use to it.
    tried = jnp.where(after.done, jnp.minimum(tried, after.lengths - rows.lengths), tried)
    counts = calls + ~rows.done, drafted + tried, accepted + jnp.minimum(right, tried)
    return after, cache, own, counts

  outputs, own = ({}, None) if slices else prefill(drafter, small, rows, prefilled, taps=behind)
  inner = outputs["taps"][-1] if behind and prefilled else None
  _, cache = prefill(module, variables, rows, prefilled, inner=inner)
  state = rows, cache, own, (jnp.zeros_like(rows.lengths),) * 3
  rows, _, _, counts = jax.lax.while_loop(lambda state: ~state[0].done.all(), check, state)
  return rows, counts


def _drafts(drafter, variables, count, rows, how, cache, behind, missing):
  """Drafted tokens `[batch, count]`, log-probabilities that they were drawn with, and the cache with them.

  A draft with a cache of its own `missing` 2 tokens: it has not read the last that it drafted, which may
  have been accepted. With layers `behind` it, which go on from its outputs, it reads that one too; before
  the cache stand these outputs `[batch, count + 1, embed]`, else None.
  """
  def read(cache, tokens, first):
    outputs, cache = feed(
      drafter, variables, cache, tokens, rows.fed(first, tokens.shape[1]), taps=behind)
    return outputs["logits"], outputs["taps"][-1] if behind else None, cache

  def drawn(logits, i):
    if how.greedy:
      return logits.argmax(-1).astype(jnp.int32), None
    chances = how.log_probabilities(logits)
    return how.draw(chances, rows.places(i, 1), DRAFT), chances

  def step(state, i):
    cache, last = state
    logits, inner, cache = read(cache, last, i - 1)
    new, chances = drawn(logits, i)
    return (cache, new), (new, chances, inner)

  logits, inner, cache = read(cache, rows.ending(missing), -missing)
  first = (*drawn(logits[:, -1:], 0), inner)
  (cache, last), rest = jax.lax.scan(step, (cache, first[0]), jnp.arange(1, count))
  drafts, chances, inner = jax.tree.map(
    lambda one, others: jnp.concatenate([one, jnp.moveaxis(others[:, :, 0], 0, 1)], axis=1), first, rest)
  if behind:
    _, final, cache = read(cache, last, count - 1)
    inner = jnp.concatenate([inner, final], axis=1)
  return drafts, chances, inner, cache


def _checked(rows, how, logits, drafts, chances):
  """New tokens `[batch, count + 1]`, and how many of the drafted ones lead them, `[batch]`."""
  count = drafts.shape[1]
  leading = lambda right: jnp.cumprod(right.astype(jnp.int32), axis=1).sum(1)
  if how.greedy:
    new = logits.argmax(-1).astype(jnp.int32)
    return new, leading(new[:, :count] == drafts)
  # Algorithm 1 of 2211.17192: drafted with q, accepted with min(1, p / q), else drawn from max(0, p - q).
  # Behind the last drafted token q is 0, so that what is drawn there has the probabilities p.
  own = jnp.exp(how.log_probabilities(logits))
  other = jnp.pad(jnp.exp(chances), ((0, 0), (0, 1), (0, 0)))
  of = lambda p: jnp.take_along_axis(p[:, :count], drafts[:, :, None], axis=2)[:, :, 0]
  uniform = jax.vmap(jax.vmap(jax.random.uniform))(how.keys(rows.places(0, count), ACCEPT))
  right = leading(uniform * of(other) < of(own))
  at = lambda p: jnp.take_along_axis(p, right[:, None, None], axis=1)
  left = jnp.maximum(at(own) - at(other), 0)
  # Equal distributions leave nothing; rounding may still refuse a token.
  left = jnp.where(left.sum(-1, keepdims=True) > 0, left, at(own))
  instead = how.draw(jnp.log(left), (rows.lengths + right)[:, None])
  offsets = jnp.arange(count + 1)[None]
  return jnp.where(offsets < right[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), instead), right


@dataclasses.dataclass(frozen=True)
class Report:
  """Speculative against plain decoding, over all batches.

  Attributes:
    speculated: What was written.
    differences: Of greedy tokens from those of plain decoding; None where tokens are drawn.
    plain_tokens: How many tokens plain decoding wrote.
    params: Of the draft.
    own_ms: Time of speculative decoding in milliseconds, the sum over batches of medians of pairs.
    plain_ms: The same of plain decoding.
    speed_ups: Tokens per second over those of plain decoding, of each pair of each batch.
  """

  speculated: Speculated
  differences: Differences | None
  plain_tokens: int
  params: int
  own_ms: float
  plain_ms: float
  speed_ups: tuple[float, ...]

  @property
  def tokens_per_second(self) -> float:
    return 1e3 * sum(map(len, self.speculated.tokens)) / self.own_ms

  @property
  def plain_tokens_per_second(self) -> float:
    return 1e3 * self.plain_tokens / self.plain_ms

  @property
  def quartiles(self) -> tuple[float, float, float]:
    """Of the speed-up: the first, the median, the third."""
    return tuple(np.percentile(self.speed_ups, (25, 50, 75)).tolist())


def measure(module: nn.Module, variables: Mapping[str, Any], draft: Subnet | Pair,
            prompts: Sequence[Tokens], *, max_new_tokens: int, draft_tokens: int = 4,
            share_cache: bool | None = None, groups: Mapping[str, int] | None = None,
            batch_size: int | None = None, pairs: int | None = None, **options: Any) -> Report:
  """Decodes speculatively and plainly, in interleaved pairs; what is compiled is not timed.

  Args:
    module: As in `speculate`.
    variables: As there.
    draft: As there.
    prompts: As there.
    max_new_tokens: As there.
    draft_tokens: As there.
    share_cache: As there.
    groups: As there.
    batch_size: How many prompts are decoded together; all by default.
    pairs: How many pairs are timed of each batch; by default 3, and 7 of a single one.
    **options: How tokens are drawn and where they end, of both.
  """
  options = {**options, "max_new_tokens": max_new_tokens}
  drafts = prepared(module, variables, draft, share_cache, groups)
  target = unrolled(module, variables)
  batches = plain.batches(prompts, batch_size)
  pairs = pairs or (3 if len(batches) > 1 else 7)
  found, references, times, speed_ups = [], [], [], []
  for batch in batches:
    own = functools.partial(_run, drafts, batch, draft_tokens=draft_tokens, **options)
    base = functools.partial(plain.generate, *target, batch, **options)
    speculated, reference = own(), base()
    both = paired_ms(own, [base], pairs)
    share = sum(map(len, speculated.tokens)) / sum(map(len, reference))
    found.append(speculated)
    references += reference
    times.append(np.median(both, axis=0))
    speed_ups += (share * both[:, 1] / both[:, 0]).tolist()
  every = _joined(found)
  differences = None if options.get("temperature") else plain.differences(
    module, variables, prompts, every.tokens, references)
  params = sum(leaf.size for leaf in jax.tree.leaves(drafts.draft[1]["params"]))
  return Report(every, differences, sum(map(len, references)), params, *np.sum(times, axis=0).tolist(),
                tuple(speed_ups))


def _joined(batches):
  """What was written in several batches."""
  rows = lambda name: [row for batch in batches for row in getattr(batch, name)]
  return Speculated(rows("tokens"), tuple(rows("calls")), tuple(rows("drafted")), tuple(rows("accepted")),
                    batches[0].shared)
