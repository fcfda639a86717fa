"""What features that learnt nothing from the images are worth, by the metrics of a run's members.

A representation that does not beat them has learnt nothing either: pixels, their principal components, and
networks at their random initial values.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nestnet import evaluation, metrics, report
from nestnet.build import Run
from nestnet.evaluators import representation
from nestnet.sharding import local
from nestnet.subnet import Subnet

# Images of a bank whose pixels come to more numbers are not kept: then there are only random networks.
MEMORY = 2 ** 28
UNTRAINED = ", untrained"
FILE = "references.json"


def references(run: Run, members: Sequence[Subnet] = (), splits: Sequence[str] = ("validation", "test")
               ) -> list[dict[str, Any]]:
  """Rows of features that are not trained, as `evaluation.evaluate` gives them of members.

  Their `subnet` is `pixels`; `pca=16`, for as many principal components of the bank's pixels as a member has
  features; or a member's text and `, untrained`, for its slice of the network as the run's seed begins it.

  Args:
    run: Whose data, settings and family; that of a task without readouts has no references.
    members: Of the family; by default the smallest and the largest.
    splits: Of the data.
  """
  if not run.task.fit:
    return []
  space = run.supernet.space
  members = list(dict.fromkeys(members or (space.smallest, space.largest)))
  data = {split: evaluation.held(run, split) for split in splits}
  images, state = evaluation.calibration(run, run.supernet), local(run.step.init())
  rows = _of_pixels(run, members, data)
  for member in members:
    rows.append({"subnet": f"{member}{UNTRAINED}", **evaluation.costs(run.supernet, member)} | evaluation.measure(
      run, *evaluation.member(run.step, state, member, images), data, member))
  return rows


def _of_pixels(run: Run, members: Sequence[Subnet], data: dict[str, Any]) -> list[dict[str, Any]]:
  options = run.config.get("eval") or {}
  pixels, bank = int(np.prod(run.dataset.shape)), len(run.dataset.split("train"))
  if min(options.get("bank") or bank, bank) * pixels > MEMORY:
    return []
  from sklearn import decomposition

  def row(name: str, features: Callable[[np.ndarray], np.ndarray], params: int, flops: int) -> dict[str, Any]:
    fitted = representation.fit_features(features, run.dataset, options)
    return {"subnet": name, "params": params, "flops": flops} | evaluation.on_splits(
      data, lambda examples: representation.measured(fitted, examples))

  rows = [row("pixels", _flat, 0, 0)]
  known = np.concatenate([_flat(batch["image"]) for batch in representation.bank_of(
    run.dataset, options.get("bank") or 0)])
  for width in sorted({min(_width(run, member), pixels, len(known)) for member in members}):
    pca = decomposition.PCA(width, random_state=0).fit(known)
    rows.append(row(f"pca={width}", lambda images, pca=pca: pca.transform(_flat(images)), (width + 1) * pixels,
                    2 * width * pixels))
  return rows


def write(workdir: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows of references beside those of a run's members, if there are any."""
  if rows:
    report.write_rows(pathlib.Path(workdir) / FILE, rows)


def written(workdir: str | os.PathLike[str]) -> str:
  """The table of the references of a finished run for the terminal; empty where there are none."""
  path = pathlib.Path(workdir) / FILE
  return report.table(evaluation.shown(report.read_rows(path))) if path.exists() else ""


def table(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> str:
  """References as Markdown, means with 95% intervals.

  Args:
    seeds: The rows of each seed; they have the same names.
  """
  columns = [metric for metric in (metrics.KNN, *metrics.READOUTS) if metric.name in seeds[0][0]]
  lines = [["features", "params", *(metric.title for metric in columns)]]
  for rows in zip(*seeds):
    cells = [report.estimate(report.interval([row[metric.name] for row in rows]), metric) for metric in columns]
    lines.append([rows[0]["subnet"], report.human(rows[0]["params"]), *cells])
  return "\n".join(["### Without training", "", "Test accuracies in percent, mean ± 95% interval over seeds.", "",
                    report.markdown_table(lines)])


def _flat(images: np.ndarray) -> np.ndarray:
  return np.reshape(images, (len(images), -1))


def _width(run: Run, member: Subnet) -> int:
  """How many features a member has."""
  variables = jax.eval_shape(lambda v: run.supernet.cut(v, member), run.supernet.shapes)
  module = run.supernet.module(member)
  return jax.eval_shape(lambda v, *x: module.apply(v, *x)["features"], variables,
                        *run.supernet.inputs_of(member)).shape[-1]
