"""What a space chooses from: checked columns of sizes, rows of coupled ones, and rules that make them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nestnet.errors import UserError
from nestnet.subnet import Size, Subnet


def spaced(layers: int, counts: Iterable[int]) -> tuple[tuple[int, ...], ...]:
  """Evenly spaced layer ids for each count, the first and the last always kept (POA, eq. 4).

  Example:
    >>> spaced(6, (2, 4))
    ((0, 5), (0, 1, 3, 5))
  """
  return tuple(tuple(int(i) for i in np.linspace(0, layers - 1, n).astype(int)) for n in counts)


def least_slope(layers: int, sizes: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
  """Rows for `couple={"layers mlp": ...}`: widths that never fall with depth and mix only two
  neighbouring sizes, the Mix'n'Match rule (MatFormer, section 3.3).

  Example:
    >>> least_slope(2, (8, 16))
    ((2, (8, 8)), (2, (8, 16)), (2, (16, 16)))
  """
  sizes = sorted(sizes)
  mixed = [(low,) * (layers - n) + (high,) * n
           for low, high in zip(sizes, sizes[1:]) for n in range(layers)]
  return tuple((layers, widths) for widths in (*mixed, (sizes[-1],) * layers))


def column(axis: str, values: Any) -> tuple[Size, ...]:
  """The sizes that one axis may take.

  Raises:
    ValueError: There is none, one stands twice, or one is no size.
  """
  if values is None or isinstance(values, (int, str)) or not len(values):
    raise UserError(f"space: {axis}={values!r}; a list of at least one size is allowed")
  found = tuple(Subnet(**{axis: v}).chosen[axis] for v in values)
  if len(set(found)) != len(found):
    raise UserError(f"space: {axis} lists a size twice: {list(map(plain, found))}")
  return found


def joint_rows(names: str, values: Any) -> tuple[tuple[Size, ...], ...]:
  """The sizes that several axes, `"layers embed"`, may take together.

  Raises:
    ValueError: There is none, a row has another length than the names or stands twice, or holds no size.
  """
  axes = names.split()
  if not values or any(len(row) != len(axes) for row in values):
    raise UserError(
      f"space: coupled choices of {names!r} must be rows of {len(axes)} sizes, got {values}")
  found = tuple(tuple(partial(zip(axes, row)).chosen[a] for a in axes) for row in values)
  if len(set(found)) != len(found):
    raise UserError(f"space: coupled choices of {names!r} repeat a row")
  return found


def partial(items: Iterable[tuple[str, Size]]) -> Subnet:
  """The sizes along some axes."""
  return Subnet(**dict(items))


def weighted(rng: np.random.Generator, weights: Sequence[int]) -> int:
  """An index with probability in proportion to whole weights of any magnitude."""
  total = sum(weights)
  if total < 2 ** 62:
    draw = int(rng.integers(total))
  else:
    draw = int.from_bytes(rng.bytes((total.bit_length() + 64) // 8 + 1), "big") % total
  for index, weight in enumerate(weights):
    draw -= weight
    if draw < 0:
      return index
  raise AssertionError("weights are positive")


def plain(size: Any) -> Any:
  """As JSON and messages have it."""
  return list(size) if isinstance(size, tuple) else size
