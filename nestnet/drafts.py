"""Who drafts for a network: a member of its family or another one, and whose keys and values it reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import abstract_variables, variable_axes
from nestnet.decoder_checks import check_decoder
from nestnet.decoder_steps import Pair, unrolled
from nestnet.errors import UserError
from nestnet.execution import cut, module_of, sizes_of
from nestnet.models.cache import init_cache
from nestnet.slicing import take, unrolled_over
from nestnet.subnet import Subnet, kept_ids

# How a draft reads what the target has written: it does not, or its slice of it, or it is the first layers
# of the target, which goes on from their outputs.
Sharing = tuple[Subnet, tuple[tuple[str, int], ...]]
BEHIND = "behind"


@dataclasses.dataclass(frozen=True, eq=False)
class Drafts:
  """A target, and who drafts for it; layers of both one by one.

  Attributes:
    target: What checks; with `shared` `BEHIND` the layers that the draft lacks, which read its outputs.
    draft: What drafts.
    shared: None where each has a cache of its own; `BEHIND`; or which slice of the target's cache the draft
      reads: its sizes and the groups of their axes.
  """

  target: Pair
  draft: Pair
  shared: Sharing | str | None


def prepared(module: nn.Module, variables: Mapping[str, Any], draft: Subnet | Pair,
             share_cache: bool | None = None, groups: Mapping[str, int] | None = None) -> Drafts:
  """Checks who is to draft, and cuts it out; arguments and errors are those of `speculate`."""
  check_decoder(module, variables)
  pair = drafted_by(module, variables, draft, groups)
  first = leading(module, draft)
  if not (first if share_cache is None else share_cache):
    return Drafts(unrolled(module, variables), unrolled(*pair), None)
  if not isinstance(draft, Subnet):
    raise UserError("share_cache=True with a draft that has weights of its own; allowed is a member of the "
                    "family")
  if first and pair[0].layers < module.layers:
    return Drafts(unrolled(*_behind(module, variables, pair[0].layers)), unrolled(*pair), BEHIND)
  shared = sizes_of(module, draft), tuple((groups or {}).items())
  found = Drafts(unrolled(module, variables), unrolled(*pair), shared)
  there, needed = (jax.tree.map(jnp.shape, jax.eval_shape(make)) for make in (
    lambda: sliced(init_cache(found.target[0], 1, 1), shared), lambda: init_cache(found.draft[0], 1, 1)))
  if there != needed:
    raise UserError(f"share_cache=True: the cache of the draft {draft} is no slice of the target's")
  return found


def _behind(module, variables, first):
  """The layers behind the first ones; embedding, norm and head are those of the network."""
  ids = tuple(range(first, module.layers))
  sizes = {axis: getattr(module, axis) for axis in ("heads", "kv_heads", "mlp")}
  lists = {axis: size[first:] for axis, size in sizes.items() if isinstance(size, tuple)}
  rest = Subnet(layers=ids, **lists)
  small = module_of(module, rest)
  return small, _cut(module, small, rest, ())(variables)


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
    if hasattr(module, "check_member"):
      module.check_member(draft)
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


def sliced(cache: Any, shared: Sharing) -> Any:
  """A member's part of a cache, whose layers stand one by one."""
  subnet, groups = shared
  named = jax.tree.map(lambda leaf: "batch kv_heads slots head_dim", cache)
  return take(cache, named, subnet, dict(groups), strict=False)


def merged(cache: Any, drafted: Any, shared: Sharing) -> Any:
  """A cache with what a draft has written to the layers that it read whole: keeping both would copy them.

  Only where the target writes to the same slots before it reads them.
  """
  layers = dict(cache["blocks"])
  for position, i in enumerate(kept_ids(shared[0].chosen["layers"])):
    own = drafted["blocks"][f"layers_{position}"]
    if jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, layers[f"layers_{i}"]):
      layers[f"layers_{i}"] = own
  return {"blocks": layers}
