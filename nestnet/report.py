"""What users read: rows of subnets as files and tables, and comparisons of recipes.

A row is a dict with `subnet` (text form), `params`, `flops`, and metrics by name. `nestnet.metrics` says of
each which direction is better and how it is shown: those whose name ends in `accuracy` are fractions
from 0 to 1, in percent. Tables say equal sizes of all stages once, as `Space.subnet` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
from scipy import special

from nestnet import errors
from nestnet import files
from nestnet import metrics
from nestnet.subnet import folded

Row = Mapping[str, Any]
_KEYS = ("subnet", "params", "flops")


@dataclasses.dataclass(frozen=True)
class Result:
  """Test accuracy, or another metric, of one subnet under one recipe and budget.

  Attributes:
    recipe: name of the recipe.
    budget: what the recipes have in common: `equal steps` or `equal FLOPs`.
    subnet: text form of the subnet.
    params: parameters of the subnet.
    flops: forward FLOPs of the subnet for one input.
    accuracies: values of the metric (accuracies are fractions from 0 to 1), one for each seed, in the same
      order in all results.
    train_flops: training FLOPs, for one seed, of the run that the subnet comes from.
    steps: steps of that run.
    metric: name of the metric.
  """

  recipe: str
  budget: str
  subnet: str
  params: int
  flops: int
  accuracies: tuple[float, ...]
  train_flops: float
  steps: int
  metric: str = "accuracy"


def human(count: float) -> str:
  """Formats a count with a decimal unit.

  Example:
    >>> human(950), human(12_340), human(999_960), human(1.5e12)
    ('950', '12.3k', '1.0M', '1.5T')
  """
  for unit in ("", "k", "M", "G", "T", "P", "E"):
    text = f"{count:.1f}{unit}" if unit else f"{count:.0f}"
    if abs(count) < (999.95 if unit else 999.5):
      return text
    count /= 1000
  return text


def interval(values: Sequence[float]) -> tuple[float, float]:
  """The mean over seeds and the half-width of its 95% interval (Student's t).

  Args:
    values: one value for each seed.

  Returns:
    The mean, and the half-width: nan for a single value.

  Raises:
    ValueError: there are no values.

  Example:
    >>> interval([0.9, 1.0])
    (0.95, 0.635...)
  """
  count = len(values)
  if not count:
    raise ValueError("an interval needs at least one value, got none")
  mean = float(np.mean(values))
  if count == 1:
    return mean, math.nan
  error = float(np.std(values, ddof=1)) / math.sqrt(count)
  return mean, float(special.stdtrit(count - 1, 0.975)) * error


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
  """The mean of `a - b` over seeds and the half-width of its 95% interval.

  What a seed does to both sides alike cancels, so this interval is often much tighter than those
  of the two means.

  Args:
    a: one value for each seed.
    b: values of the same seeds, in the same order.

  Raises:
    ValueError: the numbers of values differ, or there are none.

  Example:
    >>> paired_difference([0.5, 0.75], [0.25, 0.5])
    (0.25, 0.0)
  """
  if len(a) != len(b):
    raise ValueError(f"a paired difference needs the same seeds on both sides, got {len(a)} values "
                     f"and {len(b)}")
  return interval(np.subtract(a, b))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
  """Replaces a JSON file of rows atomically.

  Raises:
    ValueError: a row lacks `subnet`, `params` or `flops`, or a value is not finite.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "subnets.json"
    >>> write_rows(path, [{"subnet": "layers=2", "params": 10, "flops": 20, "accuracy": 0.5}])
    >>> read_rows(path)[0]["accuracy"]
    0.5
  """
  rows = [_checked(row, path) for row in rows]
  lines = [json.dumps(row, allow_nan=False, default=lambda array: array.item()) for row in rows]
  files.atomic_write(path, "[\n  " + ",\n  ".join(lines) + "\n]\n" if lines else "[]\n")


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows that `write_rows` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged or holds something else.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.MissingFileError(
        f"no rows of subnets at {path}: run experiments.train or experiments.evaluate first")
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise errors.UserError(
        f"{path} is damaged, not JSON ({error}): run experiments.evaluate to write it again"
    ) from error
  if not isinstance(rows, list):
    raise errors.UserError(f"{path} must hold a list of rows, got {type(rows).__name__}")
  return [_checked(row, path) for row in rows]


def table(rows: Sequence[Row]) -> str:
  """An aligned plain-text table for the terminal, smallest subnet first.

  Example:
    >>> print(table([{"subnet": "layers=2", "params": 12_300, "flops": 1.2e6, "accuracy": 0.973},
    ...              {"subnet": "layers=1", "params": 950, "flops": 2e3, "accuracy": 0.9}]))
    subnet    params  FLOPs  accuracy
    layers=1     950   2.0k     90.0%
    layers=2   12.3k   1.2M     97.3%
  """
  return aligned(_cells(rows))


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells as plain text: the first column to the left, the others to the right.

  Example:
    >>> print(aligned([("size", "ms"), ("a", "12.5")]))
    size    ms
    a     12.5
  """
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
      "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
      for line in lines)


def pareto(rows: Iterable[Row], cost: str = "flops", metric: str = "accuracy") -> list[Row]:
  """The rows that no other row beats, cheapest first.

  A row is on the front if every other one costs more or has a worse metric. Of equal ones the
  first is kept.

  Args:
    rows: the candidates.
    cost: key of what should be small.
    metric: key of what should be large, or small where `nestnet.metrics` says so.

  Raises:
    ValueError: a row lacks one of the two keys.

  Example:
    >>> rows = [{"flops": 3, "accuracy": .8}, {"flops": 1, "accuracy": .7},
    ...         {"flops": 2, "accuracy": .6}]
    >>> [row["flops"] for row in pareto(rows)]
    [1, 3]
  """
  rows = list(rows)
  _require(rows, (cost, metric))
  front, best, score = [], -math.inf, metrics.of(metric).score
  for row in sorted(rows, key=lambda row: (row[cost], -score(row[metric]))):
    if score(row[metric]) > best:
      front.append(row)
      best = score(row[metric])
  return front


def compare_table(results: Sequence[Result]) -> str:
  """Means with 95% intervals as Markdown: for each budget a table and what it took.

  Rows are subnets, small to large; columns are recipes; the best mean of a row is bold.

  Raises:
    ValueError: no results, or two of the same recipe, budget and subnet.
  """
  sections = []
  for budget, grid in by_budget(results).items():
    lines, metric = [["subnet", "params", "FLOPs", *grid.recipes]], grid.metric
    as_shown = lambda mean: round(metric.score(mean) * metric.scale * 10 ** (metric.decimals or 0))
    for size in grid.sizes:
      cells = grid.row(size, lambda result: interval(result.accuracies))
      best = max(as_shown(mean) for mean, _ in cells.values())
      lines.append([folded(size[2]), human(size[0]), human(size[1])] + [
          estimate(cells.get(recipe), metric, lambda mean, _: as_shown(mean) == best)
          for recipe in grid.recipes])
    spent = [f"- {recipe}: {_spent(grid.of(recipe))}" for recipe in grid.recipes]
    sections.append("\n".join([
        f"### {sentence(budget)}", "", f"Test {metric.in_tables}, mean ± 95% interval over seeds.",
        "", markdown_table(lines), "", *spent]))
  return "\n\n".join(sections)


def difference_table(results: Sequence[Result], baseline: str = "separate") -> str:
  """Paired differences to a baseline as Markdown, in points or in the metric's unit, seed by seed.

  Differences whose 95% interval excludes zero are bold. Subnets that the baseline has not are left out.

  Raises:
    ValueError: no results, duplicates, an unknown baseline, or seeds that do not pair up.
  """
  sections = []
  for budget, grid in by_budget(results).items():
    if baseline not in grid.recipes:
      raise errors.one_of(f"baseline at {budget}", baseline, grid.recipes)
    others = [recipe for recipe in grid.recipes if recipe != baseline]
    lines = [["subnet", "params", *others]]
    for size in grid.sizes:
      reference = grid.cells.get((baseline, size))
      if reference is None:
        continue
      cells = grid.row(size, lambda result: paired_difference(result.accuracies, reference.accuracies))
      lines.append([folded(size[2]), human(size[0])] + [
          estimate(cells.get(recipe), grid.metric, lambda mean, half: abs(mean) > half, "+z")
          for recipe in others])
    sections.append("\n".join([
        f"### {sentence(budget)}: difference to {baseline}", "",
        f"{_differences(grid.metric, baseline)}, paired by seed, mean ± 95% interval; bold: the interval "
        "excludes zero.", "", markdown_table(lines)]))
  return "\n\n".join(sections)


@dataclasses.dataclass(frozen=True)
class Grid:
  """The results of one budget.

  Attributes:
    recipes: names, in the order of the results.
    sizes: `(params, flops, subnet)` of every subnet, small to large.
    cells: the result of a recipe at a size, where there is one.
  """

  recipes: tuple[str, ...]
  sizes: tuple[tuple[int, int, str], ...]
  cells: Mapping[tuple[str, tuple[int, int, str]], Result]

  @property
  def metric(self) -> metrics.Metric:
    """What the results measure."""
    return metrics.of(next(iter(self.cells.values())).metric)

  def of(self, recipe: str) -> list[Result]:
    """The results of a recipe, small to large."""
    return [self.cells[recipe, size] for size in self.sizes if (recipe, size) in self.cells]

  def row(self, size: tuple[int, int, str], value: Callable[[Result], Any]) -> dict[str, Any]:
    """A value of every recipe that has a result at a size."""
    return {recipe: value(self.cells[recipe, size])
            for recipe in self.recipes if (recipe, size) in self.cells}


def by_budget(results: Iterable[Result]) -> dict[str, Grid]:
  """Sorts results into one grid for each budget, in the order of the results.

  Raises:
    ValueError: no results, or two of the same recipe, budget and subnet.
  """
  cells: dict[str, dict[tuple[str, tuple[int, int, str]], Result]] = {}
  for result in results:
    key = result.recipe, (result.params, result.flops, result.subnet)
    if key in cells.setdefault(result.budget, {}):
      raise ValueError(f"two results of recipe {result.recipe!r} at {result.budget} for subnet "
                       f"{result.subnet!r}: collect its seeds in one")
    cells[result.budget][key] = result
  if not cells:
    raise ValueError("a comparison needs at least one result, got none")
  return {
      budget: Grid(recipes=tuple(dict.fromkeys(recipe for recipe, _ in grid)),
                   sizes=tuple(sorted({size for _, size in grid})), cells=grid)
      for budget, grid in cells.items()}


def sentence(text: str) -> str:
  """Capitalises the first letter only: `equal FLOPs` becomes `Equal FLOPs`."""
  return text[:1].upper() + text[1:]


def _require(rows: Iterable[Row], keys: Sequence[str]) -> None:
  for row in rows:
    for key in keys:
      if key not in row:
        raise errors.one_of(f"value of {row.get('subnet', 'a row')}:", key, row)


def _checked(row: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
  if not (isinstance(row, Mapping) and all(key in row for key in _KEYS)
          and isinstance(row["subnet"], str)):
    raise errors.UserError(
        f"a row of {path} needs subnet (text), params and flops (numbers), got {row!r}")
  return dict(row)


def _cells(rows: Sequence[Row]) -> list[list[str]]:
  """The header and the rows as text, sorted by parameters; `-` for a missing metric."""
  columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _KEYS]
  header = ["subnet", "params", "FLOPs", *(column.replace("_", " ") for column in columns)]
  ordered = sorted(rows, key=lambda row: (row["params"], row["flops"], row["subnet"]))
  return [header] + [
      [folded(row["subnet"]), human(row["params"]), human(row["flops"]),
       *(_metric(name, row.get(name)) for name in columns)] for row in ordered]


def _metric(name: str, value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, str):
    return value
  return metrics.of(name).text(value)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells, the first of them the header, as Markdown."""
  header, *body = (f"| {' | '.join(line)} |" for line in lines)
  return "\n".join([header, "|:--" + "|--:" * (len(lines[0]) - 1) + "|", *body])


def estimate(
    value: tuple[float, float] | None, metric: metrics.Metric,
    bold: Callable[[float, float], bool] = lambda mean, half: False, sign: str = "") -> str:
  """A mean and its half-width as the metric is shown; the mean alone for a single seed."""
  if value is None:
    return "-"
  (mean, half), style = value, f".{metric.decimals or 0}f"
  text = f"{metric.scale * mean:{sign}{style}}"
  text = f"**{text}**" if bold(mean, half) else text
  return text if math.isnan(half) else f"{text} ± {metric.scale * half:{style}}"


def _differences(metric: metrics.Metric, baseline: str) -> str:
  """What a table's differences are, and what their sign says."""
  if metric.unit == "%":
    return f"Points of test {metric.title}"
  side = "below" if metric.lower_is_better else "above"
  return f"Test {metric.title} less that of {baseline} ({side} 0 is better)"


def _spent(results: Sequence[Result]) -> str:
  """Seeds, steps and training FLOPs behind the results of one recipe.

  Networks of different size that took the same steps differ in FLOPs, and the other way round:
  where all results agree in both, they are slices of one run.
  """
  def spread(values: Iterable[float], style: Callable[[float], str]) -> str:
    return " to ".join(dict.fromkeys(style(end) for end in (min(values), max(values))))
  seeds = spread([len(result.accuracies) for result in results], str)
  steps = spread([result.steps for result in results], "{:,}".format)
  train = [result.train_flops for result in results]
  one_run = len({(result.steps, result.train_flops) for result in results}) == 1
  runs = "one run" if one_run else f"{len(results)} runs, {human(sum(train))} in all"
  return f"{steps} steps, {spread(train, human)} training FLOPs ({runs}) for each of {seeds} seeds"
