"""Charts: what can be told without eyes."""

from __future__ import annotations

import subprocess
import sys

from matplotlib import image
from matplotlib import text
import numpy as np
import pytest

from nestnet import charts
from nestnet import report


def rows(count):
  return [{"subnet": f"layers={i},embed=48", "params": 10 ** (3 + i), "flops": 10 * i,
           "accuracy": 0.9 + 0.01 * i} for i in range(count)]


def results(means, seeds=3, budget="equal steps"):
  return [report.Result(recipe, budget, f"embed={params}", params, params,
                        tuple(mean + 0.001 * seed for seed in range(seeds)), 1e9, 100)
          for recipe, means_of in means.items() for params, mean in zip((100, 200, 900), means_of)]


@pytest.mark.parametrize("count", [1, 4])
def test_pareto_chart_is_a_sharp_picture_with_ink(tmp_path, count):
  path = tmp_path / "pareto.png"
  charts.pareto_chart(path, rows(count), budget="100 steps, 1 seed")
  pixels = image.imread(path)
  assert pixels.shape[:2] == (920, 1440)
  blue = np.array([0x00, 0x72, 0xB2]) / 255
  assert (np.abs(pixels[..., :3] - blue).max(axis=-1) < 0.01).sum() > 50


LONG = [",".join(f"{axis}_{stage}={size}" for axis in ("layers", "expand", "kernel") for stage in range(1, 6))
        for size in ("1:2:3:4", "2:3:4:5")]


@pytest.mark.parametrize("texts", [
  LONG, [size.replace("_1=1", "_1=9").replace("_1=2", "_1=9") for size in LONG],
  ["layers=2,embed=48", LONG[0] + ",layers_6=2"]], ids=["folded", "wrapped", "mixed"])
def test_labels_are_inside_and_cover_neither_points_nor_the_legend(tmp_path, texts):
  """Of networks with many axes, in charts whose points fill the corners."""
  middle = [dict(subnet="layers=7", params=i, validation_accuracy=a, accuracy=a)
            for i, a in ((4, 0.5), (5, 0.9), (30, 0.5), (31, 0.9))]
  ends = [dict(subnet=size, params=n, validation_accuracy=0.7, accuracy=0.7)
          for n, size in zip((3, 32), texts)]
  chart = charts._pareto([*middle, *ends], "params", "accuracy", found="")
  charts._finish(chart, tmp_path / "a.png", "One network", "100 steps")
  # At the resolution that extents are told in.
  chart.draw_without_rendering()
  (axes,) = chart.axes
  # Of the text alone: not of the line to its point.
  labels = [text.Text.get_window_extent(label) for label in axes.texts]
  legend = axes.get_legend().get_window_extent()
  points = axes.transData.transform([(row["params"], 100 * row["accuracy"]) for row in [*middle, *ends]])
  assert len(labels) == 2 and not labels[0].overlaps(labels[1])
  for label in labels:
    assert axes.bbox.fully_containsx(label.x0) and axes.bbox.fully_containsx(label.x1)
    assert axes.bbox.y0 < label.y0 and label.y1 < axes.bbox.y1
    assert not label.overlaps(legend) and not label.count_contains(points)
  assert not legend.count_contains(points)


def test_long_titles_and_captions_are_not_cut_off(tmp_path):
  chart = charts._pareto(rows(2), "params", "accuracy", found="")
  charts._finish(chart, tmp_path / "a.png", "layers_1, " * 15, "budgets " * 40)
  chart.draw_without_rendering()
  assert len(chart.texts) == 2
  for box in (written.get_window_extent() for written in chart.texts):
    assert 0 < box.x0 and box.x1 < chart.bbox.x1


def test_what_is_found_is_marked():
  for found, entries in ((rows(3)[1]["subnet"], 3), ("", 2)):
    (axes,) = charts._pareto(rows(3), "flops", "accuracy", found).axes
    assert len(axes.get_legend().get_texts()) == entries
  (axes,) = charts._pareto(rows(3), "flops", "accuracy", rows(3)[1]["subnet"]).axes
  assert axes.lines[-1].get_xydata().tolist() == [[10, 91]]
  assert axes.get_legend().get_texts()[-1].get_text() == "found: 10 FLOPs, 91.0%"


def test_validation_chooses_the_front_where_all_rows_have_it():
  by_test = [dict(params=n, accuracy=a) for n, a in ((1, 0.5), (2, 0.9), (3, 0.8))]
  by_both = [row | dict(validation_accuracy=v) for row, v in zip(by_test, (0.5, 0.4, 0.6))]

  def front(rows):
    chosen, name = charts._front(rows, "params", "accuracy")
    return [row["params"] for row in chosen], name

  assert front(by_test) == front([*by_both[:2], by_test[2]]) == ([1, 2], "best at their cost")
  assert front(by_both) == ([1, 3], "best at their cost on validation")


def test_compare_chart_has_a_panel_for_each_budget(tmp_path):
  means = {"separate": (0.9, 0.95, 0.97), "sandwich": (0.91, 0.95, 0.97)}
  one, two = tmp_path / "one.png", tmp_path / "two.png"
  charts.compare_chart(one, results(means, seeds=1))
  both = results(means) + results(means, budget="equal FLOPs")
  charts.compare_chart(two, both, caption="3 seeds")
  assert image.imread(two).shape[1] == 1840 > image.imread(one).shape[1]


def test_charts_refuse_nothing_to_draw(tmp_path):
  with pytest.raises(ValueError, match="none"):
    charts.pareto_chart(tmp_path / "a.png", [])
  with pytest.raises(ValueError, match="none"):
    charts.compare_chart(tmp_path / "a.png", [])
  with pytest.raises(ValueError, match="'speed'"):
    charts.pareto_chart(tmp_path / "a.png", rows(2), metric="speed")
  assert not list(tmp_path.iterdir())


def test_one_collapsed_recipe_does_not_flatten_the_others():
  good = {"separate": (0.9, 0.95, 0.97), "sandwich": (0.91, 0.95, 0.97)}
  grids = report.by_budget(results({**good, "truncate": (0.1, 0.2, 0.97)})).values()
  low, high = charts._limits(grids)
  assert 80 < low < 90 and 97.2 < high <= 100.5
  low, _ = charts._limits(report.by_budget(results(good)).values())
  assert low < 90


def test_bars_end_inside_the_panel():
  result = lambda *accuracies: report.Result("a", "equal steps", "layers=1", 10, 20, accuracies, 1e9, 100)
  ends = lambda *accuracies: charts._limits(report.by_budget([result(*accuracies)]).values())[1]
  assert ends(0.90) == pytest.approx(90.4) and ends(0.896, 0.900, 0.904) > 90 + 0.99
  # Two runs that differ much would make the lines small.
  assert ends(0.8, 0.9) < 90


@pytest.mark.parametrize("costs", [[100, 130, 900], [100]])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_dodged_bars_stand_apart_around_their_size(costs, count):
  factors = charts._dodges(costs, count)
  dodged = [factor * cost for cost in costs for factor in factors]
  assert len(set(factors)) == count and dodged == sorted(dodged)
  assert np.prod(factors) == pytest.approx(1)


def test_charts_leave_the_global_state_of_pyplot_alone():
  code = "import sys; from nestnet import charts; sys.exit('matplotlib.pyplot' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
