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
from nestnet.axes import abstract_variables, variable_axes
from nestnet.decoder_checks import Tokens, check_decoder, whole
from nestnet.errors import UserError
from nestnet.execution import cut, module_of, sizes_of
from nestnet.generate import ACCEPT, DRAFT, Differences, feed, prefill
from nestnet.models.decoder import init_cache
from nestnet.slicing import take, unrolled_over
from nestnet.subnet import Subnet
from nestnet.timing import paired_ms

Pair = tuple[nn.Module, Mapping[str, Any]]


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
      to fill. For leading layers of equal widths (`leading`) that is what it would have written itself. For
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
  drafts = _prepared(module, variables, draft, share_cache, groups)
  return _run(module, variables, drafts, prompts, draft_tokens=draft_tokens, max_new_tokens=max_new_tokens,
              temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, seed=seed)


def _prepared(module, variables, draft, share_cache, groups):
  """What drafts: a module, its variables, and which slice of the target's cache it reads, if it does."""
  check_decoder(module, variables)
  drafter, small = drafted_by(module, variables, draft, groups)
  if not (leading(module, draft) if share_cache is None else share_cache):
    return drafter, small, None
  if not isinstance(draft, Subnet):
    raise UserError("share_cache=True with a draft that has weights of its own; allowed is a member of the "
                    "family")
  shared = sizes_of(module, draft), tuple((groups or {}).items())
  shapes = (jax.eval_shape(make) for make in (
    lambda: _slice(drafter, init_cache(module, 1, 1), shared), lambda: init_cache(drafter, 1, 1)))
  there, needed = (jax.tree.map(jnp.shape, tree) for tree in shapes)
  if there != needed:
    raise UserError(f"share_cache=True: the cache of the draft {draft} is no slice of the target's")
  return drafter, small, shared


def _run(module, variables, drafts, prompts, *, draft_tokens, max_new_tokens, temperature=0.0, top_k=None,
         top_p=None, stop=(), seed=0):
  if (draft_tokens := whole(draft_tokens, "draft_tokens")) < 1:
    raise UserError(f"draft_tokens: got {draft_tokens}, allowed is at least 1")
  how, stop = plain.sampling(temperature, top_k, top_p, seed), plain.stops(module, stop)
  drafter, small, shared = drafts
  rows, prefilled = plain.start(module, prompts, max_new_tokens, min(module.context, drafter.context))
  rows, counts = _speculate(
    module, drafter, draft_tokens, shared, prefilled, variables, small, rows, how, stop)
  # Rows that only fill the batch count nothing.
  calls, drafted, accepted = (tuple(np.asarray(count)[:len(prompts)].tolist()) for count in counts)
  return Speculated(plain.written(rows, prompts), calls, drafted, accepted, shared is not None)


def drafted_by(module: nn.Module, variables: Mapping[str, Any], draft: Subnet | Pair,
               groups: Mapping[str, int] | None = None) -> Pair:
  """The network that drafts.

  Raises:
    ValueError: It is larger than the target, or has another vocabulary.
  """
  if not isinstance(draft, Subnet):
    if draft[0].vocab != module.vocab:
      raise UserError(f"the draft has {draft[0].vocab} tokens, the target {module.vocab}; allowed is one "
                      "vocabulary")
    own, whole = (sum(leaf.size for leaf in jax.tree.leaves(v)) for v in (draft[1], variables))
    if own > whole:
      raise UserError(f"the draft has {own} parameters, the target {whole}; allowed is a draft that is no "
                      "larger than its target")
    return draft
  check_inside(module, draft)
  drafter = module_of(module, draft)
  return drafter, _cut(module, drafter, draft, tuple((groups or {}).items()))(variables)


@functools.lru_cache(maxsize=64)
def _cut(module, drafter, draft, groups):
  """A program of its own, so that the slices are laid out once and not at every step of the loop."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  axes, like = variable_axes(module, tokens), abstract_variables(drafter, tokens)
  return jax.jit(lambda variables: _restacked(
    cut(module, variables, axes, draft, dict(groups), strict=True), like))


def _restacked(tree, like):
  """A tree whose layers stand together where those of `like` do: equal ones may be cut from unequal ones."""
  if not isinstance(tree, Mapping):
    return tree
  if (depth := unrolled_over(tree)) and not unrolled_over(like):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[f"{depth}_{i}"] for i in range(len(tree))))
  return {key: _restacked(child, like.get(key, {})) for key, child in tree.items()}


def check_inside(module: nn.Module, draft: Subnet) -> None:
  """Raises `ValueError` unless a draft is inside the network that is to check it."""
  own, whole = sizes_of(module, draft), sizes_of(module, Subnet())
  try:
    own.within(whole)
  except UserError as error:
    raise UserError(f"the draft {draft} is larger than the target: {error}; allowed are members inside "
                    "it") from None


def leading(module: nn.Module, draft: Subnet | Pair) -> bool:
  """Whether a draft is the leading layers of a network, at the network's own widths.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=4, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16)
    >>> [leading(model, Subnet.parse(text)) for text in ("layers=2,mlp=8", "layers=0+2", "mlp=4")]
    [True, False, False]
  """
  if not isinstance(draft, Subnet):
    return False
  depth = draft.chosen.get("layers", module.layers)
  own = lambda size: size[:depth] if isinstance(size, tuple) else (size,) * depth
  return isinstance(depth, int) and all(
    axis == "layers" or own(size) == own(getattr(module, axis)) for axis, size in draft.chosen.items())


def _slice(drafter, cache, shared):
  """A member's part of the cache."""
  subnet, groups = shared
  names = {5: "layers: batch slots kv_heads head_dim", 4: "batch slots kv_heads head_dim"}
  named = lambda stack: jax.tree.map(lambda leaf: names[leaf.ndim], stack)
  found = {key: take(stack, named(stack), subnet, dict(groups), strict=False) for key, stack in cache.items()}
  return _restacked(found, jax.eval_shape(lambda: init_cache(drafter, 1, 1)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _speculate(module, drafter, count, shared, prefilled, variables, small, rows, how, stop):
  """Rows at their ends; calls of the target, drafted and accepted tokens of each."""
  def check(state):
    rows, cache, own, (calls, drafted, accepted) = state
    read = _slice(drafter, cache, shared) if shared else own
    drafts, chances, own = _drafts(drafter, small, count, rows, how, read, missing=1 if shared else 2)
    tokens = jnp.concatenate([rows.ending(1), drafts], axis=1)
    # What the draft has written to a shared cache is dropped: this call writes all of it.
    logits, cache = feed(module, variables, cache, tokens, rows.fed(-1, count + 1))
    new, right = _checked(rows, how, logits, drafts, chances)
    after = rows.extended(new, right + 1, stop)
    tried = jnp.minimum(count, rows.limits - rows.lengths)
    # What was drafted behind the token that ends a row is of no use to it.
    tried = jnp.where(after.done, jnp.minimum(tried, after.lengths - rows.lengths), tried)
    counts = calls + ~rows.done, drafted + tried, accepted + jnp.minimum(right, tried)
    return after, cache, None if shared else own, counts

  own = None if shared else prefill(drafter, small, rows, prefilled)
  state = rows, prefill(module, variables, rows, prefilled), own, (jnp.zeros_like(rows.lengths),) * 3
  rows, _, _, counts = jax.lax.while_loop(lambda state: ~state[0].done.all(), check, state)
  return rows, counts


def _drafts(drafter, variables, count, rows, how, cache, missing):
  """Drafted tokens `[batch, count]`, log-probabilities that they were drawn with, and the cache with them.

  A draft with a cache of its own `missing` 2 tokens: it has not read the last that it drafted, which may
  have been accepted.
  """
  def drawn(logits, i):
    if how.greedy:
      return logits.argmax(-1).astype(jnp.int32), None
    chances = how.log_probabilities(logits)
    return how.draw(chances, rows.places(i, 1), DRAFT), chances

  def step(state, i):
    cache, last = state
    logits, cache = feed(drafter, variables, cache, last, rows.fed(i - 1, 1))
    new, chances = drawn(logits, i)
    return (cache, new), (new, chances)

  logits, cache = feed(drafter, variables, cache, rows.ending(missing), rows.fed(-missing, missing))
  first = drawn(logits[:, -1:], 0)
  (cache, _), rest = jax.lax.scan(step, (cache, first[0]), jnp.arange(1, count))
  drafts, chances = jax.tree.map(
    lambda one, others: jnp.concatenate([one, jnp.moveaxis(others[:, :, 0], 0, 1)], axis=1), first, rest)
  return drafts, chances, cache


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
  drafts = _prepared(module, variables, draft, share_cache, groups)
  batches = plain.batches(prompts, batch_size)
  pairs = pairs or (3 if len(batches) > 1 else 7)
  found, references, times, speed_ups = [], [], [], []
  for batch in batches:
    own = functools.partial(_run, module, variables, drafts, batch, draft_tokens=draft_tokens, **options)
    base = functools.partial(plain.generate, module, variables, batch, **options)
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
  params = sum(leaf.size for leaf in jax.tree.leaves(drafts[1]["params"]))
  return Report(every, differences, sum(map(len, references)), params, *np.sum(times, axis=0).tolist(),
                tuple(speed_ups))


def _joined(batches):
  """What was written in several batches."""
  rows = lambda name: [row for batch in batches for row in getattr(batch, name)]
  return Speculated(rows("tokens"), tuple(rows("calls")), tuple(rows("drafted")), tuple(rows("accepted")),
                    batches[0].shared)
