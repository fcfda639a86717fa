"""Recipes side by side: who trains, for how long, and the page that says what came.

Every run has a folder of its own, `runs/<recipe>/<steps>_steps/<its network>/seed<k>`, so that the
same call does only what is missing.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from nestnet import build, charts, cli, evaluation, metrics, references, report, runs
from nestnet.errors import UserError, one_of
from nestnet.files import atomic_write
from nestnet.jobs import BASELINE, Task, train_all
from nestnet.sampling import FIXED_LIMIT
from nestnet.subnet import Subnet, kind_of
from nestnet.timing import hardware

SHARES = "equal shares"
BUDGETS = ("equal steps", "equal FLOPs", SHARES)
USUAL = BUDGETS[:2]
_SHARED = ("model", "space", "data", "train.steps", "train.batch_size")


def compare(configs: Sequence[Mapping[str, Any]], seeds: int, out: str | os.PathLike[str],
            budgets: Sequence[str] = USUAL, docs: str | os.PathLike[str] | None = None,
            jobs: int = 1, command: str = "") -> str | None:
  """Trains what is missing, then writes `results.json`, a page and its charts.

  Args:
    configs: One for each recipe. That of the recipe `separate` stands for one run for each size.
      Configs that compare the same sizes are a family, with tables and a chart of its own.
    seeds: Runs of each kind, at seeds `config.seed`, `config.seed + 1`, ...
    out: Gets `runs/`, `results.json` and the page.
    budgets: `"equal steps"`: each run makes `train.steps`. `"equal FLOPs"`: a nested run makes as
      many steps as take the training FLOPs of all separate runs together. `"equal shares"`: the other way
      round, each of n separate runs makes as many as take an n-th of the FLOPs of the first nested config's.
    docs: The page, `.md`; charts stand beside it. By default in `out`, named like that.
    jobs: Processes that train at a time, each on its share of the cores.
    command: What the page names as its command.

  Returns:
    The tables as Markdown; None after SIGTERM, when the same call goes on.

  Raises:
    ValueError: The configs are wrong or do not go together, or folders hold other runs.
    Failure: Runs failed; what is done stays.
  """
  out = pathlib.Path(out)
  page = pathlib.Path(docs) if docs else out / f"{out.resolve().name}.md"
  if page.suffix != ".md":
    raise UserError(f"page {page}: allowed is a name that ends in .md")
  tasks = plan(configs, seeds, out, budgets)
  _settled(tasks)
  if not train_all(tasks, jobs):
    return None
  results, beside = gather(tasks, budgets), untrained(tasks, out / "runs" / "references")
  atomic_write(out / "results.json", json.dumps({
    "command": command, "hardware": hardware(), "jobs": jobs, "results": results} | (
      {"references": [{"family": list(family), "rows": seeds} for family, seeds in beside.items()]}
      if beside else {}), indent=1) + "\n")
  return write_page(page, results, tasks, jobs, command, beside)


def override(config: ml_collections.ConfigDict, text: str) -> None:
  """Sets one value of a config from `key=value`, as `--config.key=value` does.

  Raises:
    ValueError: An unknown key, or a value of another type.

  Example:
    >>> config = ml_collections.ConfigDict({"train": {"steps": 600}})
    >>> override(config, "train.steps=400")
    >>> config.train.steps
    400
  """
  key, equals, value = text.partition("=")
  if not equals:
    raise UserError(f"override {text!r}; allowed: key=value, such as train.steps=400")
  cli.check_override(config, key, value)
  # A command line of its own, so that every text means what it means there.
  argv, values = ["override", f"--config.{text}"], flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
  except flags.Error as error:
    raise UserError(f"override {text!r}: {error}") from None


def plan(configs: Sequence[Mapping[str, Any]], seeds: int, out: str | os.PathLike[str],
         budgets: Sequence[str] = USUAL) -> list[Task]:
  """The runs of a comparison, whether done or not, seed by seed.

  Raises:
    ValueError: An unknown budget, no seeds, configs that do not go together.
  """
  for budget in budgets:
    if budget not in BUDGETS:
      raise one_of("budget", budget, BUDGETS)
  if seeds < 1 or not budgets or not configs:
    raise UserError(f"a comparison needs configs, budgets and seeds; got {len(configs)} configs, "
                    f"{len(budgets)} budgets, seeds={seeds}")
  tasks = []
  for family, group in _families(configs).items():
    tasks += _plan_family(family, group, seeds, pathlib.Path(out) / "runs", budgets)
  return sorted(tasks, key=lambda task: task.seed)


def _families(configs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
  """Configs by the sizes that they compare."""
  families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
  for config in map(build.plain, configs):
    run = _whole(config) if config["recipe"]["name"] == BASELINE else build.build(config)
    space = run.supernet.space
    # With what a run records of its data, so that a folder is of the same one.
    config = config | {"data": run.config["data"]}
    if run.also:
      config["eval"] = config["eval"] | {"members": list(map(str, run.also))}
    if not space.pool and space.size > FIXED_LIMIT:
      raise UserError(f"the space of {config['recipe']['name']} has {space.size} members and no pool; "
                      f"name the sizes to compare in space.pool (at most {FIXED_LIMIT} without one)")
    group = families.setdefault(tuple(map(str, space.pool or space)), [])
    for other in group:
      _check_pair(other, config)
    group.append(config)
  return families


def _check_pair(one: dict[str, Any], other: dict[str, Any]) -> None:
  """Two recipes differ in how they train, not in what."""
  names = [config["recipe"]["name"] for config in (one, other)]
  if names[0] == names[1]:
    raise UserError(f"two configs have recipe.name={names[0]!r}; each recipe is compared once")
  for key in _SHARED:
    values = []
    for config in (one, other):
      for part in key.split("."):
        config = config[part]
      values.append(config)
    _check_equal(names, key, *values)
  if BASELINE not in names:
    _check_equal(names, "eval.members", *(sorted(_members(config)) for config in (one, other)))


def _check_equal(names: Sequence[str], key: str, one: Any, other: Any) -> None:
  if one != other:
    raise UserError(f"{names[0]} and {names[1]} differ in config.{key}: {one} and {other}; "
                    "allowed are equal ones")


def _members(config: Mapping[str, Any]) -> list[str]:
  """What a config's tables show beside the sizes of its family."""
  return (config.get("eval") or {}).get("members") or []


def _plan_family(family: tuple[str, ...], group: list[dict[str, Any]], seeds: int, root: pathlib.Path,
                 budgets: Sequence[str]) -> Iterator[Task]:
  alone = [c for c in group if c["recipe"]["name"] == BASELINE]
  if "equal FLOPs" in budgets and not alone:
    raise UserError(f"equal FLOPs are those of the recipe {BASELINE!r}, which no config with the sizes "
                    f"{'; '.join(family)} has; name one, or give --budgets='equal steps'")
  if SHARES in budgets and not 0 < len(alone) < len(group):
    raise UserError(f"{SHARES} are those of a nested run among runs of the recipe {BASELINE!r}; with the sizes "
                    f"{'; '.join(family)} there are {len(group) - len(alone)} and {len(alone)} configs")
  nested = [config for config in group if config not in alone]
  counts = [list(_flops_of_steps(config, seeds)) for config in nested]
  spent: collections.Counter[int] = collections.Counter()
  for size in family if alone else ():
    own = alone[0] | {"recipe": alone[0]["recipe"] | {"subnet": size}}
    for k, (seed, flops) in enumerate(_flops_of_steps(own, seeds)):
      spent[k] += flops(own["train"]["steps"])
      share = counts[0][k][1](own["train"]["steps"]) / len(family) if SHARES in budgets else 0
      steps_of = lambda budget: own["train"]["steps"] if budget != SHARES else _steps_for(flops, share, 1)
      yield from _of_budgets(own, seed, root, family, (size,), size, budgets, steps_of, flops)
  for config, of_seeds in zip(nested, counts):
    sizes = tuple(dict.fromkeys([*family, *_members(config)]))
    for k, (seed, flops) in enumerate(of_seeds):
      steps_of = lambda budget: config["train"]["steps"] if budget != "equal FLOPs" else _steps_for(
        flops, spent[k], len(config.get("phases") or [0]))
      yield from _of_budgets(config, seed, root, family, sizes, "+".join(_axes(family)), budgets, steps_of, flops)


def _of_budgets(config: dict[str, Any], seed: int, root: pathlib.Path, family: tuple[str, ...],
                sizes: tuple[str, ...], network: str, budgets: Sequence[str], steps_of: Callable[[str], int],
                flops: Callable[[int], float]) -> Iterator[Task]:
  """A run for each number of steps that the budgets come to."""
  by_steps: dict[int, list[str]] = {}
  for budget in budgets:
    by_steps.setdefault(steps_of(budget), []).append(budget)
  for steps, names in by_steps.items():
    own = config | {"train": config["train"] | {"steps": steps}}
    yield _task(own, seed, root, family, sizes, network, tuple(names), flops(steps))


def _axes(family: tuple[str, ...]) -> list[str]:
  return list(Subnet.parse(family[0]))


def _kinds(family: tuple[str, ...]) -> list[str]:
  """Its axes, those of all stages in one."""
  return list(dict.fromkeys(map(kind_of, _axes(family))))


def _task(config: dict[str, Any], seed: int, root: pathlib.Path, family: tuple[str, ...],
          sizes: tuple[str, ...], network: str, budgets: tuple[str, ...], flops: float) -> Task:
  recipe, steps = config["recipe"]["name"], config["train"]["steps"]
  return Task(recipe, budgets, seed, family, sizes, config | {"seed": seed},
              root / recipe / f"{steps}_steps" / network / f"seed{seed}", flops)


def _flops_of_steps(config: dict[str, Any], seeds: int) -> Iterator[tuple[int, Callable[[int], float]]]:
  """For each seed, the function from a number of steps to the FLOPs of a run of so many, whole batches."""
  first, run = config.get("seed", 0), None
  for seed in range(first, first + seeds):
    # Where nothing is random, all seeds cost the same.
    if run is None or not all(phase.step.recipe.sampler.fixed for phase in run.phases):
      run = build.build(config | {"seed": seed})
    yield seed, functools.partial(_run_flops, config, [
      functools.cache(evaluation.step_flops(phase.step)) for phase in run.phases])


def _run_flops(config: dict[str, Any], counts: Sequence[Callable[[int], float]], steps: int) -> float:
  total, start = 0.0, 0
  for count, length in zip(counts, build.phase_steps(config, steps)):
    total += sum(map(count, range(start, start + length)))
    start += length
  return config["train"]["batch_size"] * total


def _steps_for(flops: Callable[[int], float], budget: float, least: int) -> int:
  """The number of steps whose FLOPs come closest to a budget.

  Args:
    flops: From a number of steps to the FLOPs of a run.
    budget: FLOPs.
    least: The smallest number that is allowed.
  """
  steps, miss = least, lambda steps: abs(flops(steps) - budget)
  for _ in range(32):
    guess = max(least, round(steps * budget / flops(steps)))
    if guess == steps:
      break
    steps = guess
  while steps > least and miss(steps - 1) < miss(steps):
    steps -= 1
  while miss(steps + 1) < miss(steps):
    steps += 1
  return steps


def _settled(tasks: Sequence[Task]) -> None:
  """Says what is wrong with any folder before the first run starts."""
  for task in tasks:
    if task.workdir.exists():
      # Only the config is compared; building every run would take longer than many of them.
      runs.settle(task.config, task.workdir)


def gather(tasks: Sequence[Task], budgets: Sequence[str] = USUAL) -> list[dict[str, Any]]:
  """One record for each family, budget, recipe and size, with a list entry for each seed."""
  rows = {task.workdir: {row["subnet"]: row for row in report.read_rows(task.workdir / "subnets.json")}
          for task in tasks}
  records = []
  for family in dict.fromkeys(task.family for task in tasks):
    for budget in budgets:
      mine = [task for task in tasks if task.family == family and budget in task.budgets]
      for recipe in dict.fromkeys(task.recipe for task in mine):
        own = [task for task in mine if task.recipe == recipe]
        for size in dict.fromkeys(size for task in own for size in task.sizes):
          cells = {t.seed: rows[t.workdir][size] for t in own if size in t.sizes}
          metric = metrics.main(cells[min(cells)]).name
          records.append({
            "family": list(family), "budget": budget, "recipe": recipe, "subnet": size,
            **{key: cells[min(cells)][key] for key in ("params", "flops")}, "seeds": sorted(cells),
            **{key: [cells[seed][key] for seed in sorted(cells)] for key in (
              metric, f"validation_{metric}", *_beside(cells[min(cells)]), "steps", "train_flops", "seconds")}})
  return records


def _beside(row: Mapping[str, Any]) -> list[str]:
  """The metrics that are shown beside the main one."""
  return [metric.name for metric in metrics.READOUTS if metric.name in row]


def untrained(tasks: Sequence[Task], folder: pathlib.Path
              ) -> dict[tuple[str, ...], list[list[dict[str, Any]]]]:
  """The references of each family, seed by seed; none where its task has none.

  Args:
    tasks: The runs of a comparison.
    folder: Keeps the rows of each family and seed.
  """
  found: dict[tuple[str, ...], list[list[dict[str, Any]]]] = {}
  for family in dict.fromkeys(task.family for task in tasks):
    configs = {task.seed: task.config for task in tasks if task.family == family}
    if not _whole(configs[min(configs)]).task.fit:
      continue
    for seed in sorted(configs):
      path = folder / "+".join(_axes(family)) / f"seed{seed}.json"
      if not path.exists():
        run = _whole(configs[seed])
        members = list(map(run.supernet.space.subnet, family))
        report.write_rows(path, references.references(run, members, ("test",)))
      found.setdefault(family, []).append(report.read_rows(path))
  return found


def _whole(config: Mapping[str, Any]) -> build.Run:
  """The run of a whole family, even where the config's is of one size alone."""
  return build.build(config | {"recipe": {k: v for k, v in config["recipe"].items() if k != "subnet"}})


def result(record: Mapping[str, Any], metric: str = "") -> report.Result:
  """A record as tables and charts take it; steps and FLOPs are means over seeds.

  Args:
    record: As from `gather`.
    metric: Which of its metrics; by default the main one.
  """
  mean, metric = lambda values: sum(values) / len(values), metric or metrics.main(record).name
  return report.Result(
    recipe=record["recipe"], budget=record["budget"], subnet=record["subnet"], params=record["params"],
    flops=record["flops"], accuracies=tuple(record[metric]),
    train_flops=mean(record["train_flops"]), steps=round(mean(record["steps"])), metric=metric)


def write_page(page: pathlib.Path, records: Sequence[Mapping[str, Any]], tasks: Sequence[Task],
               jobs: int, command: str,
               beside: Mapping[tuple[str, ...], Sequence[Sequence[Mapping[str, Any]]]] | None = None) -> str:
  """Writes the page and one chart for each family; returns the tables.

  Args:
    page: Where to.
    records: As from `gather`.
    tasks: The runs.
    jobs: How many trained at a time.
    command: What the page names as its command.
    beside: As from `untrained`.
  """
  config, recipe_names = tasks[0].config, list(dict.fromkeys(t.recipe for t in tasks))
  seeds = sorted({task.seed for task in tasks})
  text, tables = [f"# Recipes on {config['data']['name']}: {', '.join(recipe_names)}", ""], []
  if command:
    text += ["```", command, "```", ""]
  text += [f"- {len(tasks)} runs: {len(recipe_names)} recipe{'s' * (len(recipe_names) > 1)}, "
           f"seeds {', '.join(map(str, seeds))}, "
           f"batch {config['train']['batch_size']}; {config['model']['name']}, "
           f"{config['optim']['name']}",
           f"- {hardware()}",
           f"- {_minutes(tasks)} of training and evaluation, added over the runs; {jobs} at a time",
           "- Steps and training FLOPs of recipes that draw at random are means over seeds."]
  if "sha256" in config["data"]:
    text.append(f"- {config['data']['name']}: sha256 {config['data']['sha256']}")
  for number, family in enumerate(dict.fromkeys(task.family for task in tasks)):
    own = [record for record in records if tuple(record["family"]) == family]
    results = [result(record) for record in own]
    axes = ", ".join(_kinds(family))
    chart = page.with_name("_".join([page.stem, *(_kinds(family) if number else [])]) + ".png")
    shared = f"{len(seeds)} seeds, batch {config['train']['batch_size']}, mean and 95% interval"
    charts.compare_chart(chart, results, f"{config['data']['name']}: sizes along {axes}", shared)
    part = [report.compare_table(results)]
    if BASELINE in {r.recipe for r in results} and len({r.recipe for r in results}) > 1:
      part.append(report.difference_table(results, BASELINE))
    part += [report.compare_table([result(record, metric) for record in own]) for metric in _beside(own[0])
             if all(metric in record for record in own)]
    if family in (beside or {}):
      part.append(references.table(beside[family]))
    title = report.sentence(metrics.of(results[0].metric).title)
    text += ["", f"## Sizes along {axes}", "", f"![{title} against size]({chart.name})", "", *(
      "\n\n".join(part).split("\n"))]
    tables += [f"## Sizes along {axes}", *part]
  atomic_write(page, "\n".join(text) + "\n")
  return "\n\n".join(tables)


def _minutes(tasks: Sequence[Task]) -> str:
  seconds = sum(report.read_rows(task.workdir / "subnets.json")[0]["seconds"] for task in tasks)
  return f"{seconds / 60:.1f} minutes"
