"""Members of a family, what they cost and how good they are."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nestnet import metrics, processes, report
from nestnet.build import Run
from nestnet.calibrate import calibrate, calibrate_all, normalises
from nestnet.data import Batches, arrays, augmentation
from nestnet.errors import UserError
from nestnet.evaluators import TASKS, Task
from nestnet.execution import Supernet, resized
from nestnet.logs import Progress
from nestnet.models.convolution import STATISTICS
from nestnet.objectives.base import Objective
from nestnet.one_program import OneProgram
from nestnet.pieces import shared
from nestnet.sampling import FIXED_LIMIT, Member
from nestnet.sharding import local
from nestnet.space import ENUMERABLE, Space, volume
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet

LISTED = 64
# Steps of a phase whose FLOPs are counted one by one.
COUNTED = 4000
# Members that one program takes at once.
TOGETHER = 8
# Of the images that calibrate: the same for every run, so that an evaluation can be repeated.
CALIBRATION = {"images": 2000, "batch_size": 200, "seed": 0}

# What is compiled for one is kept with it.
as_data = functools.lru_cache(maxsize=8)(OneProgram)


def evaluated(run: Run) -> list[Subnet]:
  """The space, or a sample of it, and the members of `config.eval.members`: what tables show, by size."""
  return sorted(dict.fromkeys([*_listed(run.supernet.space), *run.also]), key=volume)


def counted(space: Space, members: Sequence[Subnet]) -> str:
  """How much of a space was evaluated, in words; mixtures of its members count apart.

  Example:
    >>> space = Space(layers=(2,), mlp=(8, 16))
    >>> counted(space, [*space, space.subnet("mlp=8:16")])
    '2 of 2 sub-networks and 1 mixture'
  """
  inside = sum(member in space for member in members)
  mixed = len(members) - inside
  return f"{inside} of {space.size} sub-networks" + f" and {mixed} mixture{'s' * (mixed > 1)}" * (mixed > 0)


def _listed(space: Space) -> list[Subnet]:
  """The whole space where it has at most 64 members; else a sample of 64, spread over the cost."""
  if space.size <= LISTED:
    return list(space)
  if not space.constraint and space.size <= ENUMERABLE:
    every = list(space)
    spread = [every[round(i * (len(every) - 1) / (LISTED - 1))] for i in range(LISTED)]
  else:
    whole = space.without_pool()
    spread = [whole.sample(draw, by="cost") for draw in range(LISTED)]
  members = dict.fromkeys([space.smallest, space.largest, *space.pool, *spread])
  return list(members)[:LISTED]


def evaluate(run: Run, state: TrainState, subnets: Iterable[Subnet], splits: Sequence[str] = (
    "validation", "test"), show_progress: bool = False, expected: int = 0) -> list[dict[str, Any]]:
  """Rows of `subnets.json`: `subnet`, `params`, `flops` of an input, metrics, and their budget.

  Metrics of the test split have plain names (`accuracy`, `bits_per_byte`), those of others a prefix
  (`validation_accuracy`). Splits are evaluated on `config.eval.examples` of their examples, by default on
  all. Members with batch normalisation are calibrated before, on as many training
  images as `calibration_images` says. Processes share the members out, and each gets all rows.

  Few members are a program each. Many are data to one program, where that is possible, which is compiled
  when it is first asked for; their metrics are the same up to rounding.

  Args:
    run: The family, its data, and how it calibrates.
    state: Whose weights.
    subnets: Which members.
    splits: Of the data.
    show_progress: Whether to show it.
    expected: How many members will be evaluated in all, where these are a part of them.
  """
  data, task = {split: held(run, split) for split in splits}, run.task
  spent, state = budget(run, int(state.step)), local(state)
  subnets, images = list(subnets), calibration(run, run.supernet)
  if images:
    spent["calibration_images"] = sum(map(len, images))
  one = _as_data(run.step, max(len(subnets), expected)) if task.evaluate_all else None
  share = subnets[jax.process_index()::jax.process_count()]
  progress = Progress(len(share), label="evaluate") if show_progress and processes.first() else None
  rows = []
  variables = {"params": run.step.weights(state)["model"], **state.fixed}
  found = _together(task, one, variables, share, images, data) if one else (
    measure(run, *member(run.step, state, subnet, images), data, subnet) for subnet in share)
  for subnet, measured in zip(share, found):
    row = {"subnet": str(subnet), **costs(run.supernet, subnet)}
    rows.append(row | measured | spent)
    if progress:
      progress.update(len(rows), rows[-1])
  if progress:
    progress.close()
  shares = [json.loads(text) for text in processes.gather(json.dumps(rows))]
  return [shares[i % len(shares)][i // len(shares)] for i in range(len(subnets))]


def _as_data(step: Step, members: int) -> OneProgram | None:
  """What evaluates so many members as data; None where each is better a program of its own."""
  # What an objective attaches differs by member.
  if members <= FIXED_LIMIT or step.recipe.objective.attach is not Objective.attach:
    return None
  one = as_data(step.supernet)
  if not one.possible or members <= one.worth:
    return None
  try:
    one.check()
  except UserError:
    return None
  return one


def _together(task: Task, one: OneProgram, variables: Mapping[str, Any], subnets: Sequence[Subnet],
              images: Sequence[np.ndarray], data: Mapping[str, Any]) -> Iterator[dict[str, float]]:
  """Metrics of each member; so many are calibrated and evaluated at once that memory holds them."""
  for start in range(0, len(subnets), TOGETHER):
    some = subnets[start:start + TOGETHER]
    # The last ones are filled up, so that one program serves all.
    vectors = np.stack([one.vector(some[min(i, len(some) - 1)]) for i in range(TOGETHER)])
    statistics = calibrate_all(one, variables, vectors, images) if images else {}
    found = on_splits(
      data, lambda examples: task.evaluate_all(one, variables, statistics, vectors, examples))
    yield from ({name: float(values[i]) for name, values in found.items()} for i in range(len(some)))


def held(run: Run, split: str) -> dict[str, np.ndarray]:
  """What a split is evaluated on."""
  return arrays(run.dataset, split, (run.config.get("eval") or {}).get("examples") or 0)


def measure(run: Run, module: nn.Module, variables: Mapping[str, Any], data: Mapping[str, Any],
            subnet: Subnet) -> dict[str, float]:
  """Metrics of a network on splits, by the names of columns.

  Args:
    run: For whose task it is evaluated.
    module: The network.
    variables: Its variables.
    data: As from `held`, by split.
    subnet: Which member it is.
  """
  task = run.task
  fitted = (task.fit(module, variables, subnet, run.dataset, run.config.get("eval") or {}),) if task.fit else ()
  return on_splits(data, lambda examples: task.evaluate(module, variables, examples, subnet, *fitted))


def on_splits(data: Mapping[str, Any], evaluator: Callable[[Any], Iterable[tuple[str, Any]]]
              ) -> dict[str, Any]:
  """Metrics on some splits, those of others than the test split with a prefix."""
  return {("" if split == "test" else f"{split}_") + name: value for split, examples in data.items()
          for name, value in evaluator(examples)}


def calibration(run: Run, supernet: Supernet, batches: int | None = None) -> list[np.ndarray]:
  """Batches of training images, augmented as in training, for the statistics of sub-networks.

  There are `config.eval.calibrate_images` of them (2,000 by default, as in Once-for-All) in batches of
  `config.eval.calibrate_batch_size`; none where the family does not normalise by batches.

  Args:
    run: Whose images.
    supernet: The family.
    batches: How many full batches instead.
  """
  if not normalises(supernet.model, supernet.inputs):
    return []
  options = run.config.get("eval") or {}
  count = options.get("calibrate_images", CALIBRATION["images"])
  size = options.get("calibrate_batch_size", CALIBRATION["batch_size"])
  count = count if batches is None else batches * size
  drawn = Batches(run.dataset, "train", size, CALIBRATION["seed"],
                  augmentation(run.config["data"].get("augment", "none")), entries=("image",))
  return [drawn[i]["image"][:count - i * size] for i in range(-(-count // size))]


def member(step: Step, state: TrainState, subnet: Subnet, images: Sequence[np.ndarray]
           ) -> tuple[nn.Module, dict[str, Any]]:
  """A sub-network as it is evaluated and extracted: its module and its variables.

  Args:
    step: Of the family.
    state: Whose weights.
    subnet: Which member.
    images: As from `calibration`: batches that give its statistics, or none where it needs none.
  """
  module, variables = step.supernet.module(subnet), step.member(state, subnet)
  if not len(images):
    return module, variables
  return module, variables | {STATISTICS: calibrate(module, variables, [resized(x, subnet) for x in images])}


def by_calibration(run: Run, state: TrainState, subnet: Subnet, counts: Sequence[int | str],
                   splits: Sequence[str] = ("validation", "test")) -> list[dict[str, Any]]:
  """What calibration is worth: rows with metrics of one sub-network after so many batches each.

  With 0 batches its statistics are those of the largest network, calibrated on the most batches asked
  for and cut, which is what running averages in the supernet's training would come to.

  Raises:
    ValueError: The family has no batch normalisation, or a count is negative.
  """
  if not counts or not all(str(count).isdigit() for count in counts):
    raise UserError(f"batches for calibration: got {list(counts)}, allowed are whole numbers of at least 0")
  counts = [int(count) for count in counts]
  state, supernet = local(state), run.supernet
  data = {split: held(run, split) for split in splits}
  images = calibration(run, supernet, max(*counts, 1))
  if not images:
    raise UserError(f"{type(supernet.model).__name__} has no batch normalisation to calibrate; allowed is "
                    "an evaluation without --calibration_batches")
  rows = []
  for count in counts:
    module, variables = member(run.step, state, subnet, images[:count])
    if not count:
      largest = member(run.step, state, supernet.space.largest, images)[1]
      variables |= supernet.cut({STATISTICS: largest[STATISTICS]}, subnet)
    rows.append({"subnet": str(subnet), "calibration_batches": count,
                 "calibration_images": sum(map(len, images[:count]))} |
                measure(run, module, variables, data, subnet))
  return rows


def costs(supernet: Supernet, subnet: Subnet) -> dict[str, int]:
  """Parameters, and FLOPs of one input's forward pass: of an image, or of a window of text."""
  return shared(supernet).costs(subnet)


def budget(run: Run, steps: int) -> dict[str, Any]:
  """What the first `steps` steps took: images or tokens seen, FLOPs of all passes of the network, the seed.

  FLOPs of a phase of more than 4,000 steps are those of so many of them, evenly spaced, in proportion.
  """
  batch_size, flops, start = run.config["train"]["batch_size"], 0, 0
  for phase in run.phases:
    count = min(max(steps - start, 0), phase.steps)
    flops += _flops(phase.step, start, count)
    start += phase.steps
  seen = run.task.count({name: shape for name, (shape, _) in run.dataset.entries.items()})
  return {"steps": steps, run.task.counted: steps * batch_size * seen, "train_flops": int(flops * batch_size),
          "seed": run.config.get("seed", 0)}


@functools.lru_cache(maxsize=32)
def _flops(step: Step, first: int, count: int) -> float:
  """The FLOPs of some steps of a phase; searches ask for them again and again."""
  counted = min(count, COUNTED)
  of_one = step_flops(step)
  total = sum(of_one(first + i * count // counted) for i in range(counted))
  return total if counted == count else total * count / counted


def step_flops(step: Step) -> Callable[[int], float]:
  """The function from a step's number to its FLOPs, all passes, for one image of the batch.

  The passes of the networks are counted, as the objective runs them: by default one forward of each and its
  derivative. What an objective adds of its own (heads, losses) is left out. Among
  candidates the first stands for the one that trains. Where each data shard has a sub-network of its
  own, their mean counts.
  """
  supernet, sampler = step.supernet, step.recipe.sampler
  passes = [(member_flops(supernet, p.shape), p.trained, p.taught) for p in step.recipe.passes] or [
    (member_flops(supernet), 1, 1)]

  @functools.cache
  def flops(member: Member, train: bool, taught: bool = False) -> float:
    members = member if isinstance(member, tuple) else (member,)
    counts = [(of_one, teacher if taught else student) for of_one, student, teacher in passes]
    return sum(n * of_one(m, train) for of_one, n in counts for m in members) / len(members)

  def count(number: int) -> float:
    terms = sampler.terms(number)
    trained = sum(flops(term.candidates[0], True) for term in terms)
    tried = sum(flops(c, False) for term in terms if len(term.candidates) > 1 for c in term.candidates)
    taught = flops(supernet.space.largest, False, True) if step.runs_teacher(terms) else 0
    return trained + tried + taught

  return count


def member_flops(supernet: Supernet, shape: tuple[int, ...] | None = None) -> Callable[[Subnet, bool], int]:
  """The function from a member, and whether it trains, to its FLOPs: sums over its pieces.

  Args:
    supernet: The family.
    shape: Of an input; that of the supernet's own by default.
  """
  inputs = shape and tuple(jax.ShapeDtypeStruct((x.shape[0], *shape), x.dtype) for x in supernet.inputs)
  pieces = shared(supernet, inputs)
  return lambda subnet, train: pieces.train_flops(subnet) if train else pieces.costs(subnet)["flops"]


def budget_text(row: Mapping[str, Any]) -> str:
  """One line about what a row's network took to train."""
  counted = next(task.counted for task in TASKS.values() if task.counted in row)
  return (f"{row['steps']} steps, {report.human(row[counted])} {counted}, "
          f"{report.human(row['train_flops'])} training FLOPs, seed {row['seed']}")


def calibration_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of `by_calibration` as a table for the terminal."""
  names = [name for name in rows[0] if name.endswith(metrics.main(rows[0]).name)]
  lines = [("batches", "images", *(name.replace("_", " ") for name in names))]
  for row in rows:
    batches = str(row["calibration_batches"]) if row["calibration_batches"] else "0 (the largest's, cut)"
    lines.append((batches, str(row["calibration_images"]), *(metrics.of(name).text(row[name]) for name in names)))
  return report.aligned(lines)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The columns of rows that a table of them shows."""
  measured = itertools.chain(*((f"validation_{metric.name}", metric.name) for metric in metrics.MAIN))
  columns = ("subnet", "params", "flops", "latency_ms", *measured,
             *(metric.name for metric in (*metrics.READOUTS, metrics.PERPLEXITY, metrics.AGREEMENT, metrics.KL)))
  return [{c: row[c] for c in columns if c in row} for row in rows]


def title(run: Run) -> str:
  """What a chart of the run is called."""
  return ", ".join(run.config[group]["name"] for group in ("data", "model", "recipe"))


def watch(run: Run, step: Step, state: TrainState) -> dict[str, float]:
  """Validation metrics of the extremes while training; nothing in a process that does not write."""
  state = local(state)
  if not processes.first():
    return {}
  data, space = {"validation": held(run, "validation")}, step.supernet.space
  images = calibration(run, step.supernet)
  return {f"{which}_{name}": value
          for which, subnet in (("largest", space.largest), ("smallest", space.smallest))
          for name, value in measure(run, *member(step, state, subnet, images), data, subnet).items()}
