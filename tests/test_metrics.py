"""Which direction is better, in choices, fronts, tables and charts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib import image, text

from nestnet import charts, extraction, metrics, report

BITS = "bits_per_byte"


def rows(*bits):
  return [{"subnet": f"mlp={i}", "params": 10 * i, "flops": 100 * i, f"validation_{BITS}": b, BITS: b}
          for i, b in enumerate(bits, 1)]


def result(recipe, params, bits, metric=BITS, budget="equal steps"):
  return report.Result(recipe, budget, f"mlp={params}", params, 10 * params, bits, 1e9, 100, metric)


def test_a_column_says_by_its_end_what_it_measures():
  columns = ("accuracy", "validation_accuracy", "validation_bits_per_byte", "perplexity", "loss", "speed")
  assert [metrics.of(c).lower_is_better for c in columns] == [False, False, True, True, True, False]
  for metric in metrics.MAIN:
    assert metric.value(metric.score(0.25)) == 0.25
  assert metrics.BITS_PER_BYTE.score(1.0) > metrics.BITS_PER_BYTE.score(2.0)
  assert metrics.main({"loss": 1, "accuracy": 0.5}) is metrics.ACCURACY
  assert metrics.main(rows(1.0)[0]) is metrics.BITS_PER_BYTE


def test_the_choice_within_a_budget_is_the_fewest_bits():
  found = rows(3.0, 2.0, 2.5, 1.0)
  assert extraction.choose(found, {"params": 30})["params"] == 20
  assert extraction.choose(found, {"flops": 1e9})["params"] == 40
  # Of equals the smaller.
  assert extraction.choose(rows(2.0, 2.0), {})["params"] == 10
  with pytest.raises(ValueError, match="no validation bits per byte to choose by; evaluate anew"):
    extraction.choose([{"params": 1, BITS: 2.0}], {"params": 3})


def test_the_front_is_of_the_fewest_bits():
  front = report.pareto(rows(3.0, 2.0, 2.5, 1.0), "params", BITS)
  assert [row["params"] for row in front] == [10, 20, 40]
  chosen, name = charts._front(rows(3.0, 3.5, 2.5), "params", BITS)
  assert [row["params"] for row in chosen] == [10, 30] and name == "best at their cost on validation"


def test_a_table_of_rows_says_bits():
  header, first, _ = report.table(rows(3.0, 2.12345)).splitlines()
  assert header.endswith("validation bits per byte  bits per byte") and first.split()[-1] == "3.000"


def test_compared_means_mark_the_lowest_and_differences_say_their_sign():
  results = [result("separate", 10, (2.0, 2.2)), result("sandwich", 10, (1.9, 2.0996)),
             result("separate", 20, (1.5, 1.5)), result("sandwich", 20, (1.5004, 1.5004))]
  text = report.compare_table(results)
  assert "Test bits per byte (lower is better), mean ± 95% interval over seeds." in text
  ten, twenty = [line.split(" | ")[3:] for line in text.splitlines() if line.startswith("| mlp")]
  assert ten[0].startswith("2.100 ±") and ten[1].startswith("**2.000** ±")
  # Equal as shown: both are best.
  assert all(cell.startswith("**1.500** ± 0.000") for cell in twenty)
  text = report.difference_table(results)
  assert "Test bits per byte less that of separate (below 0 is better), paired by seed" in text
  ten, twenty = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| mlp")]
  assert ten.startswith("**-0.100** ± ") and twenty.startswith("**+0.000** ± 0.000")


def test_a_chart_of_bits_has_its_labels_where_no_point_is():
  (axes,) = charts._pareto(rows(3.0, 2.0, 1.5), "params", BITS, found="mlp=2").axes
  assert axes.get_ylabel() == "bits per byte (lower is better)"
  assert axes.lines[-1].get_xydata().tolist() == [[20, 2.0]]
  assert axes.get_legend().get_texts()[-1].get_text() == "found: 20 parameters, 2.000"
  axes.figure.draw_without_rendering()
  # The arrow of a label leads to its point.
  smallest, largest = (text.Text.get_window_extent(label) for label in axes.texts)
  legend = axes.get_legend().get_window_extent()
  points = axes.transData.transform(axes.lines[0].get_xydata())
  for box in (smallest, largest, legend):
    assert not any(box.contains(*point) for point in points)
  assert smallest.y0 > largest.y1 and legend.y0 > largest.y1 and legend.x0 > smallest.x0


def grids(**means):
  return report.by_budget(result(recipe, 10 * i, (bits,)) for recipe, several in means.items()
                          for i, bits in enumerate(several, 1)).values()


def test_the_panel_ends_above_the_better_half_where_one_recipe_collapses():
  low, high = charts._limits(grids(a=(2.0, 1.5), b=(2.1, 1.6), truncate=(9.0, 1.5)))
  assert 1.2 < low < 1.5 and 2.1 < high < 3
  # As the same accuracies upside down.
  flipped = [dataclasses.replace(r, accuracies=(-r.accuracies[0] / 100,), metric="accuracy")
             for grid in grids(a=(20.0, 15.0), b=(21.0, 16.0)) for r in grid.cells.values()]
  up = charts._limits(report.by_budget(flipped).values())
  np.testing.assert_allclose(charts._limits(grids(a=(20.0, 15.0), b=(21.0, 16.0))), (-up[1], -up[0]))


def test_a_chart_of_recipes_in_bits(tmp_path):
  (grid,) = grids(a=(2.0, 1.5), b=(2.1, 1.6), truncate=(9.0, 1.5))
  charts.compare_chart(tmp_path / "a.png", list(grid.cells.values()))
  assert image.imread(tmp_path / "a.png").shape[2] == 4
