"""Rows, tables and intervals as users see them."""

from __future__ import annotations

import dataclasses
import doctest
import math

import numpy as np
import pytest
from scipy import stats

from nestnet import report


def row(subnet="layers=2", params=10, flops=20, **metrics):
  return {"subnet": subnet, "params": params, "flops": flops, **metrics}


def result(recipe="separate", budget="equal steps", params=100, accuracies=(0.9, 0.92), **fields):
  fields = {"train_flops": 1e9 * params, "steps": 1500, **fields}
  return report.Result(recipe, budget, f"embed={params}", params, 10 * params, accuracies, **fields)


def lines(markdown, start):
  return [line for line in markdown.splitlines() if line.startswith(start)]


def test_rows_survive_the_file_with_values_of_any_numeric_type(tmp_path):
  path = tmp_path / "runs" / "subnets.json"
  report.write_rows(path, [row(params=np.int64(7), accuracy=np.float32(0.5)), row(loss=1)])
  assert report.read_rows(path) == [row(params=7, accuracy=0.5), row(loss=1)]
  report.write_rows(path, [])
  assert report.read_rows(path) == []


@pytest.mark.parametrize("bad", [{"subnet": "a", "params": 1}, row(subnet=3), row(loss=math.nan)])
def test_bad_rows_are_refused_before_the_file_is_touched(tmp_path, bad):
  path = tmp_path / "subnets.json"
  report.write_rows(path, [row()])
  with pytest.raises(ValueError):
    report.write_rows(path, [row(), bad])
  assert report.read_rows(path) == [row()]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'[{"subnet"', "damaged"), (b"\xff\xfe\x00", "damaged"), (b'{"a": 1}', "rows, got dict"),
     (b'[{"params": 1}]', "needs subnet")])
def test_damaged_files_are_named(tmp_path, content, message):
  path = tmp_path / "subnets.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"subnets.json.*{message}"):
    report.read_rows(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="subnets.json.*evaluate"):
    report.read_rows(tmp_path / "subnets.json")


def test_table_is_aligned_sorted_and_marks_missing_metrics():
  text = report.table([row("layers=10,embed=48", 2_000_000, 3e9, accuracy=0.98765, loss=0.123456),
                       row("layers=1", 999, 12_345, validation_accuracy=1)])
  header, small, large = text.splitlines()
  assert small.split() == ["layers=1", "999", "12.3k", "-", "-", "100.0%"]
  assert large.split() == ["layers=10,embed=48", "2.0M", "3.0G", "98.8%", "0.1235", "-"]
  assert header.endswith("validation accuracy") and len(header) == len(small) == len(large)


def test_tables_say_equal_sizes_of_all_stages_once():
  staged = "layers_1=2,layers_2=2,expand_1=3,expand_2=4"
  folded = "layers=2,expand_1=3,expand_2=4"
  assert report.table([row(staged)]).splitlines()[1].split()[0] == folded
  both = [dataclasses.replace(result(recipe), subnet=staged) for recipe in ("separate", "up")]
  for text in (report.compare_table(both), report.difference_table(both)):
    assert len(lines(text, f"| {folded} |")) == 1


def test_an_empty_table_is_its_header():
  assert report.table([]).split() == ["subnet", "params", "FLOPs"]


@pytest.mark.parametrize("count", [0, 1, 999, 999.6, 1000, 99_949, 999_949, 999_950, 5e20])
def test_human_units_are_within_their_rounding(count):
  text = report.human(count)
  scale = {unit: 1000.0 ** i for i, unit in enumerate("kMGTPE", 1)}.get(text[-1], 1)
  value = float(text.rstrip("kMGTPE"))
  assert value < 1000
  assert abs(value * scale - count) <= (0.0501 * scale if scale > 1 else 0.5)


def test_no_row_dominates_the_front_and_the_front_dominates_the_rest():
  rng = np.random.default_rng(0)
  rows = [row(str(i), flops=int(rng.integers(20)), accuracy=float(rng.integers(20)))
          for i in range(60)]
  front = report.pareto(rows)
  def beats(a, b):
    return (a["flops"] <= b["flops"] and a["accuracy"] >= b["accuracy"]
            and (a["flops"], a["accuracy"]) != (b["flops"], b["accuracy"]))
  assert not any(beats(a, b) for a in rows for b in front)
  points = [(r["flops"], r["accuracy"]) for r in front]
  assert points == sorted(set(points))
  assert all(any(beats(a, b) for a in front) or (b["flops"], b["accuracy"]) in points for b in rows)


def test_pareto_of_an_unknown_metric_lists_the_known():
  with pytest.raises(ValueError, match="acuracy.*did you mean 'accuracy'.*params"):
    report.pareto([row(accuracy=0.5)], metric="acuracy")


def test_interval_is_students_t():
  values = [0.91, 0.94, 0.9, 0.95]
  mean, half = report.interval(values)
  low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
  np.testing.assert_allclose((mean - half, mean + half), (low, high), rtol=1e-12)
  assert math.isnan(report.interval([0.5])[1])
  with pytest.raises(ValueError, match="none"):
    report.interval([])


def test_paired_difference_cancels_what_seeds_share():
  seeds = np.array([0.1, 0.5, 0.9])
  mean, half = report.paired_difference(seeds + 0.25, seeds)
  assert mean == pytest.approx(0.25) and half == pytest.approx(0, abs=1e-12)
  with pytest.raises(ValueError, match="3 values and 2"):
    report.paired_difference(seeds, seeds[:2])


def test_compare_table_orders_sizes_and_marks_the_best_mean():
  results = [
      result(params=1000, accuracies=(0.98, 0.98)), result(params=20, accuracies=(0.5,)),
      result("sandwich", params=1000, accuracies=(0.97, 0.99), train_flops=5e12),
      result("sandwich", params=20, accuracies=(0.6, 0.7), train_flops=5e12),
      result("sandwich", "equal FLOPs", params=20, train_flops=3e12, steps=800)]
  text = report.compare_table(results)
  steps, fewer = text.split("### Equal FLOPs")
  half = 100 * report.interval((0.6, 0.7))[1]
  # One seed has no interval; equal means are both best.
  assert lines(steps, "| embed") == [
      f"| embed=20 | 20 | 200 | 50.0 | **65.0** ± {half:.1f} |",
      "| embed=1000 | 1.0k | 10.0k | **98.0** ± 0.0 | **98.0** ± 12.7 |"]
  assert lines(steps, "- ") == [
      "- separate: 1,500 steps, 20.0G to 1.0T training FLOPs (2 runs, 1.0T in all) for each of 1 to"
      " 2 seeds",
      "- sandwich: 1,500 steps, 5.0T training FLOPs (one run) for each of 2 seeds"]
  assert lines(fewer, "- ") == [
      "- sandwich: 800 steps, 3.0T training FLOPs (one run) for each of 2 seeds"]


def test_a_recipe_without_a_size_leaves_its_cell_open():
  text = report.compare_table([result(params=1), result(params=2), result("sandwich", params=2)])
  assert lines(text, "| embed=1 ")[0].endswith("| - |")


def test_difference_table_is_paired_and_bold_where_zero_is_excluded():
  base = result(accuracies=(0.5, 0.7, 0.9))
  text = report.difference_table([
      base, result("up", accuracies=(0.51, 0.71, 0.91)),
      result("noise", accuracies=(0.9, 0.7, 0.5))])
  assert lines(text, "| subnet") == ["| subnet | params | up | noise |"]
  half = 100 * report.paired_difference((0.9, 0.7, 0.5), base.accuracies)[1]
  assert lines(text, "| embed") == [f"| embed=100 | 100 | **+1.0** ± 0.0 | +0.0 ± {half:.1f} |"]
  with pytest.raises(ValueError, match="'alone'.*separate, up"):
    report.difference_table([base, result("up")], baseline="alone")


def test_differences_are_to_what_the_baseline_has():
  text = report.difference_table([result(params=2), result("up", params=2), result("up", params=1)])
  assert len(lines(text, "| embed=")) == 1 and lines(text, "| embed=2 ")


def test_duplicates_and_empty_comparisons_are_refused():
  with pytest.raises(ValueError, match="two results.*separate"):
    report.compare_table([result(), dataclasses.replace(result(), accuracies=(0.1,))])
  with pytest.raises(ValueError, match="none"):
    report.compare_table([])


def test_examples():
  assert doctest.testmod(report, optionflags=doctest.ELLIPSIS).failed == 0
