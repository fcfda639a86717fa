"""From budgets to a member: evolution, a front by NSGA-II, from coarse to fine, and at random.

A search looks at members only through functions of them: an accuracy (measured or predicted) and
costs. It never leaves the family: its couplings, its constraint, its pool.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from nestnet.errors import UserError
from nestnet.space import Space
from nestnet.subnet import Subnet, kind_of

_STREAM = 13
_TRIES = 10
_IDLE = 5


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A member that a search looked at.

  Attributes:
    subnet: Which.
    accuracy: As the problem says.
    costs: By name, as the problem says.
  """

  subnet: Subnet
  accuracy: float
  costs: dict[str, float]


class Problem:
  """What is searched, and what was looked at so far.

  Args:
    space: The family; of one with a pool only the pool's members.
    accuracy: Accuracies of a list of members.
    costs: Functions of a member, by name.
    budgets: Limits on costs, by name.

  Attributes:
    seen: Every member whose accuracy was asked for; all within the budgets.
  """

  def __init__(self, space: Space, accuracy: Callable[[list[Subnet]], Sequence[float]],
               costs: Mapping[str, Callable[[Subnet], float]], budgets: Mapping[str, float]):
    self.space, self.budgets = space, dict(budgets)
    self._accuracy, self._costs = accuracy, dict(costs)
    self.seen: dict[Subnet, Candidate] = {}
    self._known: dict[tuple[str, Subnet], float] = {}

  def cost(self, name: str, member: Subnet) -> float:
    """One cost of a member, asked for once."""
    if (name, member) not in self._known:
      self._known[name, member] = self._costs[name](member)
    return self._known[name, member]

  def excess(self, member: Subnet) -> float:
    """By how much a member exceeds the tightest budget, as a share of it; at most 0 where it fits."""
    return max((self.cost(name, member) / limit - 1 for name, limit in self.budgets.items()), default=0.0)

  def fits(self, member: Subnet) -> bool:
    """Whether a member is within every budget."""
    return self.excess(member) <= 0

  def look(self, members: Iterable[Subnet]) -> list[Candidate]:
    """Candidates of members that fit; only those are evaluated that were not before."""
    members = list(dict.fromkeys(members))
    new = [m for m in members if m not in self.seen]
    for member, accuracy in zip(new, self._accuracy(new) if new else (), strict=True):
      self.seen[member] = Candidate(member, float(accuracy), {n: self.cost(n, member) for n in self._costs})
    return [self.seen[m] for m in members]

  def listed(self, most: int) -> list[Subnet] | None:
    """Every member that fits, where the pool or the whole space has at most `most`; else None.

    Raises:
      ValueError: None of them fits.
    """
    members = list(self.space.pool)
    if not members:
      try:
        small = self.space.size <= most
      except UserError:
        # A constraint on more candidates than one can count.
        small = False
      if not small:
        return None
      members = list(self.space)
    fitting = [m for m in members if self.fits(m)]
    if not fitting:
      raise self.infeasible({n: min(self.cost(n, m) for m in members) for n in self.budgets})
    return fitting

  def infeasible(self, cheapest: Mapping[str, float]) -> UserError:
    """The error for budgets that no member fits."""
    wanted = ", ".join(f"{name} of at most {limit:g}" for name, limit in self.budgets.items())
    least = ", ".join(f"{name} {value:g}" for name, value in cheapest.items())
    scope = f" ({searched(self.space)})" if self.space.pool else ""
    return UserError(f"no sub-network has {wanted}; the cheapest: {least}{scope}")


def searched(space: Space) -> str:
  """Which members a search of a space looks among, in words.

  Example:
    >>> searched(Space(mlp=(8, 16, 32), pool=("mlp=8", "mlp=16")))
    'only the 2 members of space.pool, of 3; --beyond_pool searches all'
  """
  try:
    size = f"{space.size:,}"
  except UserError:
    size = "more than one can count"
  if not space.pool:
    return f"all members, {size}"
  return f"only the {len(space.pool)} members of space.pool, of {size}; --beyond_pool searches all"


def evolve(problem: Problem, *, population: int = 100, generations: int = 500, parents: float = 0.25,
           crossover: float = 0.5, mutation: float = 0.1, seed: int = 0, start: Sequence[Subnet] = ()
           ) -> Candidate:
  """The most accurate member within the budgets that evolution finds (Once-for-All's code).

  Each generation keeps the best and adds their children, some from two parents, others mutated; what
  does not fit is drawn again. A family of no more members than the population is gone through.

  Args:
    problem: What is searched.
    population: Members of a generation.
    generations: How many.
    parents: Share of the population that is kept and has children.
    crossover: Share of the children that have two parents.
    mutation: Probability that a gene of the others is drawn anew.
    seed: Decides everything together with the problem.
    start: Members that fit, to begin with in place of random ones.

  Raises:
    ValueError: Nothing fits; the message says what the cheapest costs. Or a number is out of range.

  Example:
    >>> space = Space(layers=(1, 2, 3), mlp=(8, 16, 32), per_layer=("mlp",))
    >>> wide = Problem(space, lambda members: [sum(m.chosen["mlp"]) if isinstance(m.chosen["mlp"], tuple)
    ...   else m["layers"] * m["mlp"] for m in members], {"layers": lambda m: m["layers"]}, {"layers": 2})
    >>> str(evolve(wide).subnet)
    'layers=2,mlp=32'
  """
  _at_least(1, generations=generations)
  _at_least(4, population=population)
  if not start and (every := problem.listed(population)) is not None:
    return min(problem.look(every), key=_rank)
  rng = np.random.default_rng((_STREAM, seed))
  ranked = sorted(problem.look(start or fitting(problem, population, rng)), key=_rank)
  for _ in range(generations):
    kept = ranked[:max(2, round(parents * population))]
    members = dict.fromkeys(c.subnet for c in kept)
    pick = lambda: kept[rng.integers(len(kept))].subnet
    crossed = len(kept) + round(crossover * (population - len(kept)))
    for wanted, breed in ((crossed, lambda: cross(problem.space, pick(), pick(), rng)),
                          (population, lambda: mutate(problem.space, pick(), rng, mutation))):
      for _ in range(_TRIES * (wanted - len(members))):
        if len(members) >= wanted:
          break
        made = breed()
        if made is not None and made not in members and problem.fits(made):
          members[made] = None
    ranked = sorted(problem.look(members), key=_rank)
  return ranked[0]


def random(problem: Problem, *, population: int = 100, seed: int = 0) -> Candidate:
  """The most accurate of so many random members within the budgets: what a search must beat.

  Raises:
    ValueError: As `evolve`.
  """
  _at_least(1, population=population)
  members = problem.listed(population) or fitting(problem, population, np.random.default_rng((_STREAM, seed)))
  return min(problem.look(members), key=_rank)


def coarse_to_fine(problem: Problem, *, levels: int = 3, skeletons: int = 5, population: int = 20,
                   generations: int = 5, mutation: float = 0.1, seed: int = 0) -> Candidate:
  """Looks at a coarse grid, then around the best of it (BigNAS, 2003.11142, section 3.3).

  Args:
    problem: What is searched; its accuracy is meant to be measured.
    levels: As in `coarse`.
    skeletons: How many of the grid go on.
    population: Members of a generation of mutants.
    generations: How many.
    mutation: Probability that a gene is drawn anew.
    seed: Decides the mutants.

  Raises:
    ValueError: As `evolve`.
  """
  _at_least(1, levels=levels, skeletons=skeletons, generations=generations)
  grid = coarse(problem.space, levels)
  best = sorted(problem.look(m for m in grid if problem.fits(m)), key=_rank)[:skeletons]
  start = [c.subnet for c in best]
  if not start or problem.space.pool:
    return evolve(problem, population=population, generations=generations, mutation=mutation, seed=seed)
  evolve(problem, population=population, generations=generations, parents=skeletons / population,
         crossover=0.0, mutation=mutation, seed=seed, start=start)
  return min(problem.seen.values(), key=_rank)


def coarse(space: Space, levels: int = 3) -> list[Subnet]:
  """Members in which all stages, and all their layers, take the same place among their choices.

  Args:
    space: The family.
    levels: At most so many places of each kind of choice, the first and the last among them.

  Example:
    >>> space = Space(layers_1=(1, 2), layers_2=(2, 3), expand_1=(3, 6), per_layer=("expand_1",))
    >>> [str(m) for m in coarse(space)][:2]
    ['layers_1=1,layers_2=2,expand_1=3', 'layers_1=1,layers_2=2,expand_1=6']
  """
  if space.pool:
    return list(space.pool)
  kinds = [" ".join(map(kind_of, names.split())) for names, _ in space.genes]
  places = {}
  for kind in kinds:
    most = max(size for k, (_, size) in zip(kinds, space.genes) if k == kind)
    places[kind] = np.linspace(0, 1, min(levels, most)).tolist() if levels > 1 else [1.0]
  members: dict[Subnet, None] = {}
  for row in itertools.product(*places.values()):
    at = dict(zip(places, row))
    member = space.decode([1 + round(at[k] * (size - 1)) for k, (_, size) in zip(kinds, space.genes)])
    if member in space:
      members[member] = None
  return list(members)


def front(problem: Problem, costs: Sequence[str], *, population: int = 50, trials: int = 2000, seed: int = 0
          ) -> list[Candidate]:
  """Members that none other beats in accuracy and all of `costs`, by Optuna's NSGA-II; cheapest first.

  Args:
    problem: What is searched; budgets bound the front.
    costs: Names of costs.
    population: Members of a generation.
    trials: How many members are asked for in all.
    seed: Decides everything together with the problem.

  Raises:
    ValueError: As `evolve`.
  """
  _at_least(4, population=population)
  _at_least(1, trials=trials, costs=len(costs))
  every = problem.listed(population)
  if every is not None:
    return undominated(problem.look(every), costs)
  optuna = _optuna()
  rng, space = np.random.default_rng((_STREAM, seed)), problem.space
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
  study = optuna.create_study(directions=["maximize", *("minimize" for _ in costs)], sampler=sampler)
  names = [f"gene_{i}" for i in range(len(space.genes))]
  for member in fitting(problem, population // 2, rng):
    study.enqueue_trial(dict(zip(names, _whole(space, member, rng))))
  for start in range(0, trials, population):
    asked = [study.ask() for _ in range(min(population, trials - start))]
    members = [space.decode([trial.suggest_int(name, 1, size) for name, (_, size) in zip(names, space.genes)])
               for trial in asked]
    inside = {m: problem.excess(m) for m in members if m in space}
    accuracies = {c.subnet: c.accuracy for c in problem.look(m for m, over in inside.items() if over <= 0)}
    for trial, member in zip(asked, members):
      if member not in inside:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        continue
      trial.set_constraint("excess", inside[member])
      # What exceeds a budget is compared by its excess alone.
      study.tell(trial, (accuracies.get(member, 0.0), *(problem.cost(name, member) for name in costs)))
  return undominated(problem.seen.values(), costs)


def _optuna():
  """Only this search needs it."""
  try:
    import optuna
  except ModuleNotFoundError as error:
    raise UserError(f"NSGA-II needs Optuna: {error}; allowed: an environment after pip install -r "
                    "requirements.txt, or another method") from error
  return optuna


def undominated(candidates: Iterable[Candidate], costs: Sequence[str]) -> list[Candidate]:
  """Those that none other equals or beats everywhere and beats somewhere; the first of equals."""
  candidates = sorted(candidates, key=lambda c: (*(c.costs[n] for n in costs), -c.accuracy, str(c.subnet)))
  kept: list[Candidate] = []
  for c in candidates:
    # Whatever comes before costs less in the first, so none before is beaten by one behind.
    if not any(o.accuracy >= c.accuracy and all(o.costs[n] <= c.costs[n] for n in costs) for o in kept):
      kept.append(c)
  return kept


def fitting(problem: Problem, count: int, rng: np.random.Generator) -> list[Subnet]:
  """Up to `count` distinct members within the budgets, at least one: drawn, or bred from the cheapest.

  Raises:
    ValueError: None was found; the message says what the cheapest costs.
  """
  space = problem.space.without_pool()
  drawn = dict.fromkeys(space.sample(rng) for _ in range(10 * count))
  found = [m for m in drawn if problem.fits(m)][:count]
  if len(found) < max(2, count // 4):
    bred = _cheapest(space, [space.smallest, *drawn], problem.excess, count, rng)
    found = list(dict.fromkeys([*found, *(m for m in bred if problem.fits(m))]))[:count]
  if found:
    return found
  cheapest = {name: _cheapest(space, [space.smallest, *drawn], functools.partial(problem.cost, name), 20, rng)
              for name in problem.budgets}
  if found := [m for members in cheapest.values() for m in members if problem.fits(m)]:
    return list(dict.fromkeys(found))[:count]
  raise problem.infeasible({name: min(problem.cost(name, m) for m in members)
                            for name, members in cheapest.items()})


def _cheapest(space: Space, start: Iterable[Subnet], cost: Callable[[Subnet], float], count: int,
              rng: np.random.Generator) -> list[Subnet]:
  """Members bred for a low cost; one that is low enough (0) need not be lower."""
  rank = lambda m: (max(cost(m), 0.0), str(m))
  ranked, idle = sorted(start, key=rank)[:count], 0
  while idle < _IDLE:
    mutants = (mutate(space, ranked[rng.integers(max(1, len(ranked) // 4))], rng, 0.1) for _ in range(count))
    better = sorted(dict.fromkeys([*ranked, *(m for m in mutants if m is not None)]), key=rank)[:count]
    low = sum(cost(m) <= 0 for m in better)
    if low == count:
      return better
    further = cost(better[0]) < cost(ranked[0]) or low > sum(cost(m) <= 0 for m in ranked)
    ranked, idle = better, 0 if further else idle + 1
  return ranked


def mutate(space: Space, member: Subnet, rng: np.random.Generator, rate: float) -> Subnet | None:
  """The member with each gene drawn anew with probability `rate`; None where that is outside the space."""
  genes = _whole(space, member, rng)
  return _inside(space, np.where(rng.random(len(genes)) < rate, _random(space, rng), genes))


def cross(space: Space, a: Subnet, b: Subnet, rng: np.random.Generator) -> Subnet | None:
  """A child with each gene from one of two members; None where that is outside the space."""
  pair = np.stack([space.encode(a), space.encode(b)])
  mine = np.where(rng.random(pair.shape[1]) < 0.5, pair[0], pair[1])
  # What is absent in the one comes from the other.
  mine = np.where(mine == 0, pair.max(0), mine)
  return _inside(space, np.where(mine == 0, _random(space, rng), mine))


def _whole(space, member, rng) -> np.ndarray:
  """A member's genes, random ones for what it has not."""
  genes = np.array(space.encode(member))
  return np.where(genes == 0, _random(space, rng), genes)


def _random(space, rng) -> np.ndarray:
  return 1 + rng.integers([size for _, size in space.genes])


def _inside(space, genes) -> Subnet | None:
  member = space.decode(genes)
  return member if not space.constraint or space.constraint(member) else None


def _rank(candidate: Candidate):
  return -candidate.accuracy, tuple(candidate.costs.values()), str(candidate.subnet)


def _at_least(least: int, **numbers: int) -> None:
  for name, number in numbers.items():
    if number < least:
      raise UserError(f"{name}: got {number}, allowed is at least {least}")
