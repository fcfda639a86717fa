"""Which sub-networks train at a step: pure functions of (seed, step).

A sampler takes a space and its own options and returns `step -> terms`. Each term is one
sub-network's share of the step's loss; the loop sums them. All processes and restarts agree,
because nothing but the seed and the step decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence

import numpy as np

from nestnet.attentive import by_bucket
from nestnet.errors import UserError, one_of
from nestnet.imports import by_path
from nestnet.slots import drawn, slots
from nestnet.space import Space, volume
from nestnet.subnet import Subnet

# One sub-network, or one for each data shard.
Member = Subnet | tuple[Subnet, ...]

FIXED_LIMIT = 8
# Keeps the draws apart from those of the data, which has streams of its own.
_STREAM = 7
# Of a member that differs from the others of its step.
_DRAWS = 50


@dataclasses.dataclass(frozen=True)
class Term:
  """One sub-network's share of a step.

  Attributes:
    candidates: The sub-network that trains, or one for each data shard; with several, the recipe's
      `select` decides by their losses on the batch of this very step.
    weight: Factor of its loss.
    taught: Whether it learns from the teacher's outputs; otherwise from the labels.
    regularised: Whether dropout and drop path are on.
  """

  candidates: tuple[Member, ...]
  weight: float = 1.0
  taught: bool = False
  regularised: bool = True


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Names what trains.

  Attributes:
    terms: `terms(step)` are the terms of a step.
    fixed: Whether they are the same at every step; then one program runs them all.
    shards: How many data shards draw for themselves.
    whole: Whether members outside the space's pool train too.
  """

  terms: Callable[[int], tuple[Term, ...]]
  fixed: bool = False
  shards: int = 1
  whole: bool = False


@dataclasses.dataclass(frozen=True)
class Context:
  """What a run tells its samplers, beside the space.

  Attributes:
    first: The first step of their phase.
    steps: How many steps the phase has.
    cost: The cost of a member: its FLOPs, for a whole run.
  """

  first: int = 0
  steps: int = 1
  cost: Callable[[Subnet], float] = volume


def sampler(name: str, space: Space, seed: int = 0, *, context: Context = Context(), whole: bool = False,
            ramp: float = 0.0, **options) -> Sampler:
  """The sampler called `name` with its options; a user's own by import path.

  Args:
    name: Of a function of this module, or `package.module:function`.
    space: The family.
    seed: Decides all draws, together with the step.
    context: Given to samplers that take a `context`.
    whole: Whether to draw from all of the space, even where it has a pool.
    ramp: Over which share of the phase the weights of taught terms rise from 0, linearly: the warm-up of
      sub-networks of a supernet that is trained already (ε-shrinking of DεpS, ECCV 2024).
    **options: Of the sampler.

  Raises:
    ValueError: An unknown name or option, with the known ones.

  Example:
    >>> half = sampler("sandwich", Space(mlp=(4, 8)), context=Context(100, 40), ramp=0.25)
    >>> [half.terms(step)[1].weight for step in (100, 105, 110, 139)]
    [0.0, 0.5, 1.0, 1.0]
  """
  known = {f.__name__: f for f in (
    largest, sandwich, attentive, uniform, sorted_nested, joint, sampled, intact)}
  if ":" not in name and name not in known:
    raise one_of("sampler", name, (*known, "package.module:function"))
  make = by_path(name, "sampler") if ":" in name else known[name]
  accepted = make.__kwdefaults__ or {}
  for option in options:
    if option not in accepted or option == "context":
      raise one_of(f"option of the sampler {name}", option, (
        *(o for o in accepted if o != "context"), "whole", "ramp"))
  for option in ("random", "candidates", "n", "buckets", "table"):
    least = int(option != "random" and (name, option) != ("intact", "n"))
    if options.get(option, 1) < least:
      raise UserError(f"sampler {name}: {option}={options[option]}; allowed is at least {least}")
  if not 0 <= ramp <= 1:
    raise UserError(f"sampler {name}: ramp={ramp}; allowed is a share of the phase, 0 to 1")
  if "context" in accepted:
    options["context"] = context
  made = make(space.without_pool() if whole else space, seed, **options)
  made = dataclasses.replace(made, whole=whole or made.whole)
  # A wrong option of the drawing itself is said here too, not at the first step.
  made.terms(0)
  return _ramped(made, context.first, ramp * context.steps) if ramp else made


def _ramped(made: Sampler, first: int, length: float) -> Sampler:
  def terms(step):
    share = min(max(step - first, 0) / length, 1.0)
    return tuple(dataclasses.replace(t, weight=t.weight * share) if t.taught else t for t in made.terms(step))

  return dataclasses.replace(made, terms=terms, fixed=False)


def on_shards(samplers: Sequence[Sampler]) -> Sampler:
  """Each data shard draws for itself, by a sampler of its own with a seed of its own.

  Raises:
    ValueError: At step 0 they differ in more than in what they drew.
  """
  def terms(step):
    return tuple(map(_together, zip(*(s.terms(step) for s in samplers), strict=True)))

  terms(0)
  return Sampler(terms, all(s.fixed for s in samplers), len(samplers), any(s.whole for s in samplers))


def _together(terms: tuple[Term, ...]) -> Term:
  first = terms[0]
  for term in terms:
    if dataclasses.replace(term, candidates=first.candidates) != first or len(
        term.candidates) != len(first.candidates):
      raise UserError(f"data shards may differ in their sub-networks alone, got {first} and {term}")
  drawn = zip(*(t.candidates for t in terms))
  return dataclasses.replace(first, candidates=tuple(
    members[0] if len(set(members)) == 1 else members for members in drawn))


def largest(space: Space, seed: int) -> Sampler:
  """The whole network only: ordinary training, without nesting."""
  terms = (Term((space.largest,)),)
  return Sampler(lambda step: terms, fixed=True)


def sandwich(space: Space, seed: int, *, random: int = 2, candidates: int = 1, reduce: str = "sum",
             by: str = "choices", regularise: str = "largest") -> Sampler:
  """Largest, `random` other random ones and the smallest (US-Nets, 1903.05134, section 3.2; BigNAS,
  2003.11142, section 3.1).

  The largest learns from the labels and comes first; the others are taught by its outputs. They all differ
  where the family has so many.

  Args:
    space: The family.
    seed: Decides the random members together with the step.
    random: How many random members.
    candidates: Draws for each of them, of which the recipe's `select` trains one.
    reduce: `"sum"` or `"mean"` over the sub-networks.
    by: How to draw, as in `Space.sample`.
    regularise: Dropout and drop path on the `"largest"` only (BigNAS), or on `"all"`.
  """
  def draw(step, i, taken):
    return tuple(_another(space, (_STREAM, seed, step, 1 + i, 1 + j), by, taken) for j in range(candidates))

  return _sandwich(space, random, draw, reduce, regularise)


def attentive(space: Space, seed: int, *, random: int = 2, candidates: int = 3, buckets: int = 64,
              table: int = 2000, reduce: str = "sum", regularise: str = "largest",
              context: Context = Context()) -> Sampler:
  """A sandwich whose random members are drawn by what they cost (AttentiveNAS, 2011.09011, section 3).

  The candidates for one random member have about the same FLOPs, which are as frequent as in the space;
  the recipe's `select` trains the one of `"lowest"` loss (best-up) or `"highest"` (worst-up).

  Args:
    space: The family.
    seed: Decides the random members together with the step.
    random: How many random members.
    candidates: Draws for each of them.
    buckets: Intervals of equal length that FLOPs are divided into (the paper: of 25 million).
    table: Random members that stand for the space, whose FLOPs are counted at start-up.
    reduce: As in `sandwich`.
    regularise: As in `sandwich`.
    context: Says what members cost.
  """
  drawn = by_bucket(space, context.cost, buckets, table)
  return _sandwich(space, random, lambda step, i, _: drawn((_STREAM, seed, step, 1 + i), candidates), reduce,
                   regularise)


def _sandwich(space: Space, random: int, draw: Callable[[int, int, set[Subnet]], tuple[Subnet, ...]],
              reduce: str, regularise: str) -> Sampler:
  _check("regularise", regularise, ("largest", "all"))

  def terms(step):
    taken, small = {space.largest, space.smallest}, []
    for i in range(random):
      small.append(draw(step, i, taken))
      taken.update(small[-1])
    small.append((space.smallest,))
    return _weighted(reduce, (Term((space.largest,)), *(
      Term(c, taught=True, regularised=regularise == "all") for c in small)))

  return Sampler(terms, fixed=random == 0)


def _another(space: Space, key: Sequence[int], by: str, taken: Container[Subnet]) -> Subnet:
  """A random member that is not taken; any, where so many draws give none."""
  rng = np.random.default_rng(key)
  for _ in range(_DRAWS):
    if (member := space.sample(rng, by=by)) not in taken:
      break
  return member


def uniform(space: Space, seed: int, *, n: int = 1, taught: bool = True, reduce: str = "sum",
            by: str = "choices") -> Sampler:
  """`n` random members with neither the largest nor the smallest among them by rule.

  Once-for-All (1908.09791, section 3.3) teaches them with a frozen network and sums their gradients; RSS
  (CVPR workshops 2022) trains one on labels alone.

  Args:
    space: The family.
    seed: Decides the members together with the step.
    n: How many at a step.
    taught: Whether they learn from the recipe's teacher.
    reduce: `"sum"` or `"mean"` over the sub-networks.
    by: How to draw, as in `Space.sample`.
  """
  return Sampler(lambda step: _weighted(reduce, tuple(
    Term((space.sample((_STREAM, seed, step, 1 + i), by=by),), taught=taught) for i in range(n))))


def sorted_nested(space: Space, seed: int, *, n: int = 4, reduce: str = "sum",
                  by: str = "choices") -> Sampler:
  """`n` random nested members whose gradients accumulate, labels only (SortedNet, 2309.00255)."""
  return uniform(space, seed, n=n, taught=False, reduce=reduce, by=by)


def joint(space: Space, seed: int, *, members: Sequence[str] = (), reduce: str = "sum") -> Sampler:
  """Every granularity at every step (MatFormer as first published, 2310.07707v1).

  Args:
    space: The family.
    seed: Not used; nothing is random.
    members: The granularities; by default the pool, or the whole space if it is small.
    reduce: `"sum"` (as published) or `"mean"` over the granularities.
  """
  terms = _weighted(reduce, tuple(Term((m,)) for m in _granularities(space, members)))
  return Sampler(lambda step: terms, fixed=True)


def sampled(space: Space, seed: int, *, members: Sequence[str] = (),
            probabilities: Sequence[float] = ()) -> Sampler:
  """One granularity a step, drawn with given probabilities (MatFormer, 2310.07707v2, section 3.2).

  Args:
    space: The family.
    seed: Decides the draw together with the step.
    members: The granularities, as in `joint`.
    probabilities: One for each; uniform by default.
  """
  granularities = _granularities(space, members)
  p = np.array(probabilities or [1.0] * len(granularities), float)
  if len(p) != len(granularities) or (p < 0).any() or p.sum() == 0:
    raise UserError(f"probabilities {list(probabilities)}: one number of at least 0 for each of the "
                    f"{len(granularities)} granularities is allowed")
  p /= p.sum()

  def terms(step):
    index = np.random.default_rng((_STREAM, seed, step)).choice(len(p), p=p)
    return (Term((granularities[index],)),)

  return Sampler(terms)


def intact(space: Space, seed: int, *, n: int = 1, width_bias: float = 3.0, depth_bias: float = 3.0,
           whole_first: bool = True) -> Sampler:
  """The intact student, then `n` elastic ones, all taught; one elastic one on each data shard in the code of
  POA (2408.01031, section 3.1 and appendix C.4).

  Args:
    space: The family.
    seed: Decides the elastic students together with the step.
    n: How many; their losses are averaged. 0: the intact one alone (self-distillation without nesting).
    width_bias: How much more often the narrowest is drawn than the widest, as in `nestnet.slots.slots`.
    depth_bias: The same of the shallowest; 1 and 1: uniform.
    whole_first: Whether the intact student trains too (not in the ablation V2 of the paper).
  """
  listed = slots(space, width_bias, depth_bias) if n else ()
  whole = (Term((space.largest,), taught=True),) * whole_first
  if not n and not whole_first:
    raise UserError("sampler intact: n=0 and whole_first=False train nothing; allowed is one of n above 0 and "
                    "whole_first=True")

  def terms(step):
    elastic = (drawn(listed, step * n + i, (_STREAM, seed)) for i in range(n))
    return whole + tuple(Term((member,), 1 / n, taught=True) for member in elastic)

  return Sampler(terms, fixed=n == 0)


def _granularities(space: Space, members: Sequence[str]) -> tuple[Subnet, ...]:
  if members:
    return tuple(space.subnet(m) for m in members)
  if not space.pool and space.size > FIXED_LIMIT:
    raise UserError(f"the space has {space.size} members, too many to train each; name the "
                    f"granularities in space.pool or sampler.members (at most {FIXED_LIMIT})")
  return space.pool or tuple(space)


def _weighted(reduce: str, terms: tuple[Term, ...]) -> tuple[Term, ...]:
  _check("reduce", reduce, ("sum", "mean"))
  weight = 1.0 if reduce == "sum" else 1.0 / len(terms)
  return tuple(dataclasses.replace(t, weight=weight) for t in terms)


def _check(option: str, value: str, allowed: tuple[str, ...]):
  if value not in allowed:
    raise one_of(option, value, allowed)
