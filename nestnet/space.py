"""The family of sub-networks that one supernet contains."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nestnet.choices import column, joint_rows, partial, plain, weighted
from nestnet.errors import UserError, one_of
from nestnet.subnet import Size, Subnet, depth_of, is_depth, kept_count, kept_ids, reach, unfolded

ENUMERABLE = 100_000
CANDIDATES = 1_000_000


class Space:
  """A finite set of sub-networks: choices for each axis, and what ties them.

  Args:
    couple: Joint choices of several axes, `{"layers embed": ((2, 32), (4, 64))}`: any coupling is
      a list of the allowed rows (`heads` that follows `embed`, fixed pairs, `least_slope`).
    per_layer: Axes whose choice is free in every layer.
    groups: Number of equal groups of an axis; a subnet keeps the leading part of each, so that a
      cut stays local on a mesh that shards the axis.
    constraint: Predicate on members; only those that pass belong to the space.
    pool: Members, as `Subnet` or text, that sampling is limited to.
    **choices: Sizes by axis. On a depth axis a size may be a tuple of layer ids (`spaced`). The axis
      `resolution`, in pixels, is the side that images are resized to before the sub-network sees them;
      it cuts no parameter.

  Example:
    >>> space = Space(layers=(2, 4, 6), embed=(48, 96), heads=(3, 6), mlp=(96, 192, 384))
    >>> len(space), str(space.smallest)
    (36, 'layers=2,embed=48,heads=3,mlp=96')
    >>> Space(layers=(2, 4), mlp=(8, 16, 32), per_layer=("mlp",)).size
    90
  """

  def __init__(self, *, couple: Mapping[str, Sequence] | None = None, per_layer: Iterable[str] = (),
               groups: Mapping[str, int] | None = None, constraint: Callable[[Subnet], bool] | None = None,
               pool: Iterable[Subnet | str] = (), **choices: Any):
    """Raises `ValueError` for an axis that is chosen twice or has no choices, a size that is no whole
    number, or does not divide into its groups, and a pool outside the space."""
    self.groups = dict(groups or {})
    self.per_layer = tuple(per_layer)
    self.constraint = constraint
    free = {axis: column(axis, choices.pop(axis, None)) for axis in self.per_layer}
    rows = {(axis,): tuple((v,) for v in column(axis, values)) for axis, values in choices.items()}
    for names, values in (couple or {}).items():
      rows[tuple(names.split())] = joint_rows(names, values)
    self._free = free
    self._factors = rows
    self.axes = tuple(itertools.chain(*rows, free))
    self._validate()
    self.pool = tuple(self._pooled(number, member) for number, member in enumerate(pool, 1))

  def _pooled(self, number: int, member: Subnet | str) -> Subnet:
    try:
      return self.subnet(member)
    except UserError as error:
      raise UserError(f"space.pool, row {number}: {error}") from error

  def _validate(self):
    repeated = sorted({a for a in self.axes if self.axes.count(a) > 1})
    if repeated or not self.axes:
      raise UserError(f"space: {', '.join(repeated) or 'no axis'} has choices "
                      f"{'more than once' if repeated else ''}; each axis is chosen once")
    for axis in self._free:
      if is_depth(axis) or depth_of(axis) not in self.axes:
        raise UserError(f"space: per-layer axis {axis} needs choices for {depth_of(axis)}")
    for names, axis in ((names, axis) for names in self._factors for axis in names):
      if not is_depth(axis) and depth_of(axis) not in names and any(
          isinstance(size, tuple) for size in self.choices(axis)):
        raise UserError(f"space: {axis} lists sizes of layers, so it must be coupled with its "
                        f"depth: couple={{'{depth_of(axis)} {axis}': ...}}")
    for axis, count in self.groups.items():
      if axis not in self.axes:
        raise one_of("axis with groups", axis, self.axes)
      for size in self.choices(axis):
        if any(s % count for s in (size if isinstance(size, tuple) else (size,))):
          raise UserError(f"space: {axis}={size} does not divide into {count} groups")
    if self.constraint and next(self._members(), None) is None:
      raise UserError("space: no member passes the constraint")

  def choices(self, axis: str, given: Mapping[str, Size] | None = None) -> tuple[Size, ...]:
    """The sizes that `axis` may take, in their order; beside the `given` sizes of other axes."""
    if axis in self._free:
      return self._free[axis]
    for names, rows in self._factors.items():
      if axis in names:
        fitting = (row for row in rows if all(
          size == (given or {}).get(other, size) for other, size in zip(names, row)))
        return tuple(dict.fromkeys(row[names.index(axis)] for row in fitting))
    raise one_of("axis", axis, self.axes)

  def sizes(self, axis: str, given: Mapping[str, Size] | None = None) -> tuple[int, ...]:
    """The sizes that `axis` may have in a layer, in rising order; of a depth axis not asked for."""
    every = self.choices(axis, given)
    return tuple(sorted({s for size in every for s in (size if isinstance(size, tuple) else (size,))}))

  def combinations(self, axes: Sequence[str]) -> list[dict[str, Size]]:
    """The joint choices of some axes, whatever the others are.

    Example:
      >>> Space(layers=(2, 4), couple={"embed heads": ((8, 1), (8, 2), (16, 2))}).combinations(["embed"])
      [{'embed': 8}, {'embed': 16}]
    """
    columns = []
    for names, rows in self._factors.items():
      kept = [i for i, name in enumerate(names) if name in axes]
      columns.append(list(dict.fromkeys(tuple((names[i], row[i]) for i in kept) for row in rows)))
    return [dict(itertools.chain(*pieces)) for pieces in itertools.product(*columns)]

  # Size and membership.

  @functools.cached_property
  def size(self) -> int:
    """The exact number of members. `len` is the same, up to Python's limit of 2^63.

    Raises:
      ValueError: A constraint stands on more than 1,000,000 candidates.
    """
    return sum(1 for _ in self._filtered()) if self.constraint else self._candidates

  @property
  def _candidates(self) -> int:
    return math.prod(sum(self._completions(names, row) for row in rows)
                     for names, rows in self._factors.items())

  def __len__(self) -> int:
    return self.size

  def __bool__(self) -> bool:
    return True

  def __contains__(self, subnet: object) -> bool:
    try:
      self.encode(subnet)
    except (UserError, TypeError, AttributeError):
      return False
    return True

  @functools.cached_property
  def smallest(self) -> Subnet:
    """The member of least volume."""
    return self._extreme(min)

  @functools.cached_property
  def largest(self) -> Subnet:
    """The member of most volume: the supernet, which contains all others."""
    return self._extreme(max)

  def _extreme(self, pick) -> Subnet:
    sizes: dict[str, Size] = {}
    for names, rows in self._factors.items():
      sizes |= dict(zip(names, pick(rows, key=lambda row: volume(partial(zip(names, row))))))
    member = self._subnet(sizes | {axis: pick(values) for axis, values in self._free.items()})
    if not self.constraint or self.constraint(member):
      return member
    return pick(self._filtered(), key=volume)

  # Iteration and sampling.

  def __iter__(self) -> Iterator[Subnet]:
    """Members from the cheapest to the dearest, by `volume`."""
    return iter(self.by_cost(volume))

  def by_cost(self, cost: Callable[[Subnet], float]) -> list[Subnet]:
    """All members in order of `cost`.

    Raises:
      ValueError: The space has more than 100,000 members.
    """
    if self.size > ENUMERABLE:
      raise UserError(f"the space has {self.size} members, too many to list (at most {ENUMERABLE} "
                      "are allowed); sample it")
    return sorted(self._members(), key=lambda s: (cost(s), str(s)))

  def sample(self, key: Any, by: str = "choices", cost: Callable[[Subnet], float] | None = None) -> Subnet:
    """One random member, a pure function of `key`; of the pool, where there is one.

    Args:
      key: A whole number or several, such as `(seed, step)`, or a numpy `Generator`.
      by: `"choices"`: each axis (with `per_layer`, each layer) on its own, uniform over its
        choices, as Once-for-All; `"members"`: uniform over members; `"cost"`: a cost uniform
        between the extremes, then the nearest member among many drawn.
      cost: The cost of a subnet; `volume` by default.
    """
    rng = np.random.default_rng(key)
    if by not in ("choices", "members", "cost"):
      raise one_of("sampling by", by, ("choices", "members", "cost"))
    if by == "cost":
      return self._sample_cost(rng, cost or volume)
    if self.pool:
      return self.pool[rng.integers(len(self.pool))]
    while True:
      member = self._draw(rng, by)
      if not self.constraint or self.constraint(member):
        return member

  def _sample_cost(self, rng, cost) -> Subnet:
    candidates = self.pool or [
      *(self.sample(rng, by="members") for _ in range(256)), self.smallest, self.largest]
    costs = np.array([cost(c) for c in candidates], float)
    return candidates[int(np.abs(costs - rng.uniform(costs.min(), costs.max())).argmin())]

  def _draw(self, rng, by) -> Subnet:
    sizes: dict[str, Size] = {}
    for names, rows in self._factors.items():
      index = rng.integers(len(rows)) if by == "choices" else weighted(
        rng, [self._completions(names, row) for row in rows])
      sizes |= dict(zip(names, rows[index]))
    for axis, values in self._free.items():
      count = kept_count(sizes[depth_of(axis)])
      sizes[axis] = tuple(values[i] for i in rng.integers(len(values), size=count))
    return self._subnet(sizes)

  def _members(self) -> Iterator[Subnet]:
    for rows in itertools.product(*self._factors.values()):
      sizes = dict(itertools.chain(*(zip(n, row) for n, row in zip(self._factors, rows))))
      counts = [kept_count(sizes[depth_of(axis)]) for axis in self._free]
      # One flat product: a product of products would hold every list of an axis at once.
      slots = [v for v, n in zip(self._free.values(), counts) for _ in range(n)]
      for picks in map(iter, itertools.product(*slots)):
        free = {a: tuple(itertools.islice(picks, n)) for a, n in zip(self._free, counts)}
        member = self._subnet(sizes | free)
        if not self.constraint or self.constraint(member):
          yield member

  def _filtered(self) -> Iterator[Subnet]:
    if self._candidates > CANDIDATES:
      raise UserError(f"the space has a constraint on {self._candidates} candidates, too many to "
                      f"go through (at most {CANDIDATES} are allowed); sample it")
    return self._members()

  def without_pool(self) -> Space:
    """The same space, sampled in full."""
    return Space(**{**self.to_json(), "pool": ()}, constraint=self.constraint)

  # Encoding.

  @functools.cached_property
  def genes(self) -> tuple[tuple[str, int], ...]:
    """What each gene of `encode` chooses, one axis or several that are coupled, and among how many.

    Example:
      >>> Space(layers=(1, 2), mlp=(8, 16, 32), per_layer=("mlp",)).genes
      (('layers', 2), ('mlp', 3), ('mlp', 3))
    """
    coupled = ((" ".join(names), len(rows)) for names, rows in self._factors.items())
    free = ((axis, len(values)) for axis, values in self._free.items() for _ in range(self._lengths[axis]))
    return (*coupled, *free)

  def encode(self, subnet: Subnet) -> tuple[int, ...]:
    """The genes of a member: one for each factor, and one for each layer of a per-layer axis.

    A gene is the position of the choice, from 1; the genes of absent layers are 0.

    Raises:
      ValueError: `subnet` is not a member.
    """
    self._check_axes(subnet)
    genes = []
    for names, rows in self._factors.items():
      row = tuple(subnet.chosen.get(axis) for axis in names)
      if row not in rows:
        raise self._outside(subnet, names, row, rows)
      genes.append(1 + rows.index(row))
    for axis, values in self._free.items():
      slots = [0] * self._lengths[axis]
      for i, size in self._in_layers(subnet, axis, subnet.chosen):
        slots[i] = 1 + values.index(size)
      genes.extend(slots)
    if self.constraint and not self.constraint(subnet):
      raise UserError(f"sub-network {subnet} does not pass the constraint of the space")
    return tuple(genes)

  def decode(self, genes: Sequence[int]) -> Subnet:
    """The member with these genes; `encode(decode(genes)) == genes` for canonical genes."""
    genes = [int(g) for g in genes]
    expected = len(self._factors) + sum(self._lengths[axis] for axis in self._free)
    if len(genes) != expected:
      raise UserError(f"genes: got {len(genes)}, the space has {expected}")
    sizes: dict[str, Size] = {}
    for (names, rows), gene in zip(self._factors.items(), genes):
      if not 1 <= gene <= len(rows):
        raise UserError(f"gene of {' '.join(names)}: got {gene}, allowed 1 to {len(rows)}")
      sizes |= dict(zip(names, rows[gene - 1]))
    start = len(self._factors)
    for axis, values in self._free.items():
      slots = genes[start:start + self._lengths[axis]]
      start += self._lengths[axis]
      kept = [slots[i] for i in kept_ids(sizes[depth_of(axis)])]
      if not all(1 <= g <= len(values) for g in kept):
        raise UserError(f"genes of {axis}: got {kept}, allowed 1 to {len(values)}")
      sizes[axis] = tuple(values[g - 1] for g in kept)
    return self._subnet(sizes)

  # Subnets from what a user writes.

  def subnet(self, spec: Subnet | Mapping[str, Size] | str) -> Subnet:
    """A member from a partial description; axes that it leaves out are as large as they may be.

    `layers` stands for all of `layers_1`, `layers_2`, ...; the text may be `smallest` or `largest` too.
    Besides members it accepts mixtures of them, which nested training covers too: explicit layer
    ids whose number is a choice of depth, and per-layer lists of sizes that are choices.

    Raises:
      ValueError: An unknown axis, or a size outside the space, with the allowed ones.

    Example:
      >>> str(Space(layers=(2, 4), mlp=(8, 16)).subnet("layers=2"))
      'layers=2,mlp=16'
    """
    if isinstance(spec, str) and spec.strip() in ("smallest", "largest"):
      return getattr(self, spec.strip())
    given = Subnet.parse(spec) if isinstance(spec, str) else Subnet(**getattr(spec, "chosen", spec))
    given = unfolded(given, self.axes)
    self._check_axes(given, whole=False)
    sizes: dict[str, Size] = {}
    for names, rows in self._factors.items():
      wanted = {axis: given.chosen[axis] for axis in names if axis in given.chosen}
      fitting = [row for row in rows if all(
        self._fits(axis, size, row[names.index(axis)]) for axis, size in wanted.items())]
      if not fitting:
        raise self._outside(given, names, tuple(wanted.get(a, "any") for a in names), rows)
      sizes |= dict(zip(names, max(fitting, key=lambda r: volume(partial(zip(names, r))))))
    sizes |= {axis: max(values) for axis, values in self._free.items()}
    sizes |= given.chosen
    for axis in self._free:
      self._in_layers(given, axis, sizes)
    member = self._subnet(sizes)
    if self.constraint and not self.constraint(member):
      raise UserError(f"sub-network {member} does not pass the constraint of the space")
    return member

  def _fits(self, axis: str, value: Size, choice: Size) -> bool:
    if value == choice or not isinstance(value, tuple):
      return value == choice
    if is_depth(axis):
      return len(value) == kept_count(choice) and value[-1] < self._full(axis)
    return choice == max(value) and set(value) <= set(self.choices(axis))

  def _check_axes(self, subnet: Subnet, whole: bool = True):
    for axis in subnet:
      if axis not in self.axes:
        raise one_of("axis", axis, self.axes)
    missing = [axis for axis in self.axes if axis not in subnet]
    if whole and missing:
      raise UserError(f"sub-network {subnet} lacks {', '.join(missing)}")

  def _in_layers(self, subnet, axis, sizes) -> list[tuple[int, int]]:
    """The layers that are kept, and their sizes along an axis that is free in each."""
    ids, own, values = kept_ids(sizes[depth_of(axis)]), sizes[axis], self._free[axis]
    found = list(zip(ids, own if isinstance(own, tuple) else (own,) * len(ids)))
    for layer, size in found:
      if size not in values:
        where = f" in layer {layer}" if isinstance(own, tuple) else ""
        raise self._outside(subnet, (axis,), (size,), [(v,) for v in values], where)
    return found

  def _outside(self, subnet, names, row, rows, where="") -> UserError:
    got = ", ".join(f"{a}={plain(v)}" for a, v in zip(names, row)) + where
    allowed = ", ".join(str(plain(r[0]) if len(r) == 1 else tuple(map(plain, r))) for r in rows)
    return UserError(f"sub-network {subnet}: {got} is outside the space; "
                     f"allowed for {' '.join(names)}: {allowed}")

  def to_json(self) -> dict[str, Any]:
    """A JSON form, read back by `Space(**json)`; a constraint has none."""
    single = {names[0]: [row[0] for row in rows] for names, rows in self._factors.items() if len(names) == 1}
    joint = {" ".join(names): [list(row) for row in rows]
             for names, rows in self._factors.items() if len(names) > 1}
    return single | {axis: list(values) for axis, values in self._free.items()} | {
      key: value for key, value in {
        "couple": joint, "per_layer": list(self.per_layer), "groups": self.groups,
        "pool": [str(member) for member in self.pool]}.items() if value}

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Space) and (self.to_json(), self.constraint) == (
      other.to_json(), other.constraint)

  def __hash__(self) -> int:
    return hash((self.axes, tuple(self._factors.items()), tuple(self._free.items())))

  def __repr__(self) -> str:
    return f"Space({', '.join(f'{k}={v}' for k, v in self.to_json().items())})"

  def _subnet(self, sizes: Mapping[str, Size]) -> Subnet:
    return Subnet(**{axis: sizes[axis] for axis in self.axes})

  def _completions(self, names, row) -> int:
    """Members that extend one row of a factor along the per-layer axes of its depths."""
    return math.prod(len(values) ** kept_count(row[names.index(depth_of(axis))])
                     for axis, values in self._free.items() if depth_of(axis) in names)

  def _full(self, depth: str) -> int:
    return max(reach(depth, c) for c in self.choices(depth))

  @functools.cached_property
  def _lengths(self) -> dict[str, int]:
    return {axis: self._full(depth_of(axis)) for axis in self._free}


def volume(subnet: Subnet) -> float:
  """A cost that needs no model: the product of the mean sizes along all axes."""
  return math.prod(
    subnet[axis] if is_depth(axis) else float(np.mean(value))
    for axis, value in subnet.chosen.items())
