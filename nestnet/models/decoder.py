"""Decoders of text in plain linen: Llama (2302.13971, 2407.21783) and Qwen3 (2505.09388).

Pre-norm blocks with RMSNorm, rotary positions (2104.09864), grouped-query attention (2305.13245) and
SwiGLU (2002.05202).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import axes
from nestnet.errors import UserError, one_of
from nestnet.models.cache import write
from nestnet.models.layers import Linear, attend, grouped_attention, project, rms_norm
from nestnet.models.rotary import frequencies, rotate, scaling
from nestnet.models.stack import constant, stack
from nestnet.models.switch import CHOICE
from nestnet.space import Space
from nestnet.subnet import Size, Subnet, derived, kept_ids

AXES = ("layers", "embed", "heads", "kv_heads", "mlp")


class Decoder(nn.Module):
  """Tokens `[batch, length]` to `logits` of the next ones, and `features`.

  `layers`, `embed`, `heads`, `kv_heads` and `mlp` are the axes along which it nests. The last three may be
  tuples with one size a layer. Heads stand in `kv_heads` groups, whose heads share keys and values: fewer
  `kv_heads` are the leading groups, and fewer `heads` beside as many of them the leading ones of each group.

  Attributes:
    layers: Number of blocks.
    embed: Width of the residual stream.
    heads: Query heads, in all groups.
    kv_heads: Groups of them, or heads of keys and values; it divides `heads`.
    mlp: Width of the hidden layer of the MLP.
    vocab: Number of tokens.
    head_dim: Width of a head, even; `embed // heads` by default, and kept by `clone`.
    tied: Whether the head is the embedding transposed.
    qk_norm: Whether queries and keys are normalised over `head_dim` (Qwen3).
    attention_bias: Whether the projections of attention have biases.
    rope_theta: Base of the wave lengths of rotary positions.
    rope_scaling: How these are stretched beyond the context of pre-training, as pairs in the order of
      their keys, or a mapping (`nestnet.models.rotary.scaling`).
    norm_eps: Added to the mean square in each norm.
    context: The longest sequence.
    layer_dropout: Rate of skipping the last block, for each example by itself, in training; of earlier
      blocks it is that times `2^(l / (layers - 1)) - 1` (LayerSkip, 2404.16710, section 4.1.1).
    remat: Whether to recompute blocks in the backward pass.
    unroll: Blocks in one iteration of the scan over layers.
    dtype: Of the computation; norms, softmax and rotations are in float32.
    param_dtype: Of the stored parameters.
  """

  layers: int
  embed: int
  heads: Size
  kv_heads: Size
  mlp: Size
  vocab: int
  head_dim: int | None = None
  tied: bool = True
  qk_norm: bool = False
  attention_bias: bool = False
  rope_theta: float = 10000.0
  rope_scaling: tuple[tuple[str, Any], ...] | None = None
  norm_eps: float = 1e-6
  context: int = 2048
  layer_dropout: float = 0.0
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    for field in (*AXES, "vocab", "context"):
      for size in _each(getattr(self, field)):
        if isinstance(size, int) and size < 1:
          raise UserError(f"Decoder: {field}={getattr(self, field)}; allowed is at least 1")
    for heads, kv_heads in _pairs(self.heads, self.kv_heads):
      if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise UserError(f"Decoder: heads={self.heads} does not divide into kv_heads={self.kv_heads} groups")
    if self.head_dim is None:
      if not isinstance(self.heads, int) or self.embed % self.heads:
        raise UserError(f"Decoder: embed={self.embed} does not divide into heads={self.heads}; give head_dim")
      object.__setattr__(self, "head_dim", self.embed // self.heads)
    if self.head_dim % 2 or self.head_dim < 2:
      raise UserError(f"Decoder: head_dim={self.head_dim}; allowed are even widths, whose halves rotary "
                      "positions turn")
    if not 0 <= self.layer_dropout < 1:
      raise UserError(f"Decoder: layer_dropout={self.layer_dropout}; allowed is [0, 1)")
    object.__setattr__(self, "rope_scaling", scaling(self.rope_scaling))
    super().__post_init__()

  # Axes whose units have no other order, and why.
  placed = {"head_dim": "rotary positions turn each of its units by an angle of its own",
            "vocab": "tokens are its places"}

  def sizes(self, subnet: Subnet) -> Subnet:
    """How long the axes of the parameters are in a sub-network: `queries`, the heads of a group, follow.

    Sizes that no network has, as heads that do not divide into their groups, are rounded down.

    Raises:
      ValueError: An axis is no choice of this network.

    Example:
      >>> model = Decoder(layers=2, embed=16, heads=8, kv_heads=2, mlp=32, vocab=256)
      >>> str(model.sizes(Subnet(layers=1, heads=4)))
      'layers=1,embed=16,kv_heads=2,queries=2,mlp=32'
    """
    for axis in subnet:
      if axis not in AXES:
        raise one_of("axis of Decoder", axis, AXES)
    ids = subnet.chosen.get("layers", self.layers)

    def size(axis):
      own = getattr(self, axis)
      if axis not in subnet and isinstance(own, tuple):
        return tuple(own[i] for i in kept_ids(ids))
      return subnet.chosen.get(axis, own)

    return Subnet(layers=ids, embed=size("embed"), kv_heads=size("kv_heads"),
                  queries=_queries(size("heads"), size("kv_heads")), mlp=size("mlp"))

  def check_member(self, subnet: Subnet) -> None:
    """Raises `ValueError` where a sub-network has more heads in a group than this network."""
    full = _pairs(self.heads, self.kv_heads)
    own = _pairs(*(subnet.chosen.get(axis, getattr(self, axis)) for axis in ("heads", "kv_heads")))
    for position, i in enumerate(kept_ids(subnet.chosen.get("layers", self.layers))):
      heads, kv_heads = own[min(position, len(own) - 1)]
      most = operator.floordiv(*full[min(i, len(full) - 1)])
      if heads // kv_heads > most:
        raise UserError(
          f"{subnet}: heads={heads} in kv_heads={kv_heads} groups are {heads // kv_heads} in each, where the "
          f"largest has {most}; allowed beside kv_heads={kv_heads} are at most heads={kv_heads * most}")

  def check_space(self, space: Space) -> None:
    """Raises `ValueError` where heads of a family are no equal parts of their groups, or too many in one."""
    if space.groups.get("heads", 1) > 1:
      raise UserError(f"space.groups.heads={space.groups['heads']}: heads stand in groups already; allowed "
                      "are space.groups.kv_heads")
    axes = [axis for axis in ("heads", "kv_heads") if axis in space.axes]
    free = [axis for axis in axes if axis in space.per_layer]
    full = max(heads // kv_heads for heads, kv_heads in _pairs(self.heads, self.kv_heads))
    coupled = space.combinations([axis for axis in axes if axis not in free])
    for row, own in itertools.product(coupled, itertools.product(*map(space.choices, free))):
      row = {"heads": self.heads, "kv_heads": self.kv_heads, **row, **dict(zip(free, own))}
      bad = next(((h, k) for h, k in _pairs(row["heads"], row["kv_heads"]) if h % k or h // k > full), None)
      if not bad or (space.constraint and Subnet(**{**space.largest.chosen, **row}) not in space):
        continue
      heads, kv_heads = bad
      why = "does not divide into these groups" if heads % kv_heads else (
        f"has {heads // kv_heads} heads in a group, where the largest has {full}")
      raise UserError(f"the space has heads={heads} beside kv_heads={kv_heads}, which {why}; allowed are "
                      "sizes that go together, as with couple={'kv_heads heads': [[1, 2], [2, 4]]}")

  @nn.compact
  def __call__(self, tokens: jax.Array, *, positions: jax.Array | None = None, train: bool = False,
               taps: bool = False, exits: Sequence[int] | str = (), inner: jax.Array | None = None
               ) -> dict[str, Any]:
    """Applies the network.

    With a collection `cache` (`init_cache`), keys and values are written to the slots of their row that
    their positions say, and a query at position p attends to the slots 0 to p; else to the keys of the
    same call whose positions are at most its own.

    Args:
      tokens: int32 `[batch, length]`.
      positions: int32 `[batch, length]`, by default 0 to `length - 1`. At -1 is padding, which nothing
        attends to.
      train: Whether layers are dropped; it uses the `dropout` rng.
      taps: Whether to return every block's output.
      exits: Depths, those beyond its own left out, or `"all"`: what the networks of so many leading layers
        would say is returned too, by the same last norm and head (SoFT, 2309.08968).
      inner: `[batch, length, embed]`, what the first layer reads instead of the tokens' embeddings: the
        output of a network whose further layers these are.

    Returns:
      `logits` `[batch, length, vocab]`, `features` `[batch, length, embed]` behind the last norm, with
      `taps` the blocks' outputs `[layers, batch, length, embed]`, and with `exits` a dict of that name, of
      logits by depth.

    Raises:
      ValueError: The sequence is longer than the context, or there are exits and data chooses the layers.
    """
    if tokens.shape[1] > self.context:
      raise UserError(f"Decoder: a sequence of {tokens.shape[1]} tokens; allowed are at most "
                      f"context={self.context}")
    typed, exits = dict(dtype=self.dtype, param_dtype=self.param_dtype), self._depths(exits)
    cached = "cache" in self.variables
    ordered = positions is None
    if ordered:
      positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, table = Embedding(self.vocab, self.embed, name="embedding", **typed)(tokens)
    x = x if inner is None else inner

    parts = {
      "attention": functools.partial(
        Attention, head_dim=self.head_dim, qk_norm=self.qk_norm, use_bias=self.attention_bias,
        rope_theta=self.rope_theta, rope_scaling=self.rope_scaling, norm_eps=self.norm_eps, **typed),
      "mlp": functools.partial(MLP, by_row=cached, norm_eps=self.norm_eps, **typed)}
    if cached and CHOICE in self.variables:
      raise UserError("a cache belongs to one network, and here data chooses which; allowed is the member's "
                      "own module")
    skips = {"layer_dropout": self._rates(), "layer": range(self.layers)} if self.layer_dropout else None
    key = self.make_rng("dropout") if train and skips else None
    queries = _queries(self.heads, self.kv_heads)
    x, outputs = stack(
      parts, x, layers=self.layers, constants=skips, remat=self.remat, taps=taps or bool(exits),
      unroll=self.unroll,
      sizes={"attention": {"kv_heads": self.kv_heads, "queries": queries}, "mlp": {"mlp": self.mlp}},
      positions=positions, ordered=ordered, key=key)

    norm = rms_norm("norm", epsilon=self.norm_eps, **typed)
    linear = functools.partial(Linear, "embed -> vocab", (self.vocab,), use_bias=False, by_row=cached,
                               **typed)
    head = linear(name="head") if not self.tied else functools.partial(
      project, kernel=table.T, dtype=self.dtype, by_row=cached)
    features = norm(x)
    result = {"logits": head(features), "features": features} | ({"taps": outputs} if taps else {})
    if exits:
      result["exits"] = {depth: result["logits"] if depth == self.layers else head(norm(outputs[depth - 1]))
                         for depth in exits}
    return result

  def _depths(self, exits):
    """The depths of exits that this network has."""
    if isinstance(exits, str):
      if exits != "all":
        raise one_of("exits", exits, ("all",))
      exits = range(1, self.layers + 1)
    if any(not isinstance(depth, int) or depth < 1 for depth in exits):
      raise UserError(f"Decoder: exits={list(exits)}; allowed are depths of at least 1, or all")
    if exits and "layers" in self.variables.get(CHOICE, {}).get("blocks", {}):
      raise UserError("exits are depths of one network, and here data chooses its layers; allowed: "
                      "train.execution=slice")
    return [depth for depth in exits if depth <= self.layers]

  def _rates(self):
    last = max(1, self.layers - 1)
    return [self.layer_dropout * (2 ** (i / last) - 1) for i in range(self.layers)]


def head_rows(kv_heads: Sequence[int], queries: Sequence[int]) -> tuple[tuple[int, int], ...]:
  """Rows for `couple={"kv_heads heads": ...}` of a space: so many groups with so many heads in each.

  Example:
    >>> head_rows(kv_heads=(1, 2), queries=(1, 2))
    ((1, 1), (1, 2), (2, 2), (2, 4))
  """
  return tuple((groups, groups * heads) for groups in kv_heads for heads in queries)


class Embedding(nn.Module):
  """Tokens `[batch, length]` to their rows `[batch, length, embed]` of a table, and that table."""

  vocab: int
  embed: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens):
    table = self.param("embedding", axes(nn.initializers.normal(0.02), "vocab -> embed"),
                       (self.vocab, self.embed), self.param_dtype)
    # Padding, -1, reads the last row; what is beyond the table becomes NaN, which nobody overlooks.
    return jnp.take(table, tokens, axis=0).astype(self.dtype), table


class Attention(nn.Module):
  """Causal self-attention on a residual branch; `[batch, length, embed]` to the same."""

  kv_heads: int
  queries: int
  head_dim: int
  qk_norm: bool = False
  use_bias: bool = False
  rope_theta: float = 10000.0
  rope_scaling: tuple[tuple[str, Any], ...] | None = None
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, positions, ordered, key):
    typed, cached = dict(dtype=self.dtype, param_dtype=self.param_dtype), self.has_variable("cache", "key")
    linear = functools.partial(Linear, use_bias=self.use_bias, by_row=cached, **typed)
    y = rms_norm("norm", epsilon=self.norm_eps, **typed)(x)
    q = linear("embed -> kv_heads queries head_dim", (self.kv_heads, self.queries, self.head_dim), name="q")(
      y)
    k = linear("embed -> kv_heads head_dim", (self.kv_heads, self.head_dim), name="k")(y)
    v = linear("embed -> kv_heads head_dim", (self.kv_heads, self.head_dim), name="v")(y)
    if self.qk_norm:
      q = rms_norm("q_norm", "head_dim", epsilon=self.norm_eps, **typed)(q)
      k = rms_norm("k_norm", "head_dim", epsilon=self.norm_eps, **typed)(k)
    waves = frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
    q, k = rotate(q, positions, waves), rotate(k, positions, waves)
    if cached:
      y = attend(q, *self._cached(k, v, positions))
    elif ordered:
      y = grouped_attention(q, k, v)
    else:
      y = grouped_attention(q, k, v, (positions[:, None] <= positions[:, :, None]) & (positions[:, None] >= 0))
    y = linear("kv_heads queries head_dim -> embed", x.shape[-1:], name="out")(y)
    return x + skipped(self, y, constants, key)

  def _cached(self, k, v, positions):
    """Keys and values of all slots, with these written, and which of them each query sees."""
    stored = []
    for name, entries in (("key", k), ("value", v)):
      cache = self.variable("cache", name)
      stored.append(write(cache.value, entries, positions))
      if self.is_mutable_collection("cache"):
        cache.value = stored[-1]
    visible = jnp.arange(stored[0].shape[2])[None, None] <= positions[:, :, None]
    return *(x.astype(k.dtype) for x in stored), visible


class MLP(nn.Module):
  """SwiGLU on a residual branch; `[batch, length, embed]` to the same."""

  mlp: int
  by_row: bool = False
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, constants, *, positions, ordered, key):
    del positions, ordered
    typed = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    linear = functools.partial(Linear, use_bias=False, by_row=self.by_row, **typed)
    y = rms_norm("norm", epsilon=self.norm_eps, **typed)(x)
    gate, up = (linear("embed -> mlp", (self.mlp,), name=name)(y) for name in ("gate", "up"))
    y = linear("mlp -> embed", x.shape[-1:], name="down")(nn.silu(gate) * up)
    return x + skipped(self, y, constants, key)


def skipped(module: nn.Module, y: jax.Array, constants: Any, key: jax.Array | None) -> jax.Array:
  """What a residual branch adds: `y`, and 0 for the examples that skip its layer; one draw for a layer."""
  if not constants:
    return y
  rate, layer = (constant(module, name, constants) for name in ("layer_dropout", "layer"))
  if key is None:
    return y
  key = jax.random.fold_in(key, layer.astype(jnp.int32))
  keep = jax.random.bernoulli(key, 1 - rate, (len(y),) + (1,) * (y.ndim - 1))
  return jnp.where(keep, y, 0)


def _each(size: Any) -> tuple[Any, ...]:
  return size if isinstance(size, tuple) else (size,)


def _pairs(heads: Any, kv_heads: Any) -> list[tuple[Any, Any]]:
  """Heads and groups of each layer, or of all layers; lists of other lengths are the stack's to refuse."""
  count = max(len(_each(heads)), len(_each(kv_heads)))
  wide = lambda size: size if isinstance(size, tuple) else (size,) * count
  return list(zip(wide(heads), wide(kv_heads)))


def _queries(heads: Any, kv_heads: Any) -> Any:
  """Heads of a group: one number, one for each layer, or `OneOf` several."""
  each = lambda heads, kv_heads: max(1, heads // kv_heads)
  if isinstance(heads, tuple) or isinstance(kv_heads, tuple):
    return tuple(each(*pair) for pair in _pairs(heads, kv_heads))
  return derived(heads, each, kv_heads)
