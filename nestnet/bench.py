"""What slicing costs: steps of slices and of joint training against stand-alone networks.

Contenders of a pair run one after the other, and which goes first alternates, so that what else
the machine does meets both alike; ratios are taken pair by pair.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import optax

from nestnet import build, evaluation, report
from nestnet.data import Batches
from nestnet.errors import UserError
from nestnet.files import atomic_write
from nestnet.jobs import cores
from nestnet.recipes import recipe
from nestnet.sampling import FIXED_LIMIT, Sampler, Term, sampler
from nestnet.sharding import put_batch
from nestnet.space import volume
from nestnet.steps import Step

BAR = 1.05
LEAST_MS = 50.0
_WARM_UP = 3

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Two contenders, measured in interleaved pairs.

  Attributes:
    base_ms: Median time of the second, in milliseconds.
    own_ms: Median time of the first.
    median: Median over pairs of first / second.
    lower: First quartile of that ratio.
    upper: Third quartile.
  """

  base_ms: float
  own_ms: float
  median: float
  lower: float
  upper: float


def ratio(own: Call, base: Call | Sequence[Call], pairs: int, clock: Callable[[], float] =
          time.perf_counter) -> Ratio:
  """Measures `own` against `base` (the sum of several calls), pair by pair.

  Args:
    own: A call that returns only when its work is done.
    base: The same, one or several.
    pairs: How many pairs; the first of each pair alternates.
    clock: Seconds.

  Example:
    >>> ratio(lambda: None, lambda: time.sleep(0.001), pairs=3).median < 1
    True
  """
  if pairs < 1:
    raise UserError(f"pairs: got {pairs}, allowed is at least 1")
  bases = [base] if callable(base) else list(base)

  def timed(calls):
    began = clock()
    for call in calls:
      call()
    return 1e3 * (clock() - began)

  for call in (own, *bases) * _WARM_UP:
    call()
  times = []
  for pair in range(pairs):
    both = {name: timed(calls) for name, calls in itertools.islice(
      itertools.cycle((("own", [own]), ("base", bases))), pair % 2, pair % 2 + 2)}
    times.append((both["own"], both["base"]))
  owns, others = np.array(times).T
  lower, median, upper = np.percentile(owns / others, (25, 50, 75)).tolist()
  return Ratio(float(np.median(others)), float(np.median(owns)), median, lower, upper)


def bench(config: Mapping[str, Any], batch_size: int = 0, pairs: int = 20) -> dict[str, Any]:
  """Measures every member of the pool (of the space, where it has none and is small).

  A slice's step is a gradient program and an update program, as random samplers run it. The
  stand-alone network's is one program, and so is the joint step of up to 8 members; that of more is
  a gradient program for each and an update program, as `Step` runs it.

  Args:
    config: As `build.build` takes it; the recipe does not matter: all learn from labels alone, by
      `classification`.
    batch_size: In images; by default the config's, doubled until the smallest network's step takes
      50 ms.
    pairs: Pairs for each ratio.

  Returns:
    `hardware`, `batch_size`, `pairs`, `bar`, `slices` (a list of `subnet`, `params` and the fields
    of `Ratio`, and the time of the update of all the supernet's weights) and `joint`.
  """
  config = build.plain(config) | {"phases": [], "recipe": recipe("truncate")}
  run = build.build(config)
  space = run.supernet.space
  if not space.pool and space.size > FIXED_LIMIT:
    raise UserError(f"the space has {space.size} members and no pool; name what to measure in "
                    "space.pool")
  members = sorted(space.pool or space, key=volume)
  alone = {member: build.build(config | {"recipe": recipe("separate", subnet=str(member))})
           for member in members}
  chosen = bool(batch_size)
  batch_size = batch_size or config["train"]["batch_size"]
  while True:
    batch = put_batch(Batches(run.dataset, "train", batch_size)[0], run.step.mesh)
    if chosen or _median_ms(_stepper(alone[members[0]].step, batch)) >= LEAST_MS:
      break
    batch_size *= 2
  bases = {member: _stepper(alone[member].step, batch) for member in members}
  update = _median_ms(_updater(run.step))
  slices = []
  for member in members:
    one = (Term((member,)),)
    found = ratio(_stepper(_with(run, Sampler(lambda step, one=one: one)), batch), bases[member], pairs)
    slices.append({"subnet": str(member), **evaluation.costs(run.supernet, member),
                   **dataclasses.asdict(found), "update_ms": update,
                   "own_update_ms": _median_ms(_updater(alone[member].step))})
  names = [str(member) for member in members]
  joint = _stepper(_with(run, sampler("joint", space, members=names)), batch)
  together = {"members": names, **dataclasses.asdict(ratio(joint, list(bases.values()), pairs))}
  return {"hardware": hardware(), "batch_size": batch_size, "pairs": pairs, "bar": BAR, "slices": slices,
          "joint": together}


def _with(run: build.Run, chosen: Sampler) -> Step:
  """The run's step with another sampler."""
  step = run.step
  recipe = dataclasses.replace(step.recipe, sampler=chosen)
  return Step(step.supernet, recipe, lambda mask: step.tx, step.mesh)


def _stepper(step: Step, batch: dict[str, Any]) -> Call:
  """A call that makes one training step and waits for its end."""
  state = step.init()
  numbers = itertools.count()

  def call():
    nonlocal state
    state, metrics = step(state, batch, next(numbers))
    jax.block_until_ready((state, metrics))

  return call


def _updater(step: Step) -> Call:
  """A call that makes the optimizer's update alone."""
  state = step.init()
  trained, opt_state = state.trained, state.opt_state
  grads = jax.tree.map(jax.numpy.zeros_like, trained)

  def update(trained, opt_state, grads):
    updates, opt_state = step.tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  compiled = jax.jit(update, donate_argnums=(0, 1))

  def call():
    nonlocal trained, opt_state
    trained, opt_state = jax.block_until_ready(compiled(trained, opt_state, grads))

  return call


def _median_ms(call: Call) -> float:
  for _ in range(_WARM_UP):
    call()
  times = []
  for _ in range(7):
    began = time.perf_counter()
    call()
    times.append(1e3 * (time.perf_counter() - began))
  return float(np.median(times))


def table(found: Mapping[str, Any]) -> str:
  """What `bench` found, as text for the terminal."""
  header = ("subnet", "params", "alone ms", "slice ms", "ratio [quartiles]", "update ms: alone, slice")
  lines = [header]
  for row in found["slices"]:
    lines.append((row["subnet"], report.human(row["params"]), *_cells(row),
                  f"{row['own_update_ms']:.2f}, {row['update_ms']:.2f}"))
  lines.append((f"joint, all {len(found['joint']['members'])}", "", *_cells(found["joint"]), ""))
  bar = found["bar"]
  medians = (("slice / stand-alone, highest median", max(row["median"] for row in found["slices"])),
             ("joint / sum, median", found["joint"]["median"]))
  return "\n".join([
    report.aligned(lines), "",
    f"batch {found['batch_size']}, {found['pairs']} interleaved pairs, {found['hardware']}",
    *(f"{what}: {value:.3f}, bar {bar}: {'met' if value <= bar else 'NOT met'}"
      for what, value in medians)])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  return (f"{row['base_ms']:.1f}", f"{row['own_ms']:.1f}",
          f"{row['median']:.3f} [{row['lower']:.3f}, {row['upper']:.3f}]")


def write(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
  """Replaces a JSON file of what `bench` found."""
  atomic_write(path, json.dumps(found, indent=1) + "\n")


def hardware() -> str:
  """One line about where numbers were measured: processor, cores, versions."""
  info = pathlib.Path("/proc/cpuinfo")
  models = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
            if line.startswith("model name")] if info.exists() else []
  processor = models[0] if models else platform.processor() or platform.machine()
  devices = "" if jax.default_backend() == "cpu" else (
    f", {jax.device_count()} x {jax.devices()[0].device_kind}")
  return (f"{processor}, {len(cores())} cores{devices}; Python {'.'.join(map(str, sys.version_info[:3]))}, "
          f"jax {jax.__version__}, flax {flax.__version__}")
