"""A list of members in which small ones stand more often, walked without replacement (POA)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from nestnet.errors import UserError
from nestnet.space import Space, volume
from nestnet.subnet import Subnet, is_depth

MOST = 100_000


def slots(space: Space, width_bias: float = 3.0, depth_bias: float = 3.0) -> tuple[Subnet, ...]:
  """Every member but the largest, repeated `round(ws * ds)` times (2408.01031, appendix C.4).

  `ws` falls linearly from `width_bias` at the narrowest width to 1 at the widest, `ds` likewise over depths.
  A width is a joint choice of all axes that are no depths, a depth one of all that are; where these are
  several, depths are ranked by the first axis, then by the next.

  Raises:
    ValueError: A bias below 1, a space too large to list, or one of a single member.

  Example:
    >>> space = Space(layers=(1, 2), embed=(8, 16))
    >>> sorted(map(str, slots(space, 2.0, 1.0)))
    ['layers=1,embed=16', 'layers=1,embed=8', 'layers=1,embed=8', 'layers=2,embed=8', 'layers=2,embed=8']
  """
  if min(width_bias, depth_bias) < 1:
    raise UserError(f"width_bias={width_bias}, depth_bias={depth_bias}; allowed are numbers of at least 1")
  if not space.pool and space.size > MOST:
    raise UserError(f"the space has {space.size} members, too many to list; allowed are {MOST}, or a space.pool")
  members = list(dict.fromkeys(space.pool or space))
  depth = lambda member: tuple(volume(Subnet(**{a: v})) for a, v in member.chosen.items() if is_depth(a))
  width = lambda member: volume(Subnet(**{a: v for a, v in member.chosen.items() if not is_depth(a)}))
  falls = lambda keys, bias: dict(zip(keys, np.linspace(bias, 1, len(keys)).tolist()))
  ws, ds = (falls(sorted(set(map(key, members))), bias)
            for key, bias in ((width, width_bias), (depth, depth_bias)))
  listed = [member for member in members if member != space.largest
            for _ in range(round(ws[width(member)] * ds[depth(member)]))]
  if not listed:
    raise UserError("the space has no member beside the largest; allowed is recipe.sampler.n=0")
  return tuple(listed)


def drawn(listed: Sequence[Subnet], number: int, key: Sequence[int]) -> Subnet:
  """Draw `number` of an endless walk over the list, which is shuffled anew each time it ends."""
  turn, place = divmod(number, len(listed))
  return listed[_order(len(listed), (*key, turn))[place]]


@functools.lru_cache(maxsize=8)
def _order(count: int, key: tuple[int, ...]) -> np.ndarray:
  return np.random.default_rng(key).permutation(count)
