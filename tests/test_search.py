"""Searches of known functions against going through the whole space."""

from __future__ import annotations

import numpy as np
import pytest

from nestnet import Space, Subnet, errors
from nestnet.search import (
  Candidate, Problem, coarse, coarse_to_fine, cross, evolve, fitting, front, mutate, random, undominated)

SPACE = Space(layers=(1, 2, 3), couple={"embed heads": ((8, 1), (8, 2), (16, 2))}, mlp=(8, 16, 32),
              per_layer=("mlp",))


def widths(member):
  size = member.chosen["mlp"]
  return size if isinstance(size, tuple) else (size,) * member["layers"]


def accuracy(member):
  """Later layers matter less, two heads beside a narrow stream harm."""
  gain = sum(np.sqrt(size) / (1 + i) ** 0.7 for i, size in enumerate(widths(member)))
  return 0.01 * (gain + np.sqrt(member["embed"]) - (member["embed"] == 8) * member["heads"])


def volume(member):
  return float(member["embed"] * sum(widths(member)))


COSTS = {"volume": volume, "layers": lambda m: float(m["layers"]), "heads": lambda m: float(m["heads"])}


def problem(budgets, space=SPACE, asked=None):
  def of(members):
    if asked is not None:
      asked.extend(members)
    return [accuracy(m) for m in members]
  return Problem(space, of, COSTS, budgets)


def exhaustive(budgets, space=SPACE):
  fitting = [m for m in space if all(COSTS[n](m) <= limit for n, limit in budgets.items())]
  return max(fitting, key=accuracy)


@pytest.mark.parametrize("budgets", [
  {"volume": 400}, {"volume": 700, "layers": 2}, {"volume": 700, "heads": 1}], ids=str)
def test_evolution_finds_the_best_within_budgets(budgets):
  asked = []
  found = evolve(problem(budgets, asked=asked), population=16, generations=12)
  assert found.subnet == exhaustive(budgets) and found.accuracy == accuracy(found.subnet)
  assert found.costs == {n: cost(found.subnet) for n, cost in COSTS.items()}
  # Nothing that does not fit was evaluated, and nothing twice.
  assert len(asked) == len(set(asked)) < len(SPACE) - 20
  assert all(m in SPACE and all(COSTS[n](m) <= limit for n, limit in budgets.items()) for m in asked)


def test_random_search_takes_the_best_of_those_it_draws_within_budgets():
  asked, budgets = [], {"volume": 400}
  found = random(problem(budgets, asked=asked), population=12, seed=3)
  assert len(asked) == len(set(asked)) == 12 and all(volume(m) <= 400 for m in asked)
  assert found.subnet == max(asked, key=accuracy)
  again = random(problem(budgets), population=12, seed=3)
  assert again == found
  # A family that is no larger is gone through.
  assert random(problem(budgets), population=len(SPACE)).subnet == exhaustive(budgets)
  with pytest.raises(errors.UserError, match="no sub-network has volume of at most 1; the cheapest: volume"):
    random(problem({"volume": 1}))


def test_evolution_is_the_same_for_a_seed():
  runs = []
  for seed in (3, 3, 4):
    asked = []
    evolve(problem({"volume": 500}, asked=asked), population=8, generations=3, seed=seed)
    runs.append(asked)
  assert runs[0] == runs[1] != runs[2]


def test_what_is_small_or_pooled_is_gone_through():
  pool = ("layers=1,embed=8,heads=1,mlp=8", "layers=2,embed=16,mlp=16", "layers=3,embed=16,mlp=8")
  pooled = Space(layers=(1, 2, 3), couple={"embed heads": ((8, 1), (8, 2), (16, 2))}, mlp=(8, 16, 32),
                 pool=pool)
  for find in (lambda p: evolve(p), lambda p: coarse_to_fine(p), lambda p: front(p, ["volume"])[-1]):
    asked = []
    found = find(problem({"volume": 600}, pooled, asked))
    assert found.subnet == max((m for m in pooled.pool if volume(m) <= 600), key=accuracy)
    assert set(asked) <= set(pooled.pool)
  with pytest.raises(errors.UserError, match=r"volume 64 \(only the 3 members of space.pool, of 27; "
                     r"--beyond_pool searches all\)"):
    evolve(problem({"volume": 60}, pooled))
  tiny = Space(embed=(8, 16), layers=(1, 2), heads=(1,), mlp=(8,))
  assert evolve(problem({"layers": 1}, tiny)).subnet == exhaustive({"layers": 1}, tiny)


@pytest.mark.parametrize("find", [
  lambda p: evolve(p, population=8, generations=4), lambda p: coarse_to_fine(p, population=8),
  lambda p: front(p, ["volume"], population=8, trials=40)], ids=["evolution", "coarse_to_fine", "nsga2"])
def test_a_constraint_is_never_left_and_the_cheapest_is_named(find):
  inside = Space(layers=(1, 2, 3), couple={"embed heads": ((8, 1), (8, 2), (16, 2))}, mlp=(8, 16, 32),
                 per_layer=("mlp",), constraint=lambda m: m["layers"] * m["heads"] != 2 and widths(m)[0] > 8)
  asked = []
  find(problem({"volume": 900}, inside, asked))
  assert asked and all(m in inside for m in asked)
  with pytest.raises(errors.UserError, match="no sub-network has volume of at most 100, heads of at most 1; "
                     "the cheapest: volume 128, heads 1"):
    find(problem({"volume": 100, "heads": 1}, inside))


def test_a_budget_that_few_fit_is_met():
  """Of 3^12 members only the smallest fits."""
  deep = Space(layers=(12,), mlp=(8, 16, 32), embed=(8,), heads=(1,), per_layer=("mlp",))
  found = evolve(problem({"volume": 8 * 12 * 8}, deep), population=10, generations=1)
  assert widths(found.subnet) == (8,) * 12
  with pytest.raises(errors.UserError, match="the cheapest: volume 768"):
    evolve(problem({"volume": 767}, deep), population=10)


def test_a_budget_that_can_be_met_is_not_refused():
  """Though the smallest member exceeds it and few others do not."""
  tied = Space(couple={f"embed_{i} heads_{i}": ((8, 8), (16, 2)) for i in range(10)})
  cost = lambda m: float(sum(m[f"embed_{i}"] for i in range(10)))
  for seed in range(8):
    tight = Problem(tied, lambda members: [0.0] * len(members), {"embed": cost}, {"embed": 96})
    (found,) = fitting(tight, 1, np.random.default_rng(seed))
    assert cost(found) <= 96


@pytest.mark.parametrize("costs", [["volume"], ["volume", "heads"]], ids=str)
def test_the_front_is_that_of_the_whole_space(costs):
  found = front(problem({"volume": 1000}), costs, population=20, trials=500)
  best = undominated([Candidate(m, accuracy(m), {n: cost(m) for n, cost in COSTS.items()})
                      for m in SPACE if volume(m) <= 1000], costs)
  key = lambda c: (c.accuracy, *(c.costs[n] for n in costs))
  assert sorted(map(key, found)) == sorted(map(key, best)) and len(best) > 5


def test_undominated_by_hand():
  rows = [(1, 0.5, 3), (2, 0.5, 2), (2, 0.4, 2), (3, 0.7, 1), (3, 0.7, 1), (4, 0.6, 1), (0.5, 0.1, 9)]
  made = [Candidate(Subnet(layers=i), a, {"x": x, "y": y}) for i, (x, a, y) in enumerate(rows, 1)]
  assert [c.subnet["layers"] for c in undominated(made, ["x"])] == [7, 1, 4]
  assert [c.subnet["layers"] for c in undominated(made, ["x", "y"])] == [7, 1, 2, 4]


def test_coarse_grid_ties_stages_and_layers():
  staged = Space(layers_1=(1, 2), layers_2=(2, 3), mlp_1=(8, 16), mlp_2=(8, 16, 32), embed=(8, 16, 24, 32),
                 per_layer=("mlp_1", "mlp_2"))
  grid = coarse(staged, levels=3)
  assert len(grid) == len(set(grid)) == 2 * 3 * 3 and all(m in staged for m in grid)
  for member in grid:
    assert member["layers_2"] == member["layers_1"] + 1
    assert isinstance(member.chosen["mlp_2"], int)
    assert {8: (8,), 16: (8, 16), 32: (16,)}[member["mlp_2"]].count(member["mlp_1"])
  assert {m["embed"] for m in grid} == {8, 24, 32}


def test_coarse_to_fine_is_at_least_as_good_as_its_grid():
  budgets, asked = {"volume": 700}, []
  found = coarse_to_fine(problem(budgets, asked=asked), population=12, generations=8)
  grid = [m for m in coarse(SPACE) if volume(m) <= 700]
  assert set(asked[:len(grid)]) == set(grid)
  assert found.accuracy > max(map(accuracy, grid)) and found.subnet == exhaustive(budgets)


def test_children_are_of_their_parents():
  rng = np.random.default_rng(0)
  a, b = SPACE.subnet("layers=1,embed=8,heads=1,mlp=8"), SPACE.subnet("layers=3,embed=16,mlp=32")
  for _ in range(30):
    child = cross(SPACE, a, b, rng)
    assert child in SPACE and child["layers"] in (1, 3) and child["embed"] * child["heads"] in (8, 32)
    assert set(widths(child)) <= {8, 32} and set(widths(child)[1:]) <= {32}
    assert mutate(SPACE, b, rng, 0.0) == b
  mutants = {mutate(SPACE, a, rng, 0.5) for _ in range(60)}
  assert {m["layers"] for m in mutants} == {1, 2, 3} and all(m in SPACE for m in mutants)


@pytest.mark.parametrize("options, words", [
  (dict(population=3), "population: got 3"), (dict(generations=0), "generations: got 0")])
def test_numbers_out_of_range(options, words):
  with pytest.raises(errors.UserError, match=words):
    evolve(problem({"volume": 900}), **options)
