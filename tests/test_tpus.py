"""Slices by name, and how fast groups of their chips exchange."""

import pytest

from nestnet import errors, tpus


def test_every_listed_slice_has_its_chips():
  for chip, known in tpus.CHIPS.items():
    for shape in known.slices:
      where = tpus.topology(f"{chip}:{shape}")
      assert where.chips == eval(shape.replace("x", "*")) and where.chip is known


@pytest.mark.parametrize("name, words", [
  ("v5x:4x4", ["unknown topology 'v5x:4x4'", "did you mean 'v5e:4x4'", "v4:2x2x1", "v6e:16x16", "v5p:4x4x4"]),
  ("v5e:3x5", ["unknown topology 'v5e:3x5'", "v5e:4x4"]),
  ("v5e:2x2x1", ["unknown topology", "v5e:2x2"]), ("v5e", ["v5e:1x1"]), ("", ["v4:2x2x1"]),
])
def test_unknown_slices_list_the_known(name, words):
  with pytest.raises(errors.UserError) as error:
    tpus.topology(name)
  assert all(word in str(error.value) for word in words)
  if name.startswith("v5e"):
    assert "v6e" not in str(error.value)


@pytest.mark.parametrize("name, places, links", [
  ("v5e:16x16", [(0, y) for y in range(16)], 2),
  ("v5e:4x4", [(0, y) for y in range(4)], 1),
  ("v5e:16x16", [(0, 0), (0, 1)], 1),
  ("v5e:16x16", [(x, y) for x in range(16) for y in range(16)], 4),
  ("v5e:8x16", [(x, y) for x in range(8) for y in range(16)], 3),
  ("v5p:4x4x4", [(x, y, z) for x in range(4) for y in range(4) for z in range(4)], 6),
  ("v5p:2x2x4", [(0, 0, z) for z in range(4)], 2),
  ("v4:2x2x1", [(0, 0, 0)], 0),
])
def test_bandwidth_is_that_of_the_links_that_a_group_has(name, places, links):
  where = tpus.topology(name)
  assert where.bandwidth(places) == links * where.chip.link
