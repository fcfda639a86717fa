"""Charts of subnets and of recipes, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import io
import itertools
import math
import os
import statistics
import textwrap

from matplotlib import axes as mpl_axes
from matplotlib import figure
from matplotlib import text
from matplotlib import ticker

from nestnet import files
from nestnet import metrics
from nestnet import report
from nestnet.subnet import folded

# Okabe and Ito's palette: distinct under every common form of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY = "#8A8A8A"
_NAMES = {"params": "parameters", "flops": "FLOPs"}


def pareto_chart(
    path: str | os.PathLike[str], rows: Sequence[report.Row], cost: str = "params",
    metric: str = "accuracy", title: str = "One network, many sizes", budget: str = "",
    found: str = "") -> None:
  """Draws accuracy, or another metric, against cost for every subnet, and the front of the best.

  Where every row has the metric on the validation split too (`validation_accuracy`), that decides
  which subnets are the front.

  Args:
    path: the PNG to replace.
    rows: at least one row.
    cost: key of the horizontal axis, logarithmic if the rows span more than a factor of 10.
    metric: key of the vertical axis; `nestnet.metrics` says how it is shown, and which end is the best.
    title: heading.
    budget: caption: what was spent on these numbers (steps, images, training FLOPs, seeds).
    found: text of the subnet that is marked as found; none by default.

  Raises:
    ValueError: no rows, or a row lacks one of the two keys.
  """
  _finish(_pareto(rows, cost, metric, found), path, title, budget)


def _pareto(rows: Sequence[report.Row], cost: str, metric: str, found: str) -> figure.Figure:
  if not rows:
    raise ValueError("a chart needs at least one row, got none")
  front, best = _front(rows, cost, metric)
  measured = metrics.of(metric)
  chart = figure.Figure(figsize=(7.2, 4.6), layout="constrained")
  axes = chart.subplots()
  for subset, style, look in (
      (rows, "o", dict(color=_GREY, alpha=0.55, markersize=5, label=f"subnets ({len(rows)})")),
      (front, "o-", dict(color=_COLOURS[0], linewidth=1.6, label=best))):
    axes.plot([row[cost] for row in subset], [measured.scale * row[metric] for row in subset], style,
              markeredgewidth=0, **look)
  costs = [row[cost] for row in rows]
  _cost_axis(axes, _NAMES.get(cost, cost.replace("_", " ")), log=max(costs) > 10 * min(costs))
  axes.set_ylabel(f"{metric.replace('_', ' ')}{measured.note}")
  smallest, largest = (pick(rows, key=lambda row: row[cost]) for pick in (min, max))
  labels = [_label(axes, smallest, cost, metric, "smallest")]
  if len(rows) > 1:
    labels.append(_label(axes, largest, cost, metric, "largest"))
  for row in (row for row in rows if row["subnet"] == found):
    axes.plot(row[cost], measured.scale * row[metric], "*", color=_COLOURS[1], markersize=13,
              label=f"found: {_point(row, cost, metric)}")
  # The better of the larger members leave this corner free.
  corner = "upper right" if measured.lower_is_better else "lower right"
  legend = axes.legend(loc=corner, frameon=False, fontsize=9)
  # Room above and below the points, where neither covers any of them.
  lines = max(len(legend.get_texts()), *(label.get_text().count("\n") + 1 for label in labels))
  axes.margins(y=lines / 8)
  return chart


def compare_chart(
    path: str | os.PathLike[str], results: Sequence[report.Result],
    title: str = "Accuracy against size", caption: str = "") -> None:
  """Draws accuracy, or another metric, against parameters: a panel for each budget, a line for each recipe.

  Bars are 95% intervals over seeds. Where a few points are so bad that the others could not be told
  apart, the panels end before them and name their values at that edge.

  Args:
    path: the PNG to replace.
    results: as `report.compare_table` takes them.
    title: heading.
    caption: what was spent (steps, images, seeds), below the panels.

  Raises:
    ValueError: no results, or two of the same recipe, budget and subnet.
  """
  grids = report.by_budget(results)
  recipes = list(dict.fromkeys(result.recipe for result in results))
  lines = {(budget, recipe): [(result.params, *_shown(result)) for result in grid.of(recipe)]
           for budget, grid in grids.items() for recipe in grid.recipes}
  metric = next(iter(grids.values())).metric
  limits = _limits(grids.values())
  # The end of the panel where the worst are, and how a value behind it is marked.
  worst, mark = (max(limits), "▴") if metric.lower_is_better else (min(limits), "▾")
  chart = figure.Figure(figsize=(max(6.4, 4.6 * len(grids)), 5), layout="constrained")
  # A figure of its own for panels and legend: in one figure, legend and caption would overlap.
  body = chart.subfigures()
  panels = body.subplots(1, len(grids), sharey=True, squeeze=False)[0]
  handles, cut = {}, False
  for axes, (budget, grid) in zip(panels, grids.items()):
    _cost_axis(axes, "parameters of the subnet", log=True)
    axes.set_title(report.sentence(budget), fontsize=11)
    dodges = _dodges([size[0] for size in grid.sizes], len(recipes))
    row, rise = (0.95, -0.045) if metric.lower_is_better else (0.02, 0.045)
    for index, recipe in enumerate(recipes):
      if recipe not in grid.recipes:
        continue
      costs, means, halves = zip(*lines[budget, recipe])
      costs = [dodges[index] * cost for cost in costs]
      colour = _COLOURS[index % len(_COLOURS)]
      handles[recipe.replace("_", " ")] = axes.errorbar(
          costs, means, halves, color=colour, marker=_MARKERS[index % len(_MARKERS)], markersize=5,
          linewidth=1.4, elinewidth=1, capsize=2.5)
      beyond = [(cost, mean) for cost, mean in zip(costs, means) if metric.score(mean) < metric.score(worst)]
      for cost, mean in beyond:
        axes.text(cost, row, f"{mark}{mean:.{max((metric.decimals or 1) - 1, 0)}f}", color=colour, fontsize=8,
                  ha="center", transform=axes.get_xaxis_transform())
      if beyond:
        row, cut = row + rise, True
  panels[0].set_ylim(*(end if cut or end != worst else None for end in limits))
  panels[0].set_ylabel(f"test {metric.title}{metric.note}")
  panels[0].yaxis.set_major_locator(ticker.MaxNLocator(7, steps=(1, 2, 5, 10)))
  body.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
              ncols=min(len(handles), 2 * len(grids)), fontsize=9)
  note = f"{mark} marks means {'above' if metric.lower_is_better else 'below'} the panel." if cut else ""
  _finish(chart, path, title, " ".join(filter(None, (caption, note))))


def _front(rows: Sequence[report.Row], cost: str, metric: str) -> tuple[list[report.Row], str]:
  """The rows that no other beats, by the validation split where all have it, and what to call them."""
  chosen = f"validation_{metric}"
  if all(chosen in row and metric in row for row in rows):
    return report.pareto(rows, cost, chosen), "best at their cost on validation"
  return report.pareto(rows, cost, metric), "best at their cost"


def _shown(result: report.Result) -> tuple[float, float]:
  """The mean over seeds and the half-width of its interval, as they are drawn."""
  scale = metrics.of(result.metric).scale
  mean, half = report.interval(result.accuracies)
  return scale * mean, scale * half


def _limits(grids: Iterable[report.Grid]) -> tuple[float, float]:
  """The lowest and highest value to show: all that the better half of the recipes reach, and the better
  ends of their bars unless these would make the lines small."""
  grids = list(grids)
  metric = grids[0].metric
  rows = [[(metric.score(mean), half) for mean, half in grid.row(size, _shown).values()]
          for grid in grids for size in grid.sizes]
  highest = max(mean for row in rows for mean, _ in row)
  lowest = min(statistics.median_high(mean for mean, _ in row) for row in rows)
  spread = max(highest - lowest, 0.02 * metric.scale)
  ends = [mean + half for row in rows for mean, half in row if half < spread]
  # No accuracy is above 100%.
  most = 100 + 0.03 * spread if metric.unit == "%" else math.inf
  low, high = sorted(map(metric.value, (
      lowest - 0.5 * spread, min(max([highest, *ends]) + 0.2 * spread, most))))
  return low, high


def _dodges(costs: Sequence[int], count: int) -> list[float]:
  """Factors that put the bars of each size side by side on a logarithmic axis."""
  closest = min((b / a for a, b in itertools.pairwise(costs) if b > a), default=1.2)
  span = max(costs[-1] / costs[0], 10)
  width = min(closest ** 0.5, span ** (0.012 * count))
  return [width ** ((index - (count - 1) / 2) / max(count - 1, 1)) for index in range(count)]


def _cost_axis(axes: mpl_axes.Axes, name: str, log: bool) -> None:
  axes.set_xlabel(name)
  if log:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.xaxis.set_major_formatter(lambda value, _: report.human(value).replace(".0", ""))


def _point(row: report.Row, cost: str, metric: str) -> str:
  name = _NAMES.get(cost, cost.replace("_", " "))
  return f"{report.human(row[cost])} {name}, {metrics.of(metric).text(row[metric])}"


def _label(
    axes: mpl_axes.Axes, row: report.Row, cost: str, metric: str, which: str) -> text.Annotation:
  """Names the smallest subnet on the left, the largest on the right, clear of all points."""
  measured, left = metrics.of(metric), which == "smallest"
  # Where larger members are better they stand high, and the smallest is named below all points.
  low = left != measured.lower_is_better
  # Beside the legend a line has room for so many characters.
  fields = textwrap.fill(folded(row["subnet"]).replace(",", ", "), 44, max_lines=3, placeholder=" ...")
  return axes.annotate(
      f"{which}: {_point(row, cost, metric)}\n{fields}",
      xy=(row[cost], measured.scale * row[metric]), xytext=(0.02 if left else 0.98, 0.03 if low else 0.97),
      textcoords="axes fraction", ha="left" if left else "right", va="bottom" if low else "top",
      fontsize=8, linespacing=1.4, arrowprops=dict(arrowstyle="-", color=_GREY, linewidth=0.8))


def _finish(
    chart: figure.Figure, path: str | os.PathLike[str], title: str, caption: str) -> None:
  """Gives every chart the same frame, and writes it."""
  chart.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
  for axes in chart.axes:
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
  # An inch has room for so many characters of these sizes.
  width = chart.get_figwidth()
  chart.suptitle(textwrap.fill(title, int(8.5 * width)), fontsize=13, fontweight="bold")
  chart.supxlabel(textwrap.fill(caption, int(14 * width)), fontsize=8.5, color="#555555")
  png = io.BytesIO()
  chart.savefig(png, format="png", dpi=200)
  files.atomic_write(path, png.getvalue())
