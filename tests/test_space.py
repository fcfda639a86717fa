"""Spaces: exact sizes, canonical genes, and sampling with the frequencies that are promised."""

from __future__ import annotations

import collections
import itertools
import json
import math

import numpy as np
import pytest

from nestnet import Space, Subnet
from nestnet.choices import least_slope, spaced
from nestnet.space import volume
from nestnet.subnet import folded

plain = Space(layers=(1, 2, 4), embed=(8, 16), mlp=(8, 16, 32))
coupled = Space(couple={"layers embed": ((1, 8), (2, 8), (2, 16))}, mlp=(4, 8))
ids = Space(layers=((0, 3), 3, (0, 2, 3), 4), mlp=(4, 8), per_layer=("mlp",))
free = Space(layers=(1, 2), kernel=(3, 5), expand=(3, 4, 6), per_layer=("kernel", "expand"))
sloped = Space(couple={"layers mlp": least_slope(3, (4, 8)) + least_slope(2, (4, 8))}, heads=(1, 2))
constrained = Space(layers=(1, 2), mlp=(4, 8), per_layer=("mlp",), heads=(1, 2),
                    constraint=lambda s: s.chosen["heads"] != 2 or s.chosen["layers"] == 2)
SPACES = {"plain": plain, "coupled": coupled, "ids": ids, "free": free, "sloped": sloped,
          "constrained": constrained}
every = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def mobilenet():
  """Five stages of 2 to 4 layers, each layer with its own kernel and expansion (Once-for-All)."""
  stages = range(1, 6)
  return Space(**{f"layers_{k}": (2, 3, 4) for k in stages},
               **{f"kernel_{k}": (3, 5, 7) for k in stages},
               **{f"expand_{k}": (3, 4, 6) for k in stages},
               per_layer=[f"{a}_{k}" for k in stages for a in ("kernel", "expand")])


@pytest.mark.parametrize("space, size", [
  (plain, 3 * 2 * 3), (coupled, 3 * 2), (ids, 2 ** 2 + 2 ** 3 + 2 ** 3 + 2 ** 4),
  (free, 6 + 6 ** 2), (sloped, (4 + 3) * 2), (constrained, 2 + 4 + 4)], ids=SPACES)
def test_size_is_exact_and_what_enumeration_gives(space, size):
  members = list(space)
  assert space.size == len(space) == len(members) == len(set(members)) == size
  assert all(member in space for member in members)


def test_size_at_ten_to_the_nineteen():
  space = mobilenet()
  assert space.size == (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5
  assert bool(space) and space.largest in space and space.smallest in space
  with pytest.raises(ValueError, match=f"{space.size} members, too many to list"):
    next(iter(space))
  member = space.sample(3, by="members")
  assert space.decode(space.encode(member)) == member


@every
def test_order_and_extremes(space):
  members = list(space)
  volumes = [volume(m) for m in members]
  assert volumes == sorted(volumes)
  assert volume(space.smallest) == volumes[0] and volume(space.largest) == volumes[-1]
  assert space.smallest in space and space.largest in space
  by_heads = space.by_cost(lambda s: -s[space.axes[0]])
  assert [m[space.axes[0]] for m in by_heads] == sorted(
    (m[space.axes[0]] for m in members), reverse=True)


def test_extremes_of_choices_in_any_order():
  space = Space(layers=(4, 1, 2), mlp=(16, 32, 8), per_layer=("mlp",))
  assert str(space.smallest) == "layers=1,mlp=8" and str(space.largest) == "layers=4,mlp=32"


def test_constrained_extremes_are_members():
  space = Space(a=(1, 2, 3), b=(1, 2, 3), constraint=lambda s: 3 <= s["a"] * s["b"] <= 6)
  assert volume(space.smallest) == 3 and volume(space.largest) == 6


@every
def test_genes_are_bijective_and_canonical(space):
  members = list(space)
  genes = [space.encode(m) for m in members]
  assert len(set(genes)) == len(members) and len(set(map(len, genes))) == 1
  assert [space.decode(g) for g in genes] == members
  assert [space.encode(space.decode(np.array(g))) for g in genes] == genes


def test_genes_of_absent_layers_are_zero():
  assert ids.encode(Subnet(layers=(0, 3), mlp=(8, 4))) == (1, 2, 0, 0, 1)
  assert ids.encode(Subnet(layers=3, mlp=4)) == (2, 1, 1, 1, 0)
  assert ids.decode((1, 2, 2, 2, 1)) == ids.decode((1, 2, 0, 0, 1))
  assert free.encode(Subnet(layers=1, kernel=5, expand=6)) == (1, 2, 0, 3, 0)


@pytest.mark.parametrize("genes, message", [
  ((1, 1), "got 2, the space has 5"), ((9, 1, 1, 1, 1), "gene of layers: got 9, allowed 1 to 4"),
  ((0, 1, 1, 1, 1), "got 0, allowed 1"), ((4, 1, 0, 1, 1), "genes of mlp: .*allowed 1 to 2")])
def test_bad_genes(genes, message):
  with pytest.raises(ValueError, match=message):
    ids.decode(genes)


@pytest.mark.parametrize("text", ["layers=2", "layers=3,mlp=5", "layers=0+1+3,mlp=4",
                                  "layers=3,mlp=4,heads=2", "layers=5,mlp=4", "layers=2,mlp=4"])
def test_what_is_no_member(text):
  assert Subnet.parse(text) not in ids


def test_other_things_are_no_members():
  assert "layers=3,mlp=4" not in ids and None not in ids and 3 not in ids
  assert Subnet(layers=1, mlp=4, heads=2) not in constrained
  assert Subnet(layers=1, mlp=4, heads=1) in constrained


# Sampling.


def frequencies(space, by, draws=600):
  return collections.Counter(space.sample((7, step), by=by) for step in range(draws))


def check_frequencies(counts, expected):
  """Pearson's statistic stays within 4 standard deviations of its mean."""
  assert set(counts) <= set(expected)
  draws = sum(counts.values())
  statistic = sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in expected.items())
  freedom = len(expected) - 1
  assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)


@every
@pytest.mark.parametrize("by", ["choices", "members", "cost"])
def test_a_sample_is_a_member_and_a_pure_function_of_its_key(space, by):
  drawn = [space.sample((1, step), by=by) for step in range(3)]
  np.random.default_rng(0).random()
  assert drawn == [space.sample((1, step), by=by) for step in range(3)]
  assert all(member in space for member in drawn)
  assert len({space.sample((2, step), by=by) for step in range(12)}) > 1


@every
def test_by_members_is_uniform_over_members(space):
  check_frequencies(frequencies(space, "members"), {m: 1 / space.size for m in space})


@pytest.mark.parametrize("name", ["plain", "coupled", "ids", "free"])
def test_by_choices_is_uniform_over_each_choice(name):
  space = SPACES[name]

  def probability(member):
    p = 1.0
    for names in space._factors:
      p /= len(space._factors[names])
    for axis in space.per_layer:
      p /= len(space.choices(axis)) ** member["layers"]
    return p
  check_frequencies(frequencies(space, "choices"), {m: probability(m) for m in space})


def test_by_cost_spreads_over_costs():
  """Members crowd at middle costs; sampled costs spread over the whole range."""
  space = Space(layers=(8,), mlp=(1, 2), per_layer=("mlp",))
  cost = lambda s: np.mean(s.chosen["mlp"])
  drawn = np.array([cost(space.sample((0, i), by="cost", cost=cost)) for i in range(160)])
  counts, _ = np.histogram(drawn, bins=np.linspace(0.9375, 2.0625, 10))
  ends = 10  # half a step of 1/8 each, as a share of 160
  np.testing.assert_allclose(counts, [ends, *[2 * ends] * 7, ends], atol=14)
  assert drawn.std() > 0.25  # of a binomial: 0.18


def test_huge_spaces_are_sampled_by_members():
  """All but 1/10 of the members of a stage have 4 layers: 9^4 of 9^2 + 9^3 + 9^4."""
  space = mobilenet()
  drawn = [space.sample((0, i), by="members") for i in range(60)]
  depths = collections.Counter(s[f"layers_{k}"] for s in drawn for k in range(1, 6))
  check_frequencies(depths, {n: 9 ** n / (9 ** 2 + 9 ** 3 + 9 ** 4) for n in (2, 3, 4)})


def test_weights_beyond_64_bits():
  space = Space(layers=(2, 99, 100), kernel=(1, 2, 3), per_layer=("kernel",))
  assert space.size == 3 ** 2 + 3 ** 99 + 3 ** 100
  depths = collections.Counter(space.sample((0, i), by="members")["layers"] for i in range(200))
  check_frequencies(depths, {99: 1 / 4, 100: 3 / 4})


def test_wide_per_layer_lists_are_never_held_at_once():
  space = Space(layers=(40,), mlp=(1, 2, 3), per_layer=("mlp",), constraint=lambda s: True)
  assert space.sample(0) in space
  assert str(space.largest) == "layers=40,mlp=3"
  with pytest.raises(ValueError, match="constraint on .* candidates, too many"):
    len(space)


def test_a_pool_limits_sampling_only():
  space = Space(layers=(1, 2), mlp=(4, 8), pool=("layers=1,mlp=4", Subnet(layers=2)))
  assert space.pool == (Subnet(layers=1, mlp=4), Subnet(layers=2, mlp=8))
  for by in ("choices", "members"):
    check_frequencies(frequencies(space, by, 200), {m: 1 / 2 for m in space.pool})
  assert {space.sample(i, by="cost") for i in range(20)} == set(space.pool)
  assert space.size == 4 and len(set(frequencies(space.without_pool(), "members"))) == 4
  with pytest.raises(ValueError, match=r"^space.pool, row 2: sub-network mlp=5: mlp=5 is outside the space"):
    Space(layers=(1, 2), mlp=(4, 8), pool=("mlp=4", "mlp=5"))


def test_unknown_way_of_sampling():
  with pytest.raises(ValueError, match="unknown sampling by 'member'.*Allowed: choices, members"):
    plain.sample(0, by="member")


# What a space refuses, and what it completes.


@pytest.mark.parametrize("arguments, message", [
  (dict(), "no axis has choices"), (dict(mlp=()), "mlp=.*at least one size"),
  (dict(mlp=8), "mlp=8; a list"), (dict(mlp=(8, 8)), "mlp lists a size twice"),
  (dict(mlp=(8, 0)), "mlp=0"), (dict(mlp=(8, 2.5)), "2.5"),
  (dict(mlp=(4, 8), per_layer=("mlp",)), "mlp needs choices for layers"),
  (dict(layers=(1,), per_layer=("mlp",)), "mlp=None"),
  (dict(mlp=(4, 8), groups={"mlp": 3}), "mlp=4 does not divide into 3 groups"),
  (dict(mlp=(4, 8), groups={"mpl": 2}), "unknown axis with groups 'mpl'.*'mlp'"),
  (dict(mlp=(4, 8), couple={"heads mlp": ((1, 4),)}), "mlp has choices more than once"),
  (dict(couple={"heads mlp": ((1, 4, 5),)}), "rows of 2 sizes"),
  (dict(couple={"heads mlp": ((1, 4), (1, 4))}), "repeat a row"),
  (dict(layers=(2, 3), mlp=((4, 8), 8)), "coupled with its depth: couple={'layers mlp'"),
  (dict(mlp=(4, 8), constraint=lambda s: False), "no member passes")])
def test_a_bad_space_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    Space(**arguments)


@pytest.mark.parametrize("space, given, completed", [
  (plain, "", "layers=4,embed=16,mlp=32"), (plain, {"layers": 2}, "layers=2,embed=16,mlp=32"),
  (plain, Subnet(mlp=8), "layers=4,embed=16,mlp=8"),
  (plain, "layers=0+3", "layers=0+3,embed=16,mlp=32"),
  (plain, "layers=2,mlp=8:32", "layers=2,embed=16,mlp=8:32"),
  (coupled, "embed=8", "mlp=8,layers=2,embed=8"), (coupled, "layers=1", "mlp=8,layers=1,embed=8"),
  (ids, "layers=0+3", "layers=0+3,mlp=8"), (ids, "layers=0+3,mlp=4:8", "layers=0+3,mlp=4:8")])
def test_a_partial_description_is_completed_with_the_largest(space, given, completed):
  assert str(space.subnet(given)) == completed


staged = Space(layers_1=(1, 2), layers_2=(1, 2, 3), expand_1=(2, 3), expand_2=(2, 3), embed=(8, 16),
               per_layer=("expand_1", "expand_2"))


@pytest.mark.parametrize("given, completed", [
  ("layers=1", "layers_1=1,layers_2=1,embed=16,expand_1=3,expand_2=3"),
  # What names a stage itself wins.
  ("layers_2=1,layers=2,expand=2,embed=8", "layers_1=2,layers_2=1,embed=8,expand_1=2,expand_2=2"),
  ("layers=2,expand=2:3", "layers_1=2,layers_2=2,embed=16,expand_1=2:3,expand_2=2:3"),
  (" smallest", "layers_1=1,layers_2=1,embed=8,expand_1=2,expand_2=2"),
  ("largest", "layers_1=2,layers_2=3,embed=16,expand_1=3,expand_2=3")])
def test_a_kind_of_axis_stands_for_that_of_every_stage(given, completed):
  assert str(staged.subnet(given)) == completed


def test_what_is_shown_of_a_member_is_read_back():
  large = mobilenet()
  tied = [large.subnet(text) for text in ("layers=2,kernel=3:5", "layers=3,expand=3:4:6", "smallest")]
  for space, members in ((staged, staged), (large, [*tied, *(large.sample(i) for i in range(20))])):
    assert all(space.subnet(folded(member)) == member for member in members)
    assert {len(folded(member)) < len(str(member)) for member in members} == {True, False}
  assert list(map(folded, tied)) == [
    "layers=2,kernel=3:5,expand=6", "layers=3,kernel=7,expand=3:4:6", "layers=2,kernel=3,expand=3"]


@pytest.mark.parametrize("space, given, message", [
  (staged, "layers=3", "layers_1=3 is outside the space; allowed for layers_1: 1, 2"),
  (staged, "layer=2", "unknown axis 'layer'; did you mean 'layers_"),
  (staged, "layers_1=1,expand=2:3", "expand_1=2:3 lists 2 layers, but layers_1 keeps 1"),
  (staged, "smalest", "'smalest' is not axis=size.*smallest and largest"),
  (plain, "emebd=8", "unknown axis 'emebd'; did you mean 'embed'"),
  (plain, "embed=9", "embed=9 is outside the space; allowed for embed: 8, 16"),
  (plain, "layers=0+4", r"layers=\[0, 4\] is outside.*layers: 1, 2, 4"),
  (plain, "layers=0+1+3", r"layers=\[0, 1, 3\] is outside"),
  (plain, "layers=2,mlp=8:9", "outside the space; allowed for mlp: 8, 16, 32"),
  (coupled, "layers=1,embed=16", r"allowed for layers embed: \(1, 8\), \(2, 8\), \(2, 16\)"),
  (free, "layers=2,kernel=3:4", "kernel=4 in layer 1 is outside the space; allowed for kernel: 3, 5"),
  (constrained, "layers=1,heads=2", "does not pass the constraint")])
def test_a_size_outside_the_space_is_refused_with_the_allowed_ones(space, given, message):
  with pytest.raises(ValueError, match=message):
    space.subnet(given)


@pytest.mark.parametrize("space", [plain, coupled, ids, free, sloped, Space(
  layers=(1, 2), mlp=(4, 8), groups={"mlp": 2}, pool=("layers=1",))])
def test_json_round_trip(space):
  again = Space(**json.loads(json.dumps(space.to_json())))
  assert again == space and hash(again) == hash(space)
  assert again.groups == space.groups and again.pool == space.pool and again.axes == space.axes
  assert [again.encode(m) for m in again] == [space.encode(m) for m in space]
  assert again != Space(layers=(1, 2))


# Generators of choices.


@pytest.mark.parametrize("layers", [1, 2, 7, 12, 24])
def test_spaced_depths_are_truncated_linspace(layers):
  for count, kept in zip(range(1, layers + 1), spaced(layers, range(1, layers + 1))):
    assert kept == tuple(math.trunc(i) for i in np.linspace(0, layers - 1, count))
    assert len(set(kept)) == count and kept[0] == 0 and (count == 1 or kept[-1] == layers - 1)
  assert spaced(layers, (layers,)) == (tuple(range(layers)),)


def test_spaced_depths_of_poa():
  assert spaced(24, (12,)) == ((0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23),)


@pytest.mark.parametrize("layers, sizes", [(1, (4, 8)), (3, (4, 8, 16)), (4, (16, 8))])
def test_least_slope_is_every_list_that_mixes_two_neighbours(layers, sizes):
  ordered = sorted(sizes)
  lists = [w for w in itertools.product(ordered, repeat=layers) if list(w) == sorted(w)
           and ordered.index(max(w)) - ordered.index(min(w)) <= 1]
  rows = least_slope(layers, sizes)
  assert {r[0] for r in rows} == {layers} and len(rows) == len(set(rows))
  assert sorted(r[1] for r in rows) == sorted(lists)
  assert Space(couple={"layers mlp": rows}).size == len(lists)
