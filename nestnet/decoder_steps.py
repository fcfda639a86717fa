"""One step of decoding: a network in the form that steps fastest, tokens in, logits and a longer cache out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import variable_axes
from nestnet.models.cache import init_cache
from nestnet.slicing import unstacked

Pair = tuple[nn.Module, Mapping[str, Any]]


def unrolled(module: nn.Module, variables: Mapping[str, Any]) -> Pair:
  """The same decoder with its layers one by one: the form of a member with sizes of its own in each layer.

  A scan over layers copies the weights of each out of their stack, in every step of a loop over tokens as
  much as the step itself reads. Here it is done once, outside of the loop.

  Args:
    module: A decoder; one whose layers are not stacked is returned as it is.
    variables: Its variables.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=2, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16)
    >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> module, own = unrolled(model, variables)
    >>> module.kv_heads, sorted(own["params"]["blocks"])
    ((1, 1), ['layers_0', 'layers_1'])
  """
  if any(isinstance(getattr(module, axis), tuple) for axis in ("heads", "kv_heads", "mlp")):
    return module, variables
  return module.clone(kv_heads=(module.kv_heads,) * module.layers), _unstacked(module)(variables)


@functools.lru_cache(maxsize=64)
def _unstacked(module):
  axes = variable_axes(module, jax.ShapeDtypeStruct((1, 1), jnp.int32))
  return jax.jit(lambda variables: {
    name: unstacked(tree, axes[name]) if name in axes else tree for name, tree in variables.items()})


def feed(module: nn.Module, variables: Mapping[str, Any], cache: Any, tokens: jax.Array, places: jax.Array,
         **options: Any) -> tuple[dict[str, Any], Any]:
  """Outputs after tokens at positions `[batch, n]` (-1: none), and the cache with them.

  Args:
    module: A decoder.
    variables: Its variables.
    cache: Its cache.
    tokens: `[batch, n]`.
    places: Their positions.
    **options: Of the decoder's call.
  """
  outputs, changed = module.apply(
    {**variables, "cache": cache}, tokens, positions=places, mutable=["cache"], **options)
  return outputs, changed["cache"]


def prefill(module: nn.Module, variables: Mapping[str, Any], rows: Any, count: int, **options: Any
            ) -> tuple[dict[str, Any], Any]:
  """Outputs, and a cache that holds whatever is known of each row but its last token.

  Args:
    module: A decoder.
    variables: Its variables.
    rows: The prompts, `nestnet.generate.Rows`.
    count: Of leading slots that hold all these tokens; 0 gives no outputs.
    **options: Of the decoder's call.
  """
  cache = init_cache(module, *rows.tokens.shape)
  if not count:
    return {}, cache
  places = jnp.broadcast_to(jnp.arange(count)[None], (len(rows.tokens), count))
  places = jnp.where(places < rows.lengths[:, None] - 1, places, -1)
  return feed(module, variables, cache, rows.tokens[:, :count], places, **options)
