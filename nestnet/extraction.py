"""From a trained family to the one network that fits a budget, verified."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet import cost, evaluation, metrics, provenance, report, runs
from nestnet.build import Run
from nestnet.calibrate import average, moments
from nestnet.errors import Failure, UserError, one_of
from nestnet.execution import Runnable, objective_part, resized
from nestnet.interop import hugging_face
from nestnet.interop.folder import load, save
from nestnet.models.convolution import STATISTICS
from nestnet.steps import TrainState
from nestnet.subnet import Subnet

VERIFIED = 256
TOLERANCE = 1e-5
FORMATS = ("safetensors", "hugging_face")


def choose(rows: Sequence[Mapping[str, Any]], budgets: Mapping[str, float]) -> Mapping[str, Any]:
  """The row that is best on the validation split among those within every budget; the smaller of equals.

  Args:
    rows: Evaluated sub-networks, as in `subnets.json`; their accuracy decides, or what they have for it.
    budgets: Limits by column, such as `{"params": 100_000}`.

  Raises:
    ValueError: Nothing fits; the message says what the cheapest costs.

  Example:
    >>> rows = [{"params": 10, "validation_accuracy": 0.8}, {"params": 20, "validation_accuracy": 0.9}]
    >>> choose(rows, {"params": 15})["params"]
    10
  """
  metric = metrics.main(rows[0]) if rows else metrics.ACCURACY
  column = f"validation_{metric.name}"
  if not all(column in row for row in rows) or not rows:
    raise UserError(f"the evaluated sub-networks have no validation {metric.title} to choose by; evaluate "
                    "anew: python -m experiments.evaluate")
  fitting = [r for r in rows if all(r[name] <= limit for name, limit in budgets.items())]
  if not fitting:
    wanted = ", ".join(f"{name} of at most {limit:g}" for name, limit in budgets.items())
    cheapest = ", ".join(f"{name} {min(r[name] for r in rows):g}" for name in budgets)
    raise UserError(f"no evaluated sub-network has {wanted}; the cheapest: {cheapest}")
  return max(fitting, key=lambda r: (metric.score(r[column]), -r["params"]))


def latencies(run: Run, state: TrainState, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The rows with `latency_ms`, the median time of one input on the present device."""
  inputs = [jnp.zeros(x.shape, x.dtype) for x in run.supernet.inputs]
  # Any statistics take the time of the right ones.
  images, timed = [x[:1] for x in evaluation.calibration(run, run.supernet, 1)], []
  for row in rows:
    subnet = run.supernet.space.subnet(row["subnet"])
    module, variables = evaluation.member(run.step, state, subnet, images)
    seen = [resized(x, subnet) for x in inputs]
    timed.append({**row, "latency_ms": cost.latency(module.apply, variables, *seen).median})
  return timed


def extract_run(workdir: str | os.PathLike[str], out: str | os.PathLike[str], subnet: str | None = None,
                max_params: float | None = None, max_flops: float | None = None,
                max_latency_ms: float | None = None, format: str = FORMATS[0]
                ) -> tuple[dict[str, Any], float]:
  """Writes one network of a run to a folder, and verifies it there.

  Args:
    workdir: A run with a checkpoint.
    out: The folder to write; an extracted network that stands there is replaced.
    subnet: Which one, as text; axes left out are as large as they may be.
    max_params: Largest number of parameters; without `subnet`, the best evaluated one (validation
      split) within all given budgets is taken.
    max_flops: Largest number of FLOPs for an input: an image, or a window of text.
    max_latency_ms: Longest median time of an input on the present device, in milliseconds.
    format: Of the folder, one of `FORMATS`; `nestnet.load` reads either.

  Returns:
    Its row, and the largest difference of logits, or of features where these are what networks are for, between
    the folder's network and the slice in place, on validation data.

  Raises:
    ValueError: Nothing fits the budgets, or the sub-network is outside the space, or the format cannot
      hold it.
  """
  if format not in FORMATS:
    raise one_of("format", format, FORMATS)
  budgets = {"params": max_params, "flops": max_flops, "latency_ms": max_latency_ms}
  budgets = {name: limit for name, limit in budgets.items() if limit is not None}
  if bool(subnet) == bool(budgets):
    raise UserError("give either a sub-network or budgets: --subnet, or any of --max_params, "
                    "--max_flops, --max_latency_ms")
  run, step, state = runs.opened(workdir)
  if subnet:
    _check_format(run, run.supernet.space.subnet(subnet), format)
    row = evaluation.evaluate(run, state, [run.supernet.space.subnet(subnet)])[0]
  else:
    rows = report.read_rows(pathlib.Path(workdir) / "subnets.json")
    if any(row.get("steps") != step for row in rows):
      raise UserError(f"{workdir}/subnets.json was not made at step {step}, where the run stands; first: "
                      f"python -m experiments.evaluate --workdir={workdir}")
    if "latency_ms" in budgets:
      rows = latencies(run, state, rows)
    row = dict(choose(rows, budgets))
  member = run.supernet.space.subnet(row["subnet"])
  _check_format(run, member, format)
  images = evaluation.calibration(run, run.supernet)
  module, variables = evaluation.member(run.step, state, member, images)
  record = {
    "subnet": str(member), "sizes": dict(member), "parent": {"run": str(workdir), "step": step},
    **({"init_from": str(run.parent.folder)} if run.parent else {}),
    "space": run.supernet.space.to_json(), "recipe": run.config["recipe"],
    "trained": provenance.trained(run, step), "data": run.config["data"], "costs_and_metrics": row}
  own = objective_part(run.supernet, run.step.axes["objective"], run.step.weights(state)["objective"], member)
  differences, variables = [], jax.device_get(variables)
  check = lambda folder: differences.append(verify(run, state, member, folder, images))
  if format == "hugging_face":
    hugging_face.write_folder(out, module, variables, card=record, check=check,
                              tokenizer_from=_tokenizer(run))
  else:
    save(out, module, variables, record, check=check,
         beside={"objective": jax.device_get(own)} if jax.tree.leaves(own) else None)
  return row, differences[0]


def _check_format(run: Run, member: Subnet, format: str) -> None:
  if format == "hugging_face":
    hugging_face.check_exportable(run.supernet.module(member), member, run.supernet.space)


def _tokenizer(run: Run) -> pathlib.Path | None:
  """Where the tokenizer of a run's text is: its own, or that of the weights it began with; None: bytes."""
  if own := run.config["data"].get("tokenizer"):
    own = pathlib.Path(own)
    # With what else is said of its tokens, where it stands in a network's folder.
    return own.parent if own.is_file() and hugging_face.is_folder(own.parent) else own
  parent = pathlib.Path(run.parent.folder) if run.parent else None
  return parent if parent and hugging_face.has_tokenizer(parent) else None


def verify(run: Run, state: TrainState, subnet: Subnet, folder: str | os.PathLike[str],
           calibration: Sequence[np.ndarray] = ()) -> float:
  """The largest difference of outputs: the network in `folder` against the slice in place.

  They are logits, or features where these are what the run's networks are for.

  Args:
    run: The run.
    state: Whose weights.
    subnet: Which member.
    folder: The extracted network.
    calibration: Batches of images that gave its statistics; the slice is calibrated on them anew.

  Raises:
    Failure: They differ by more than 1e-5 of the largest output.
  """
  some = {name: values[:VERIFIED] for name, values in evaluation.held(run, "validation").items()}
  inputs = resized(run.task.first(some), subnet)
  module, variables = load(folder, type(run.supernet.model))
  if hasattr(module, "dtype"):
    # Of another format it is that of the weights.
    module = module.clone(dtype=run.supernet.model.dtype)
  output = run.task.output
  alone = jax.jit(lambda v, x: module.apply(v, x)[output])(variables, inputs)
  place = Runnable(subnet, lambda s: run.step.member(s["state"], subnet), run.supernet.module(subnet))
  state = {"state": state}
  recorded = jax.jit(lambda s, x: moments(place, s, x))
  stats = {STATISTICS: average(functools.partial(recorded, state), calibration)} if len(calibration) else {}
  within = jax.jit(lambda s, stats, x: place.module.apply(place.cut(s) | stats, x)[output])(
    state, stats, inputs)
  alone, within = np.asarray(alone, np.float32), np.asarray(within, np.float32)
  difference = float(np.abs(alone - within).max())
  if difference > TOLERANCE * max(1.0, float(np.abs(within).max())):
    raise Failure(f"the extracted network differs from the slice in place by {difference}")
  return difference
