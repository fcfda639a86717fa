"""Members of a space by what they cost: drawn from buckets of equal cost, gene by gene."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from nestnet.space import Space
from nestnet.subnet import Subnet

TRIALS = 100


@functools.lru_cache(maxsize=8)
def by_bucket(space: Space, cost: Callable[[Subnet], float], buckets: int, table: int
              ) -> Callable[[tuple[int, ...], int], tuple[Subnet, ...]]:
  """What draws members of about the same cost (AttentiveNAS, 2011.09011, section 3.2).

  A table of random members is made once. A draw takes a bucket as often as the table has members in it,
  then members gene by gene, each gene as frequent as in that bucket, until one's cost lies in the bucket;
  after 100 trials the last one is good enough.

  Args:
    space: The family.
    cost: The cost of a member.
    buckets: How many intervals of equal length the costs of the table are divided into.
    table: How many random members stand for the space.

  Returns:
    `draw(key, count)`: so many members of one bucket, a pure function of `key`.

  Example:
    >>> draw = by_bucket(Space(layers=(1, 2), mlp=(4, 8)), lambda s: s["layers"] * s["mlp"], 4, 100)
    >>> [str(member) for member in draw((0, 3), 2)] == [str(member) for member in draw((0, 3), 2)]
    True
  """
  members = [space.sample((TRIALS, row)) for row in range(table)]
  costs = np.array([cost(member) for member in members], float)
  low, span = costs.min(), max(np.ptp(costs), 1e-9)
  place = lambda c: np.clip((np.asarray(c) - low) / span * buckets, 0, buckets - 1).astype(int)
  genes, places = np.array([space.encode(member) for member in members]), place(costs)
  shares = np.bincount(places, minlength=buckets) / table
  # A gene is 0 where its layer is absent, which a member that has the layer cannot be.
  columns = {b: [column[column > 0] for column in genes[places == b].T] for b in set(places.tolist())}
  whole, pool = space.without_pool(), set(space.pool)

  def one(rng, bucket):
    found = members[rng.choice(np.flatnonzero(places == bucket))]
    for _ in range(TRIALS):
      drawn = whole.decode([column[rng.integers(len(column))] if len(column) else 0
                            for column in columns[bucket]])
      if drawn not in (pool or whole):
        continue
      found = drawn
      if place(cost(drawn)) == bucket:
        break
    return found

  def draw(key, count):
    rng = np.random.default_rng(key)
    bucket = int(rng.choice(buckets, p=shares))
    return tuple(one(rng, bucket) for _ in range(count))

  return draw
