"""Search in a trained run: which member is best within budgets, written down for `extract`."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nestnet import charts, evaluation, predict, provenance, report, runs
from nestnet.build import Run
from nestnet.errors import UserError, one_of
from nestnet.files import atomic_write
from nestnet.latency import Latency, LatencyTable
from nestnet.logs import Progress
from nestnet.pieces import shared
from nestnet.search import Problem, coarse_to_fine, evolve, fitting, front, random, searched
from nestnet.steps import TrainState
from nestnet.subnet import Subnet, folded

METHODS = ("evolution", "nsga2", "coarse_to_fine", "random")
# Those that measure what they look at, unless told otherwise.
MEASURING = ("coarse_to_fine", "random")
ACCURACIES = ("auto", "predicted", "measured")
COSTS = ("params", "flops", "latency_ms")

# Whole networks that latencies are fitted to, others that tell how well, and members whose pieces are
# timed together with them.
FITTED, CHECKED, SHOWN = 12, 20, 200
# How many of the best by prediction are measured.
VERIFIED = 8
CHARTED = 2000


def search_run(workdir: str | os.PathLike[str], out: str | os.PathLike[str], budgets: Mapping[str, float],
               method: str = "evolution", accuracy: str = "auto", costs: Sequence[str] = (),
               samples: int = 500, population: int = 100, generations: int | None = None, seed: int = 0,
               beyond_pool: bool = False, show_progress: bool = True) -> dict[str, Any]:
  """Searches the family of a run, and writes `search.json`, `search.md` and `search.png` to `out`.

  Where members outside the space's pool trained, all of the space is searched; else the pool.
  Measured accuracies are of the validation split, and kept in the run's folder with the table of
  latencies: the same search again, or another, goes on from them.

  Args:
    workdir: A run with a checkpoint.
    out: The folder to write.
    budgets: Limits by column, such as `{"flops": 1e6}`; of `COSTS`.
    method: `"evolution"`, `"nsga2"` (a front of accuracy against `costs`), `"coarse_to_fine"` or `"random"`.
    accuracy: `"predicted"`: an MLP learns from `samples` random members that are evaluated; the best by
      it are then measured. `"measured"`: every member that the search looks at. `"auto"`: measured for
      `"coarse_to_fine"`, `"random"` and where the family has no more than `samples` members.
    costs: What the front is against; by default those with a budget, or FLOPs.
    samples: Members that the predictor learns from, of which a fifth (at most 100) only tests it.
    population: Members of a generation; for `"random"` all that are drawn, in one.
    generations: How many; by default 500, for `"nsga2"` 40, for `"coarse_to_fine"` 5.
    seed: Of the search, of the sample and of the predictor.
    beyond_pool: Whether the whole space is searched even where only its pool trained.
    show_progress: Whether to show how many members are evaluated.

  Returns:
    What `search.json` holds: `subnet` (text) and `row` of the best, `found` (rows of all that were
    measured at the end: for `"nsga2"` the front), how it was searched, and the predictor's quality. In
    the file a number that is not finite is null.

  Raises:
    ValueError: An unknown name, a number out of range, budgets that nothing fits, or a family too small
      for a predictor.
  """
  for what, got, allowed in (("method", method, METHODS), ("accuracy", accuracy, ACCURACIES),
                             *(("cost", name, COSTS) for name in (*costs, *budgets))):
    if got not in allowed:
      raise one_of(what, got, allowed)
  for name, limit in budgets.items():
    if not limit > 0:
      raise UserError(f"budget of {name}: got {limit:g}, allowed is more than 0")
  for what, got, least in (("samples", samples, 20), ("population", population, 4),
                           ("generations", 1 if generations is None else generations, 1)):
    if got < least:
      raise UserError(f"{what}: got {got}, allowed is at least {least}")
  if not budgets and method != "nsga2":
    raise UserError("give a budget: any of --max_params, --max_flops, --max_latency_ms; without one the "
                    "largest is the best. --method=nsga2 needs none")
  run, step, state = runs.opened(workdir)
  family = _Searched(run, step, state, pathlib.Path(workdir), seed, beyond_pool, show_progress)
  # The first cost is the horizontal axis of the chart.
  against = list(costs or budgets or ("flops",))
  wanted = list(dict.fromkeys([*against, *budgets, "params", "flops"]))
  measured = accuracy == "measured" or (accuracy == "auto" and (
    method in MEASURING or family.small(samples)))
  sample = [] if measured else family.sample(samples)
  quality: dict[str, Any] = {}
  functions = family.costs(wanted)
  # Whether anything fits is said before time is spent on a predictor.
  probe = Problem(family.space, family.measured, functions, budgets)
  if budgets and probe.listed(population) is None:
    fitting(probe, population, np.random.default_rng(seed))
  ask = family.measured if measured else family.predictor(sample, quality)
  problem = Problem(family.space, ask, functions, budgets)
  found = _found(problem, method, against, population, generations, seed, measured)
  rows = family.rows(found, problem)
  best = max(rows, key=lambda r: (r["validation_accuracy"], -r[against[0]]))
  result = {
    "subnet": best["subnet"], "row": best, "found": rows, "method": method, "budgets": dict(budgets),
    "accuracy": "measured" if measured else "predicted", "seed": seed, "searched": searched(family.space),
    "members_looked_at": len(problem.seen), "run": str(workdir), "step": step, "steps": run.steps} | {
      k: v for k, v in (("predictor", quality), ("latency", family.latency_report)) if v}
  _write(pathlib.Path(out), result, problem, against[0], evaluation.title(run))
  return result


def _found(problem: Problem, method: str, against: Sequence[str], population: int, generations: int | None,
           seed: int, measured: bool) -> list[Subnet]:
  """The members that are worth measuring: the front, or the best by accuracy."""
  if method == "nsga2":
    trials = population * (40 if generations is None else generations)
    return [c.subnet for c in front(problem, against, population=population, trials=trials, seed=seed)]
  if method == "evolution":
    best = evolve(problem, population=population, seed=seed,
                  generations=500 if generations is None else generations)
  elif method == "random":
    best = random(problem, population=population, seed=seed)
  else:
    best = coarse_to_fine(problem, population=population, seed=seed,
                          generations=5 if generations is None else generations)
  if measured:
    return [best.subnet]
  ranked = sorted(problem.seen.values(), key=lambda c: (-c.accuracy, str(c.subnet)))
  return [c.subnet for c in ranked[:VERIFIED]]


class _Searched:
  """A run as a search sees it."""

  def __init__(self, run: Run, step: int, state: TrainState, workdir: pathlib.Path, seed: int,
               beyond_pool: bool, show_progress: bool):
    self.run, self.step, self.state, self.workdir, self.seed = run, step, state, workdir, seed
    space = run.supernet.space
    # Where all of it trained, the pool is only what a table shows.
    self.space = space.without_pool() if beyond_pool or provenance.whole(run, step) else space
    self.progress = Progress(0, label="evaluate") if show_progress else None
    self.latency_report: dict[str, Any] = {}

  def small(self, samples: int) -> bool:
    try:
      return bool(self.space.pool) or self.space.size <= samples
    except UserError:
      return False

  def costs(self, names: Sequence[str]) -> dict[str, Callable[[Subnet], float]]:
    pieces = shared(self.run.supernet)
    functions: dict[str, Callable[[Subnet], float]] = {
      "params": lambda m: pieces.costs(m)["params"], "flops": lambda m: pieces.costs(m)["flops"]}
    if "latency_ms" in names:
      functions["latency_ms"] = self._latency()
    return {name: functions[name] for name in names}

  def _latency(self) -> Latency:
    latency = Latency(self.run.supernet, LatencyTable(self.workdir / "latency.json"))
    whole = self.run.supernet.space.without_pool()
    ends = [whole.smallest, whole.largest]
    drawn = [m for m in predict.drawn(whole, SHOWN) if m not in ends]
    fitted, checked = [*ends, *drawn[:FITTED - 2]], drawn[FITTED - 2:][:CHECKED]
    latency.measure([*ends, *drawn], [*fitted, *checked])
    latency.fit(fitted)
    if checked:
      error = latency.error(checked)
      self.latency_report = {
        "device": latency.table.device, "median_error": error.median, "largest_error": error.largest,
        "within_15_percent": error.within, "networks": len(checked)}
    return latency

  def measured(self, members: list[Subnet]) -> list[float]:
    """Validation accuracies of members, from the run's file or evaluated."""
    rows = predict.evaluated(
      self.workdir / f"members_{self.step}.jsonl", members,
      lambda some: evaluation.evaluate(self.run, self.state, some, splits=("validation",),
                                       expected=len(members)), progress=self.progress)
    return [row["validation_accuracy"] for row in rows]

  def sample(self, samples: int) -> list[Subnet]:
    """Members for a predictor, or why there can be none."""
    members = predict.drawn(self.space, samples, self.seed)
    if len(members) - _held(members) < predict.LEAST:
      raise UserError(
        f"accuracy predicted: the predictor learns from at least {predict.LEAST} sub-networks, and a fifth "
        f"test it; there are {len(members)}: {searched(self.space)}. Allowed: --accuracy=measured")
    return members

  def predictor(self, members: list[Subnet], quality: dict[str, Any]) -> predict.Predictor:
    accuracies, held = self.measured(members), _held(members)
    made = predict.train(self.space, members[held:], accuracies[held:], self.seed)
    quality.update(predict.quality(made(members[:held]), accuracies[:held]), held_out=held,
                   learned_from=len(members) - held)
    return made

  def rows(self, members: list[Subnet], problem: Problem) -> list[dict[str, Any]]:
    """Members measured on both splits, with what the search took them for."""
    if self.progress:
      self.progress.close()
    return [{**row, **problem.seen[m].costs, "searched_accuracy": problem.seen[m].accuracy}
            for m, row in zip(members, evaluation.evaluate(
              self.run, self.state, members, show_progress=self.progress is not None))]


def _held(members: Sequence[Subnet]) -> int:
  """How many of a sample, the first, only test a predictor."""
  return min(100, len(members) // 5)


def _json(value: Any) -> Any:
  """What JSON can hold of a result."""
  if isinstance(value, Mapping):
    return {key: _json(v) for key, v in value.items()}
  if isinstance(value, list):
    return [_json(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(out: pathlib.Path, result: Mapping[str, Any], problem: Problem, cost: str, title: str) -> None:
  metric = f"{result['accuracy']}_accuracy"
  every, found = list(problem.seen.values()), {row["subnet"] for row in result["found"]}
  candidates = [c for i, c in enumerate(every)
                if i % -(-len(every) // CHARTED) == 0 or str(c.subnet) in found]
  points = [{"subnet": str(c.subnet), metric: c.accuracy, **c.costs} for c in candidates]
  atomic_write(out / "search.json", json.dumps(_json(result), indent=2, allow_nan=False) + "\n")
  atomic_write(out / "search.md", f"{summary(result)}\n\n{table(result)}\n")
  charts.pareto_chart(
    out / "search.png", points, cost=cost, metric=metric, title=f"{title}: {result['method']}",
    found=result["subnet"], budget=f"found: {folded(result['subnet']).replace(',', ', ')}; {len(every)} "
    f"members looked at; {evaluation.budget_text(result['row'])}")


def table(result: Mapping[str, Any]) -> str:
  """The measured members of a result."""
  return report.table(evaluation.shown(result["found"]))


def summary(result: Mapping[str, Any]) -> str:
  """What was searched and how well its predictions held, in a few lines."""
  budgets = ", ".join(f"{name} of at most {limit:g}" for name, limit in result["budgets"].items()) or "none"
  lines = [f"{result['method']}, {result['accuracy']} accuracy, budgets: {budgets}, seed {result['seed']}; "
           f"{result['members_looked_at']} members looked at, at step {result['step']} of {result['steps']}",
           f"searched: {result['searched']}"]
  if quality := result.get("predictor"):
    order = "" if quality["kendall_tau"] else " (it orders nothing)"
    lines.append(f"predictor: Kendall's tau {quality['kendall_tau']:.3f}{order}, "
                 f"RMSE {100 * quality['rmse']:.2f} points on {quality['held_out']} held-out members, "
                 f"learned from {quality['learned_from']}")
  if latency := result.get("latency"):
    lines.append(f"latency from a table: {100 * latency['median_error']:.0f}% off in the median, "
                 f"{100 * latency['largest_error']:.0f}% at most, {100 * latency['within_15_percent']:.0f}% "
                 f"within 15%, on {latency['networks']} whole networks ({latency['device']})")
  return "\n".join(lines)
