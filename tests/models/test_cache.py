"""The cache of keys and values: what stands where after a write."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from nestnet.models.cache import FEW, write

WRITE = jax.jit(write)


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (3, 2), (3, FEW)])
def test_entries_stand_in_the_slots_of_their_positions(batch, length):
  """One by one or scattered; what has no position is written nowhere."""
  rng = np.random.default_rng(0)
  stored, entries = (rng.normal(size=shape).astype(np.float32) for shape in (
    (batch, 2, 12, 4), (batch, length, 2, 4)))
  positions = np.stack([rng.permutation(12)[:length] for _ in range(batch)]).astype(np.int32)
  positions[0, length // 2] = -1
  expected = stored.copy()
  for row, i in np.ndindex(batch, length):
    if positions[row, i] >= 0:
      expected[row, :, positions[row, i]] = entries[row, i]
  found = WRITE(stored, entries, positions)
  np.testing.assert_array_equal(found, expected)
  assert (found[:, :, 0] == stored[:, :, 0]).all(axis=(1, 2)).tolist() == [0 not in row for row in positions]


def test_positions_may_be_those_of_all_rows():
  entries = np.arange(8, dtype=np.float32).reshape(2, 2, 1, 2)
  found = WRITE(np.zeros((2, 1, 3, 2), np.float32), entries, np.array([[2, 0]], np.int32))
  np.testing.assert_array_equal(found[:, 0, [2, 0]], entries[:, :, 0])
