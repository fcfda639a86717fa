"""Which sub-networks train: pure functions of (seed, step), with the frequencies they state."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from nestnet.choices import spaced
from nestnet.errors import UserError
from nestnet.sampling import Context, sampler
from nestnet.slots import slots
from nestnet.space import Space

SPACE = Space(layers=(1, 2), mlp=(4, 8, 16))
STEPS = 3000


def counts(drawn, position):
  return collections.Counter(drawn.terms(step)[position].candidates[0] for step in range(STEPS))


def near(count, probability):
  """Within five standard deviations of a binomial count."""
  deviation = np.sqrt(STEPS * probability * (1 - probability))
  return abs(count - STEPS * probability) < 5 * deviation


@pytest.mark.parametrize("name, options", [
  ("sandwich", {"candidates": 2}), ("attentive", {}), ("uniform", {"n": 2}),
  ("sorted_nested", {}), ("sampled", {}), ("joint", {}),
  ("largest", {}), ("intact", {"n": 2})])
def test_nothing_but_seed_and_step_decides(name, options):
  one, two = (sampler(name, SPACE, 7, **options) for _ in range(2))
  for step in (0, 1, 5, 10 ** 9):
    assert one.terms(step) == two.terms(step)
  assert [two.terms(s) for s in (9, 3)] == [one.terms(s) for s in (9, 3)]
  if not one.fixed:
    other = sampler(name, SPACE, 8, **options)
    assert [one.terms(s) for s in range(9)] != [other.terms(s) for s in range(9)]
    assert len({one.terms(s) for s in range(9)}) > 1


def test_largest_is_ordinary_training():
  drawn = sampler("largest", SPACE, 0)
  (term,) = drawn.terms(3)
  assert drawn.fixed and term.candidates == (SPACE.largest,)
  assert (term.weight, term.taught, term.regularised) == (1.0, False, True)


def test_sandwich_terms():
  drawn = sampler("sandwich", SPACE, 0, random=3, candidates=2)
  terms = drawn.terms(4)
  assert not drawn.fixed and len(terms) == 5
  assert terms[0].candidates == (SPACE.largest,) and terms[-1].candidates == (SPACE.smallest,)
  assert [len(t.candidates) for t in terms] == [1, 2, 2, 2, 1]
  assert [t.taught for t in terms] == [False] + 4 * [True]
  assert [t.regularised for t in terms] == [True] + 4 * [False]
  assert all(t.weight == 1.0 for t in terms)
  assert all(c in SPACE for t in terms for c in t.candidates)
  everywhere = sampler("sandwich", SPACE, 0, regularise="all").terms(0)
  assert all(t.regularised for t in everywhere)
  assert sampler("sandwich", SPACE, 0, random=0).fixed


@pytest.mark.parametrize("name, options, n", [
  ("sandwich", {"random": 2}, 4), ("sorted_nested", {"n": 5}, 5), ("joint", {}, 6)])
def test_sum_or_mean(name, options, n):
  for reduce, weight in (("sum", 1.0), ("mean", 1 / n)):
    terms = sampler(name, SPACE, 0, reduce=reduce, **options).terms(0)
    assert [t.weight for t in terms] == n * [weight]


OTHERS = set(SPACE) - {SPACE.largest, SPACE.smallest}


@pytest.mark.parametrize("name, position, members", [
  ("sandwich", 1, OTHERS), ("sandwich", 2, OTHERS), ("sorted_nested", 0, set(SPACE)),
  ("sorted_nested", 3, set(SPACE))])
def test_random_members_are_uniform(name, position, members):
  seen = counts(sampler(name, SPACE, 1), position)
  assert set(seen) == members
  assert all(near(n, 1 / len(members)) for n in seen.values())


def test_members_of_a_sandwich_differ_while_there_are_others():
  for random, distinct in ((2, 4), (4, 6), (5, 6)):
    drawn = sampler("sandwich", SPACE, 1, random=random)
    for step in range(50):
      members = [t.candidates[0] for t in drawn.terms(step)]
      assert len(members) == random + 2 and len(set(members)) == distinct


def test_positions_of_a_step_are_independent():
  drawn = sampler("sorted_nested", SPACE, 1, n=2)
  pairs = [[t.candidates[0] for t in drawn.terms(s)] for s in range(STEPS)]
  assert near(sum(a == b for a, b in pairs), 1 / 6)
  both = sampler("sandwich", SPACE, 1, candidates=2)
  pairs = [both.terms(s)[1].candidates for s in range(STEPS)]
  assert near(sum(a == b for a, b in pairs), 1 / 4)


def test_uniform_by_choices_or_by_members():
  """A deep member has more per-layer lists than a shallow one: 3 + 9 members."""
  space = Space(layers=(1, 2), mlp=(4, 8, 16), per_layer=("mlp",))
  for by, deep in (("choices", 1 / 2), ("members", 3 / 4)):
    drawn = sampler("sorted_nested", space, 1, n=1, by=by)
    assert near(sum(n for s, n in counts(drawn, 0).items() if s["layers"] == 2), deep)


def test_pool_limits_what_is_drawn():
  space = Space(layers=(1, 2), mlp=(4, 8, 16), pool=("layers=1,mlp=8", "layers=2,mlp=4"))
  assert set(counts(sampler("sandwich", space, 0), 1)) == set(space.pool)
  assert [t.candidates[0] for t in sampler("joint", space, 0).terms(0)] == list(space.pool)


def test_the_pool_may_be_for_looking_only():
  space = Space(layers=(1, 2), mlp=(4, 8, 16), pool=("layers=1,mlp=8", "layers=2,mlp=4"))
  drawn = sampler("uniform", space, 0, whole=True)
  assert set(counts(drawn, 0)) == set(SPACE) and drawn.whole
  assert not sampler("uniform", space, 0).whole


def test_uniform_names_neither_extreme():
  terms = sampler("uniform", SPACE, 1, n=3).terms(0)
  assert [(t.taught, t.regularised, t.weight) for t in terms] == 3 * [(True, True, 1.0)]
  assert not any(t.taught for t in sampler("uniform", SPACE, 1, taught=False).terms(0))
  seen = counts(sampler("uniform", SPACE, 1, n=2), 1)
  assert set(seen) == set(SPACE) and all(near(n, 1 / 6) for n in seen.values())


def test_weights_of_the_taught_rise_over_a_share_of_their_phase():
  drawn = sampler("sandwich", SPACE, 0, context=Context(first=100, steps=50), ramp=0.2)
  whole = sampler("sandwich", SPACE, 0)
  for step, share in {99: 0.0, 100: 0.0, 101: 0.1, 105: 0.5, 109: 0.9, 110: 1.0, 149: 1.0}.items():
    terms = drawn.terms(step)
    assert [t.weight for t in terms] == pytest.approx([1.0] + 3 * [share])
    assert [t.candidates for t in terms] == [t.candidates for t in whole.terms(step)]
  fixed = sampler("sandwich", SPACE, 0, random=0, ramp=0.2)
  assert not fixed.fixed and sampler("sandwich", SPACE, 0, random=0).fixed


WIDE = Space(layers=(1, 2, 4), mlp=(4, 8, 16), heads=(1, 2, 3), per_layer=("mlp",))


def flops(subnet):
  sizes = subnet.chosen["mlp"]
  return 5 * subnet["heads"] + sum(sizes if isinstance(sizes, tuple) else (sizes,) * subnet["layers"])


def test_candidates_cost_about_the_same_and_costs_are_as_frequent_as_in_the_space():
  drawn = sampler("attentive", WIDE, 1, random=1, candidates=3, buckets=8, table=1000,
                  context=Context(cost=flops))
  terms = [drawn.terms(step) for step in range(500)]
  assert [len(t.candidates) for t in terms[0]] == [1, 3, 1]
  assert terms[0][0].candidates == (WIDE.largest,) and terms[0][2].candidates == (WIDE.smallest,)
  assert all(c in WIDE for t in terms[:100] for c in t[1].candidates)
  low, high = flops(WIDE.smallest), flops(WIDE.largest)
  place = lambda member: min(int((flops(member) - low) / (high - low) * 8), 7)
  places = np.array([[place(c) for c in t[1].candidates] for t in terms])
  # Buckets whose members gene by gene seldom land in them may give another after 100 trials.
  assert (places == places[:, :1]).all(axis=1).mean() > 0.98
  every = np.bincount([place(WIDE.sample((99, step))) for step in range(2000)], minlength=8) / 2000
  found = np.bincount(places[:, 0], minlength=8) / 500
  assert np.abs(found - every).max() < 5 * np.sqrt(0.25 / 500 + 0.25 / 1000)
  assert len({c for t in terms for c in t[1].candidates}) > 150


def test_genes_are_as_frequent_as_in_their_bucket():
  """With one bucket, that of the whole space, draws are the space's own."""
  drawn = sampler("attentive", WIDE, 1, random=1, candidates=1, buckets=1, table=2000,
                  context=Context(cost=flops))
  members = [drawn.terms(step)[1].candidates[0] for step in range(1500)]
  for axis in ("layers", "heads"):
    for size in WIDE.choices(axis):
      assert abs(np.mean([m[axis] == size for m in members]) - 1 / 3) < 0.08
  deep = [m for m in members if m["layers"] == 4]
  last = [m["mlp"][3] if isinstance(m["mlp"], tuple) else m["mlp"] for m in deep]
  assert all(abs(np.mean(np.array(last) == size) - 1 / 3) < 0.12 for size in (4, 8, 16))


def test_attentive_draws_stay_in_the_pool_and_the_constraint():
  pool = ("layers=1,mlp=8", "layers=2,mlp=4", "layers=2,mlp=8")
  space = Space(layers=(1, 2), mlp=(4, 8, 16), pool=pool)
  options = dict(random=1, buckets=2, table=50)
  drawn = sampler("attentive", space, 0, **options)
  seen = {c for step in range(100) for c in drawn.terms(step)[1].candidates}
  assert seen == set(space.pool)
  odd = Space(layers=(1, 2), mlp=(4, 8, 16), constraint=lambda s: s["layers"] * s["mlp"] != 8)
  drawn = sampler("attentive", odd, 0, **options)
  assert all(c in odd for step in range(100) for c in drawn.terms(step)[1].candidates)


def test_sorted_is_never_taught():
  terms = sampler("sorted_nested", SPACE, 0, n=3).terms(0)
  assert len(terms) == 3 and not any(t.taught for t in terms) and all(t.regularised for t in terms)


def test_joint_trains_every_granularity_at_every_step():
  drawn = sampler("joint", SPACE, 0)
  assert drawn.fixed and {t.candidates[0] for t in drawn.terms(0)} == set(SPACE)
  named = sampler("joint", SPACE, 0, members=("mlp=4", "layers=1")).terms(0)
  assert [str(t.candidates[0]) for t in named] == ["layers=2,mlp=4", "layers=1,mlp=16"]


def test_sampled_frequencies():
  members = ("mlp=4", "mlp=8", "mlp=16")
  seen = counts(sampler("sampled", SPACE, 2, members=members), 0)
  assert all(near(seen[SPACE.subnet(m)], 1 / 3) for m in members)
  weighted = counts(sampler("sampled", SPACE, 2, members=members, probabilities=(1.0, 0.0, 3.0)), 0)
  assert near(weighted[SPACE.subnet("mlp=4")], 1 / 4)
  assert near(weighted[SPACE.subnet("mlp=16")], 3 / 4)
  assert SPACE.subnet("mlp=8") not in weighted
  assert len(sampler("sampled", SPACE, 2).terms(0)) == 1


@pytest.mark.parametrize("name, options, message", [
  ("sandwhich", {}, "sampler 'sandwhich'; did you mean 'sandwich'.*largest, sandwich"),
  ("sandwich", {"rnadom": 2}, "option of the sampler sandwich 'rnadom'; did you mean 'random'"),
  ("largest", {"n": 2}, "option of the sampler largest 'n'. Allowed: whole, ramp"),
  ("attentive", {"table": 0}, "table=0; allowed is at least 1"),
  ("sandwich", {"ramp": 1.5}, "ramp=1.5; allowed is a share of the phase"),
  ("sandwich", {"regularise": "none"}, "regularise 'none'.*largest, all"),
  ("sandwich", {"by": "luck"}, "'luck'.*choices"),
  ("sorted_nested", {"reduce": "max"}, "reduce 'max'.*sum, mean"),
  ("joint", {"members": ("mlp=5",)}, "mlp=5 is outside the space.*4, 8, 16"),
  ("sampled", {"probabilities": (1.0,)}, "probabilities .*one number of.*6 granularities"),
  ("sampled", {"probabilities": (1.0, -1.0, 0, 0, 0, 0)}, "probabilities"),
  ("sampled", {"probabilities": 6 * (0.0,)}, "probabilities"),
])
def test_mistakes_are_named(name, options, message):
  with pytest.raises(UserError, match=message):
    sampler(name, SPACE, 0, **options).terms(0)


def test_large_spaces_need_named_granularities():
  space = Space(mlp=tuple(range(1, 10)))
  for name in ("joint", "sampled"):
    with pytest.raises(UserError, match="9 members, too many.*space.pool or sampler.members"):
      sampler(name, space, 0)


def test_an_intact_student_comes_before_elastic_ones():
  drawn = sampler("intact", SPACE, 0, n=3)
  terms = drawn.terms(4)
  assert terms[0].candidates == (SPACE.largest,) and [t.weight for t in terms] == [1.0] + 3 * [1 / 3]
  assert all(t.taught and t.regularised for t in terms) and not drawn.fixed
  alone = sampler("intact", SPACE, 0, n=0)
  assert alone.fixed and alone.terms(9) == terms[:1]
  assert len(sampler("intact", SPACE, 0, n=2, whole_first=False).terms(0)) == 2
  with pytest.raises(UserError, match="n=0 and whole_first=False"):
    sampler("intact", SPACE, 0, n=0, whole_first=False)


def test_elastic_students_come_as_often_as_the_list_has_them():
  listed = slots(SPACE, 3.0, 2.0)
  drawn = sampler("intact", SPACE, 5, n=1, width_bias=3.0, depth_bias=2.0)
  # Without replacement: each walk over the list has every slot once, whatever the order.
  for walk in (0, 7):
    found = [drawn.terms(walk * len(listed) + i)[1].candidates[0] for i in range(len(listed))]
    assert collections.Counter(found) == collections.Counter(listed)
  assert [drawn.terms(i)[1] for i in range(len(listed))] != [drawn.terms(len(listed) + i)[1] for i in range(len(listed))]


@pytest.mark.parametrize("space, biases, members, count, smallest", [
  # Published: ViT, Swin (by its code), ResNet. The largest, which is never drawn, has one more slot.
  (Space(layers=spaced(24, range(12, 25)), couple={
    "embed heads mlp": [(w, w // 64, 4 * w) for w in range(384, 1025, 64)]}), (3.0, 3.0), 143, 572, 9),
  (Space(layers_3=tuple(range(6, 19)), embed=(96, 112, 128)), (2.0, 2.0), 39, 88, 4),
  (Space(layers_2=tuple(range(4, 9)), layers_3=tuple(range(6, 37)), width=(64, 96, 128)), (1.0, 2.0), 465, 698, 2)])
def test_slots_are_those_of_poa(space, biases, members, count, smallest):
  listed = collections.Counter(slots(space, *biases))
  assert (len(space), listed.total(), listed[space.smallest]) == (members, count, smallest)
  assert space.largest not in listed and len(listed) == members - 1


def test_slots_that_cannot_be():
  with pytest.raises(UserError, match="width_bias=0.5"):
    slots(SPACE, 0.5)
  with pytest.raises(UserError, match="no member beside the largest"):
    slots(Space(mlp=(4,)))
