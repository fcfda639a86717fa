"""Decoding: prompts of unequal lengths go on together, each as if it were alone.

A row of the batch keeps the key and value of the token at position p in slot p of its own part of the
cache, so rows need no common index and no padding between prompt and continuation. Whatever is known of a
row but its last token is in the cache; a step feeds that last one.
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

from nestnet.decoder_checks import Tokens, check_decoder, check_tokens, listed, unpadded, whole
from nestnet.decoder_steps import feed, prefill, unrolled
from nestnet.errors import UserError

# What a random number is for, beside its seed, row and position.
DRAW, DRAFT, ACCEPT = range(3)
TIE = 1e-4


def _static() -> Any:
  return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Texts that grow.

  Attributes:
    tokens: `[batch, slots]`, int32; behind `lengths` they mean nothing.
    lengths: `[batch]`, how many tokens are known.
    limits: `[batch]`, how many there may be; 0 in a row that only fills the batch.
    done: `[batch]`, whether the row has ended.
  """

  tokens: jax.Array
  lengths: jax.Array
  limits: jax.Array
  done: jax.Array

  def ending(self, count: int) -> jax.Array:
    """The last known tokens of each row, `[batch, count]`."""
    return jnp.take_along_axis(self.tokens, jnp.maximum(self.places(-count, count), 0), axis=1)

  def places(self, first: int | jax.Array, count: int) -> jax.Array:
    """Positions from `first` behind the known tokens, `[batch, count]`."""
    return self.lengths[:, None] + first + jnp.arange(count)[None]

  def fed(self, first: int | jax.Array, count: int) -> jax.Array:
    """`places` of tokens that a network reads: -1 where no prediction is wanted from there."""
    places = self.places(first, count)
    wanted = (places >= 0) & (places < self.limits[:, None] - 1) & ~self.done[:, None]
    return jnp.where(wanted, places, -1)

  def extended(self, new: jax.Array, count: jax.Array, stop: jax.Array) -> Rows:
    """The rows with the first `count` `[batch]` of `new` `[batch, n]`, up to a stop token or the limit."""
    batch, n = new.shape
    offsets = jnp.arange(n)[None]
    stops = (new[:, :, None] == stop[None, None]).any(-1) & (offsets < count[:, None])
    stopped, first = stops.any(1), stops.argmax(1)
    count = jnp.minimum(jnp.where(stopped, first + 1, count), self.limits - self.lengths)
    count = jnp.where(self.done, 0, count)
    places = jnp.where(offsets < count[:, None], self.places(0, n), self.tokens.shape[1])
    tokens = self.tokens.at[jnp.arange(batch)[:, None], places].set(new, mode="drop")
    lengths = self.lengths + count
    ended = (stopped & (first < count)) | (lengths >= self.limits)
    return Rows(tokens, lengths, self.limits, self.done | ended)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn; numbers are data, so that they compile nothing anew.

  Attributes:
    key: Of the seed.
    temperature: What logits are divided by.
    top_k: How many of the most probable tokens may be drawn.
    top_p: The least share of probability that these have together.
    greedy: Whether the most probable is taken instead.
    filters: Whether `top_k` and `top_p` are looked at.
  """

  key: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  greedy: bool = _static()
  filters: bool = _static()

  def log_probabilities(self, logits: jax.Array) -> jax.Array:
    """Of the distribution that is drawn from, `[..., vocab]`, float32."""
    logits = logits.astype(jnp.float32) / self.temperature
    if self.filters:
      logits = filtered(logits, self.top_k, self.top_p)
    return jax.nn.log_softmax(logits)

  def keys(self, places: jax.Array, purpose: int) -> jax.Array:
    """A key for each row and position `[batch, n]`."""
    key = jax.random.fold_in(self.key, purpose)
    one = lambda row, place: jax.random.fold_in(jax.random.fold_in(key, row), place)
    return jax.vmap(jax.vmap(one, (None, 0)))(jnp.arange(len(places)), places)

  def draw(self, logits: jax.Array, places: jax.Array, purpose: int = DRAW) -> jax.Array:
    """Tokens `[batch, n]` for positions, from logits or log-probabilities `[batch, n, vocab]`."""
    return jax.vmap(jax.vmap(jax.random.categorical))(self.keys(places, purpose), logits).astype(jnp.int32)

  def next(self, logits: jax.Array, places: jax.Array) -> jax.Array:
    """Tokens `[batch, n]` after logits `[batch, n, vocab]`."""
    if self.greedy:
      return logits.argmax(-1).astype(jnp.int32)
    return self.draw(self.log_probabilities(logits), places)


def filtered(logits: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
  """Logits with minus infinity where a token may not be drawn.

  Of the `top_k` most probable the fewest stay that hold `top_p` of their probability (nucleus sampling,
  Holtzman et al., 1904.09751), and at least one. Of equal logits the first ones stay.

  Args:
    logits: `[..., vocab]`, divided by the temperature.
    top_k: At least 1; more than there are tokens leaves all.
    top_p: Above 0, up to 1.

  Example:
    >>> logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    >>> jnp.isfinite(filtered(logits, 3, 0.75)).tolist()
    [False, True, False, True]
  """
  order = jnp.argsort(-logits, axis=-1)
  ranks = jnp.argsort(order, axis=-1)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  every = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  shares = jax.nn.softmax(jnp.where(every < top_k, ranked, -jnp.inf), axis=-1)
  before = jnp.cumsum(shares, axis=-1) - shares
  count = ((before < top_p) & (every < top_k)).sum(-1, keepdims=True)
  return jnp.where(ranks < jnp.maximum(count, 1), logits, -jnp.inf)


def generate(module: nn.Module, variables: Mapping[str, Any], prompts: Sequence[Tokens], *,
             max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, stop: Iterable[int] = (), seed: int = 0) -> list[list[int]]:
  """What a network writes behind prompts.

  Sizes are rounded up to powers of two or three halves of these, so that few programs are compiled however
  many calls there are. A draw is a pure function of the seed, the row and the position.

  Args:
    module: A decoder.
    variables: Its variables, `{"params": ...}`.
    prompts: Tokens of each row, of any lengths; a -1 among them is skipped, so that arrays which are padded
      on either side do too.
    max_new_tokens: How many tokens may be added to each.
    temperature: What logits are divided by; 0 takes the most probable token.
    top_k: Draw only from so many of the most probable.
    top_p: Draw only from the fewest that together have this share of probability.
    stop: Tokens that end a row.
    seed: Of the draws.

  Returns:
    The new tokens of each row, its stop token included.

  Raises:
    ValueError: An empty prompt, one that with the new tokens is longer than the context, an unknown token,
      an option that is out of range, a module that is no decoder, or variables of another one.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16, context=16)
    >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> [len(row) for row in generate(model, variables, [[1, 2, 3], [4]], max_new_tokens=5)]
    [5, 5]
  """
  check_decoder(module, variables)
  how = sampling(temperature, top_k, top_p, seed)
  rows, prefilled = start(module, prompts, max_new_tokens, module.context)
  module, variables = unrolled(module, variables)
  return written(_generate(module, prefilled, variables, rows, how, stops(module, stop)), prompts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(module, prefilled, variables, rows, how, stop):
  def step(state):
    rows, cache = state
    outputs, cache = feed(module, variables, cache, rows.ending(1), rows.fed(-1, 1))
    new = how.next(outputs["logits"], rows.places(0, 1))
    return rows.extended(new, jnp.ones_like(rows.lengths), stop), cache

  state = rows, prefill(module, variables, rows, prefilled)[1]
  return jax.lax.while_loop(lambda state: ~state[0].done.all(), step, state)[0]


def sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> Sampling:
  """Checks how tokens are to be drawn.

  Raises:
    ValueError: A number is out of range.
  """
  if not (0 <= temperature < np.inf):
    raise UserError(f"temperature: got {temperature}, allowed is at least 0: the most probable token")
  seed = whole(seed, "seed")
  if top_k is not None and (top_k := whole(top_k, "top_k")) < 1:
    raise UserError(f"top_k: got {top_k}, allowed is at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise UserError(f"top_p: got {top_p}, allowed is above 0, up to 1")
  cut = top_k is not None or (top_p is not None and top_p < 1)
  return Sampling(
    jax.random.key(seed), jnp.float32(temperature or 1), jnp.int32(top_k or np.iinfo(np.int32).max),
    jnp.float32(2 if top_p in (None, 1) else top_p), greedy=temperature == 0, filters=cut and temperature > 0)


def start(module: nn.Module, prompts: Sequence[Tokens], new: int, context: int) -> tuple[Rows, int]:
  """Rows of the prompts, and how many leading slots hold all of them but the last tokens.

  Args:
    module: A decoder.
    prompts: Tokens of each row.
    new: How many tokens may be added to each.
    context: How long a row may become.

  Raises:
    ValueError: As `generate`.
  """
  prompts = unpadded(prompts)
  if (new := whole(new, "max_new_tokens")) < 1:
    raise UserError(f"max_new_tokens: got {new}, allowed is at least 1")
  if not prompts:
    raise UserError("no prompts; at least one is needed")
  for number, prompt in enumerate(prompts, 1):
    if not prompt:
      raise UserError(f"prompt {number} is empty; allowed is at least one token")
    check_tokens(module, prompt, f"prompt {number}")
    if len(prompt) + new > context:
      raise UserError(
        f"prompt {number} has {len(prompt)} tokens, and {new} new ones may follow; together they may be "
        f"{context}, the context of the network")
  lengths = [len(prompt) for prompt in prompts]
  slots = min(rounded(max(lengths) + new), context)
  tokens = np.zeros((rounded(len(prompts)), slots), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[:len(prompt)] = prompt
  lengths = np.array(lengths + [0] * (len(tokens) - len(prompts)), np.int32)
  limits = np.where(lengths > 0, lengths + new, 0).astype(np.int32)
  rows = Rows(*map(jnp.asarray, (tokens, lengths, limits, lengths == 0)))
  longest = int(lengths.max()) - 1
  return rows, min(rounded(longest), slots) if longest else 0


def stops(module: nn.Module, stop: Iterable[int]) -> jax.Array:
  """Tokens that end a row, filled up with -1, which is none.

  Raises:
    ValueError: An unknown token.
  """
  stop = listed(stop, "stop")
  check_tokens(module, stop, "stop")
  return jnp.asarray(stop + [-1] * (rounded(max(len(stop), 1)) - len(stop)), jnp.int32)


def written(rows: Rows, prompts: Sequence[Tokens]) -> list[list[int]]:
  """What stands in each row behind its prompt."""
  tokens, lengths = np.asarray(rows.tokens), np.asarray(rows.lengths)
  return [tokens[i, len(prompt):lengths[i]].tolist() for i, prompt in enumerate(unpadded(prompts))]


def batches(prompts: Sequence[Tokens], size: int | None) -> list[Sequence[Tokens]]:
  """Prompts by so many at a time; all together where no size is given.

  Raises:
    ValueError: A size below 1.
  """
  if size is not None and size < 1:
    raise UserError(f"batch_size: got {size}, allowed is at least 1")
  size = size or max(len(prompts), 1)
  return [prompts[i:i + size] for i in range(0, len(prompts), size)]


def rounded(size: int) -> int:
  """The next power of two, or three halves of one.

  Example:
    >>> [rounded(n) for n in (1, 2, 3, 5, 7, 12, 13, 100)]
    [1, 2, 3, 6, 8, 12, 16, 128]
  """
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if size <= 3 * power // 4 and power >= 4 else power


@dataclasses.dataclass(frozen=True)
class Differences:
  """Rows of two sets of continuations.

  Attributes:
    equal: How many are the same.
    ties: How many first differ where the two best logits are hardly apart.
    other: Numbers of those that differ elsewhere, from 0.
  """

  equal: int
  ties: int
  other: tuple[int, ...]


def differences(module: nn.Module, variables: Mapping[str, Any], prompts: Sequence[Tokens],
                new: Sequence[Tokens], reference: Sequence[Tokens], tie: float = TIE) -> Differences:
  """Compares greedy continuations with those of a reference.

  Sums in another order may turn round two logits that are equal but for rounding; everything behind such
  a place is another text.

  Args:
    module: What wrote the reference.
    variables: Its variables.
    prompts: Of both.
    new: Continuations.
    reference: Of the same prompts.
    tie: How far apart the two best logits of the reference may be where the texts first differ.
  """
  found = {}
  for i, (prompt, own, other) in enumerate(zip(unpadded(prompts), new, reference, strict=True)):
    if list(own) != list(other):
      same = next((j for j, (a, b) in enumerate(zip(own, other)) if a != b), None)
      # A text that ends where the other goes on is no tie, whatever the logits say.
      found[i] = None if same is None else [*prompt, *other[:same]]
  prefixes = {i: prefix for i, prefix in found.items() if prefix}
  tied = set()
  if prefixes:
    tokens, places = padded(list(prefixes.values()), module.context)
    last = np.maximum((places >= 0).sum(1) - 1, 0)
    best = np.asarray(_two_best(module, variables, tokens, places, last))
    tied = {i for i, (first, second) in zip(prefixes, best) if first - second <= tie}
  return Differences(len(prompts) - len(found), len(tied), tuple(i for i in found if i not in tied))


@functools.partial(jax.jit, static_argnums=0)
def _two_best(module, variables, tokens, places, last):
  logits = module.apply(variables, tokens, positions=places)["logits"]
  return jax.lax.top_k(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], 2)[0]


def padded(texts: Sequence[Tokens], context: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and positions `[batch, length]` of texts, filled up with 0 and -1 to at most `context`.

  Example:
    >>> padded([[5, 6, 7], [8]], context=16)[1].tolist()
    [[0, 1, 2], [0, -1, -1]]
  """
  shape = rounded(len(texts)), min(rounded(max(map(len, texts))), context)
  tokens, places = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
  for i, text in enumerate(texts):
    tokens[i, :len(text)], places[i, :len(text)] = text, range(len(text))
  return tokens, places
