"""Keys and values of past tokens: where a decoder writes and finds them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.errors import UserError

# Up to so many tokens are written one by one, in place; XLA writes scattered ones by a loop.
FEW = 8


def init_cache(module: nn.Module, batch: int, slots: int, dtype: Any = None) -> dict[str, Any]:
  """An empty `cache` of a decoder: keys and values of `slots` positions for each of `batch` rows.

  Args:
    module: The network that reads and writes it.
    batch: Number of rows.
    slots: Number of positions, at most the context.
    dtype: Of the stored keys and values; that of the computation by default.

  Raises:
    ValueError: More slots than the context.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=2, embed=16, heads=4, kv_heads=2, mlp=32, vocab=256)
    >>> init_cache(model, batch=3, slots=8)["blocks"]["attention"]["key"].shape
    (2, 3, 2, 8, 4)
  """
  if slots > module.context:
    raise UserError(f"a cache of {slots} slots; allowed are at most context={module.context}")

  def layer(size, *lead):
    zeros = lambda: jnp.zeros((*lead, batch, size, slots, module.head_dim), dtype or module.dtype)
    return {"attention": {"key": zeros(), "value": zeros()}}

  sizes = module.kv_heads
  if not any(isinstance(getattr(module, axis), tuple) for axis in ("heads", "kv_heads", "mlp")):
    return {"blocks": layer(sizes, module.layers)}
  sizes = sizes if isinstance(sizes, tuple) else (sizes,) * module.layers
  return {"blocks": {f"layers_{i}": layer(size) for i, size in enumerate(sizes)}}


def write(stored: jax.Array, entries: jax.Array, positions: jax.Array) -> jax.Array:
  """A cache with entries in the slots of their positions.

  Args:
    stored: `[batch, kv_heads, slots, head_dim]`.
    entries: `[batch, length, kv_heads, head_dim]`, of any type.
    positions: `[batch or 1, length]`, below `slots`; an entry at -1 is dropped.

  Example:
    >>> entries = jnp.array([[[[5.]], [[6.]], [[7.]]]])
    >>> write(jnp.zeros((1, 1, 4, 1)), entries, jnp.array([[2, -1, 0]])).ravel().tolist()
    [7.0, 0.0, 5.0, 0.0]
  """
  batch, length = entries.shape[:2]
  slots = stored.shape[2]
  entries = entries.astype(stored.dtype)
  positions = jnp.broadcast_to(positions, (batch, length))
  if batch * length > FEW:
    where = jnp.where(positions < 0, slots, positions)
    return stored.at[jnp.arange(batch)[:, None], :, where].set(entries, mode="drop")
  for row in range(batch):
    for i in range(length):
      where = (row, 0, jnp.maximum(positions[row, i], 0), 0)
      old = jax.lax.dynamic_slice(stored, where, (1, stored.shape[1], 1, stored.shape[3]))
      new = jnp.where(positions[row, i] < 0, old, entries[row, i][None, :, None])
      stored = jax.lax.dynamic_update_slice(stored, new, where)
  return stored
