"""What stands behind the weights of a run: the phases that have run, and the members that trained."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from nestnet.build import Run
from nestnet.choices import plain
from nestnet.evaluation import COUNTED, LISTED
from nestnet.sampling import Sampler
from nestnet.space import Space
from nestnet.subnet import Subnet, folded
from nestnet.training import Phase

WHOLE = "the whole space"


def trained(run: Run, steps: int) -> list[str] | str:
  """What the first steps of a run trained.

  Returns:
    The members, where they are no more than 64 (of a phase of more than 4,000 steps: among those of its
    first 4,000); or what they were drawn from: the pool, `"the whole space"`, or the part of it that was
    open, such as `"members with layers=3,expand=3|4"`.
  """
  members, drawn = dict[Subnet, None](), dict[str, Space]()
  for phase, first, count in _ran(run, steps):
    sampler, space = phase.step.recipe.sampler, phase.step.supernet.space
    few = _few(sampler, first, count)
    if few is None and (sampler.whole or not space.pool):
      drawn[_part(space, run.supernet.space)] = space
    else:
      members |= dict.fromkeys(space.pool if few is None else few)
  if WHOLE in drawn:
    return WHOLE
  beside = [str(m) for m in members if not any(m in space for space in drawn.values())]
  return "; ".join([*drawn, *beside]) if drawn else beside


def whole(run: Run, steps: int) -> bool:
  """Whether the first steps of a run drew from all of a space, though it may have a pool."""
  return any(phase.step.recipe.sampler.whole for phase, _, _ in _ran(run, steps))


def tell(run: Run, steps: int) -> None:
  """Prints what `unfinished` says, if anything, on stderr."""
  if line := unfinished(run, steps):
    print(line, file=sys.stderr, flush=True)


def unfinished(run: Run, steps: int) -> str:
  """A line that says how far a run is and what has trained; empty at its end.

  Args:
    run: The run.
    steps: How many it has made.
  """
  if steps >= run.steps:
    return ""
  number, found = len(list(_ran(run, steps))), trained(run, steps)
  phase = f", phase {max(number, 1)} of {len(run.phases)}" if len(run.phases) > 1 else ""
  if found == [str(run.supernet.space.largest)]:
    what = "only the largest has trained"
  elif isinstance(found, str):
    what = f"what has trained: {found}"
  else:
    what = f"only {len(found)} sub-networks have trained"
  return f"the run is not finished: step {steps} of {run.steps}{phase}; {what}"


def _ran(run: Run, steps: int) -> Iterator[tuple[Phase, int, int]]:
  """The phases that have run, with their first step and how many of them were made."""
  first = 0
  for phase in run.phases:
    if first >= steps:
      break
    yield phase, first, min(phase.steps, steps - first)
    first += phase.steps


def _few(sampler: Sampler, first: int, count: int) -> list[Subnet] | None:
  """The members that some steps train; None where they are many."""
  found: dict[Subnet, None] = {}
  for step in range(first, first + (1 if sampler.fixed else min(count, COUNTED))):
    for candidate in itertools.chain.from_iterable(term.candidates for term in sampler.terms(step)):
      found |= dict.fromkeys(candidate if isinstance(candidate, tuple) else [candidate])
    if len(found) > LISTED:
      return None
  return list(found)


def _part(space: Space, family: Space) -> str:
  """What is open of a family, in words."""
  limits = {axis: "|".join(str(plain(size)) for size in space.choices(axis)) for axis in family.axes
            if set(space.choices(axis)) != set(family.choices(axis))}
  return "members with " + folded(",".join(map("=".join, limits.items()))) if limits else WHOLE
