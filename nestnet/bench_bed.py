"""What the measurements of a bench share: a supernet, a batch, and networks that stand alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from nestnet import build
from nestnet.data import Batches
from nestnet.errors import UserError
from nestnet.evaluators import TASKS
from nestnet.recipes import recipe
from nestnet.sampling import FIXED_LIMIT, Sampler, Term
from nestnet.sharding import put_batch, replicated
from nestnet.space import Space, volume
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet
from nestnet.timing import Call, median_ms

LEAST_MS = 50.0
MEMBERS = 20


class Bed:
  """A config's supernet and a batch, and what several measurements share.

  Args:
    config: As `build.build` takes it.
    batch_size: In images; 0: the config's, doubled until the smallest network's step takes 50 ms.
    pairs: Pairs for each ratio.
    say: Called with a line about what is measured next.

  Attributes:
    run: The supernet without its pool, trained on labels alone.
    batch: On the devices.
    listed: The pool from the smallest to the largest; without one, 8 members over the range of cost.
    spread: 20 members over the range of cost, or all where they are fewer.
  """

  def __init__(self, config: Mapping[str, Any], batch_size: int, pairs: int,
               say: Callable[[str], None] = lambda line: None):
    if pairs < 1:
      raise UserError(f"pairs: got {pairs}, allowed is at least 1")
    if batch_size < 0:
      raise UserError(f"batch_size: got {batch_size}, allowed is at least 1; 0 chooses one")
    config = build.plain(config)
    pool = config["space"].pop("pool", None) or () if "space" in config else ()
    self._objective = TASKS[build.data_of(config).task].objective
    self.config = config | {"phases": [], "recipe": self._recipe("truncate")}
    self.pairs, self.run, self.say = pairs, build.build(self.config), say
    # Kept on the host: compiling an initialisation takes as long as compiling a step.
    self._initial = jax.device_get(self.run.step.init())
    self._fastest: dict[Subnet, str] = {}
    space = self.run.supernet.space
    self.listed = sorted(map(space.subnet, pool), key=volume) or spread(space, FIXED_LIMIT)
    self.spread = spread(space, MEMBERS)
    self.batch_size = batch_size or self.config["train"]["batch_size"]
    while True:
      self.batch = put_batch(Batches(self.run.dataset, "train", self.batch_size)[0], self.run.step.mesh)
      if batch_size or median_ms(self.base(self.listed[0])) >= LEAST_MS:
        break
      self.batch_size *= 2

  def _recipe(self, name: str, **options: Any) -> dict[str, Any]:
    """A recipe that learns from the data alone."""
    return recipe(name, **options) | {"objective": {"name": self._objective}}

  @functools.cached_property
  def variants(self) -> tuple[str, ...]:
    """How a stand-alone network may be compiled; the model's own choice first."""
    if not hasattr(self.run.supernet.model, "remat"):
      return ("plain",)
    return ("remat", "plain") if self.run.supernet.model.remat else ("plain", "remat")

  def state(self, member: Subnet | None = None) -> TrainState:
    """A fresh state of the supernet; or of a member that stands alone and begins as it is there."""
    state = self._initial
    if member is not None:
      variables, step = self.run.step.member(state, member), self.alone(member)
      trained = {"model": variables.pop("params"), "objective": state.trained["objective"]}
      state = state.replace(trained=trained, fixed=variables, opt_state=jax.jit(step.tx.init)(trained))
    # A step's state is donated.
    return jax.device_put(state, replicated(self.run.step.mesh), may_alias=False)

  @functools.cache
  def alone(self, member: Subnet, variant: str = "") -> Step:
    """The step of a network of this size that stands alone."""
    variant = variant or self.variants[0]
    remat = {"remat": variant == "remat"} if len(self.variants) > 1 else {}
    return build.build(self.config | {"recipe": self._recipe("separate", subnet=str(member)),
                                      "model": self.config["model"] | remat}).step

  def base(self, member: Subnet, variant: str = "") -> Call:
    """A call that makes a step of the network alone."""
    return stepper(self.alone(member, variant), self.state(member), self.batch)

  def bases(self, member: Subnet) -> dict[str, Call]:
    """Steps of the network alone in each variant, that which takes the least time first."""
    steps = {v: self.base(member, v) for v in self.variants}
    took = {v: median_ms(step) for v, step in steps.items()}
    steps = {v: steps[v] for v in sorted(steps, key=took.get)}
    self._fastest[member] = next(iter(steps))
    return steps

  def faster(self, member: Subnet) -> Call:
    """A step of the network alone, in the variant that takes the least time."""
    if member not in self._fastest:
      return next(iter(self.bases(member).values()))
    return self.base(member, self._fastest[member])

  @functools.cache
  def trainer(self, execution: str) -> Trainer:
    """The supernet, executed in one way or the other; measurements share its compiled programs."""
    return self.fresh_trainer(execution)

  def fresh_trainer(self, execution: str) -> Trainer:
    """The same, with nothing compiled."""
    return Trainer(self.run.step, self.state(), self.batch, execution)


class Trainer:
  """A step of a supernet that is told each time what to train."""

  def __init__(self, step: Step, state: TrainState, batch: Mapping[str, jax.Array], execution: str):
    self._terms: tuple[Term, ...] = ()
    told = with_sampler(step, Sampler(lambda number: self._terms), execution)
    self._call = stepper(told, state, batch)

  def of(self, *terms: Term) -> Call:
    """A call that makes one step on these terms and waits for its end."""
    def call():
      self._terms = terms
      self._call()
    return call


def with_sampler(step: Step, chosen: Sampler, execution: str) -> Step:
  """A step with another sampler, executed as told."""
  told = dataclasses.replace(step.recipe, sampler=chosen)
  return Step(step.supernet, told, lambda mask: step.tx, step.mesh, execution=execution)


def stepper(step: Step, state: TrainState, batch: Mapping[str, jax.Array]) -> Call:
  """A call that makes one training step and waits for its end; `state` is used up."""
  numbers = itertools.count()

  def call():
    nonlocal state
    state, metrics = step(state, batch, next(numbers))
    jax.block_until_ready((state, metrics))

  return call


def spread(space: Space, count: int) -> list[Subnet]:
  """Members at even steps of the logarithm of their volume, the extremes included, in its order.

  Args:
    space: The family; of one too large to list, 2,048 members are drawn to choose from.
    count: How many; all of them, where they are no more.

  Example:
    >>> [str(member) for member in spread(Space(mlp=(1, 2, 3, 5, 6, 7, 8, 64)), 4)]
    ['mlp=1', 'mlp=5', 'mlp=8', 'mlp=64']
  """
  if space.size <= 4096:
    candidates = list(space)
  else:
    drawn = (space.sample(i, by=("members", "choices")[i % 2]) for i in range(2048))
    candidates = sorted({space.smallest, space.largest, *drawn}, key=lambda s: (volume(s), str(s)))
  if len(candidates) <= count:
    return candidates
  logs, chosen = np.log([volume(member) for member in candidates]), []
  for position in range(count):
    wanted = logs[0] + (logs[-1] - logs[0]) * position / (count - 1)
    # As many candidates are left on either side as there are members still to choose.
    low, high = chosen[-1] + 1 if chosen else 0, len(candidates) - count + position
    chosen.append(low + int(np.abs(logs[low:high + 1] - wanted).argmin()))
  return [candidates[i] for i in chosen]
