"""Rotary positions (Su et al., 2104.09864) as in Hugging Face's Llama: halves of a head are turned."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError, one_of

Scaling = tuple[tuple[str, Any], ...]
# The numbers of each type.
NEEDS = {
  "linear": ("factor",),
  "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")}


def scaling(given: Mapping[str, Any] | Scaling | None) -> Scaling | None:
  """How rotary positions are stretched, as sorted pairs; None where they are not.

  Args:
    given: A mapping or pairs with `rope_type` `"linear"` (2306.15595: all wave lengths times `factor`)
      or `"llama3"` (2407.21783: long waves times `factor`, short ones as they are), and its numbers.

  Raises:
    ValueError: An unknown type, another set of numbers than the type has, or numbers out of range.

  Example:
    >>> scaling({"rope_type": "linear", "factor": 2.0})
    (('factor', 2.0), ('rope_type', 'linear'))
  """
  try:
    values = dict(given or {})
  except (TypeError, ValueError):
    raise UserError(f"rope_scaling: got {given!r}; allowed is a mapping, or pairs") from None
  if not values:
    return None
  kind = values.get("rope_type")
  if kind not in tuple(NEEDS):
    raise one_of("rope_type of rope_scaling", kind, NEEDS)
  if {*values} - {"rope_type"} != {*NEEDS[kind]}:
    raise UserError(f"rope_scaling of type {kind}: got {', '.join(sorted(map(str, values)))}; "
                    f"allowed are rope_type, {', '.join(NEEDS[kind])}")
  if wrong := [f"{key}={values[key]!r}" for key in NEEDS[kind] if not _positive(values[key])]:
    raise UserError(f"rope_scaling of type {kind}: {', '.join(wrong)}; allowed is a number above 0")
  if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
    raise UserError(f"rope_scaling of type llama3: high_freq_factor={values['high_freq_factor']}; allowed is "
                    f"a number above low_freq_factor={values['low_freq_factor']}")
  return tuple(sorted(values.items()))


def _positive(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < value < math.inf


def frequencies(head_dim: int, theta: float, given: Scaling | None = None) -> np.ndarray:
  """The angle by which each pair of a head turns from one position to the next, `[head_dim // 2]`.

  Example:
    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.1]
  """
  angles = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if not given:
    return angles
  numbers = dict(given)
  if numbers["rope_type"] == "linear":
    return angles / numbers["factor"]
  low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
  # How often a wave fits into the context of pre-training: more than `high` times it is kept.
  fits = numbers["original_max_position_embeddings"] * angles / (2 * np.pi)
  kept = np.clip((fits - low) / (high - low), 0, 1)
  return angles * (kept + (1 - kept) / numbers["factor"])


def rotate(x: jax.Array, positions: jax.Array, angles: np.ndarray) -> jax.Array:
  """Turns queries or keys `[batch, length, ..., head_dim]` by their positions `[batch or 1, length]`."""
  turn = positions[..., None].astype(jnp.float32) * jnp.asarray(angles, jnp.float32)[None, None]
  turn = turn.reshape(turn.shape[:2] + (1,) * (x.ndim - 3) + turn.shape[2:])
  cos, sin = jnp.cos(turn), jnp.sin(turn)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
