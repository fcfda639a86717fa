"""The folder of a run: started, gone on with, opened.

A workdir holds `config.json` (resolved), `metrics.jsonl`, TensorBoard events, `checkpoints/`,
`subnets.json`, `pareto.png`, where features are evaluated `references.json`, and, once all is finished, `done`.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from nestnet import charts, evaluation, processes, provenance, references, report, training
from nestnet.build import Run, build
from nestnet.errors import MissingFileError, UserError
from nestnet.checkpoint import Checkpoints
from nestnet.files import atomic_write
from nestnet.steps import TrainState

MAY_DIFFER = ("train.steps", "train.eval_every", "train.checkpoint_every", "mesh", "eval")


def train(config: Mapping[str, Any], workdir: str | os.PathLike[str], show_progress: bool = True) -> bool:
  """Trains, or goes on where `workdir` stands, then evaluates the family and draws it.

  Returns:
    Whether the run is finished; False after SIGTERM, when the same call goes on.

  Raises:
    ValueError: The config is wrong, or `workdir` holds a run of another config.
    nestnet.training.NonFinite: Training diverged.
  """
  workdir, run = pathlib.Path(workdir), build(config)
  processes.agree(lambda: _identity(run), "every host runs the same command with the same software")
  if begun(run, workdir):
    return True
  if show_progress and run.dataset.about and processes.first():
    print(f"data: {run.dataset.about}", file=sys.stderr, flush=True)
  state = trained(run, workdir, show_progress)
  if state is None:
    return False
  rows = evaluation.evaluate(run, state, evaluation.evaluated(run), show_progress=show_progress)
  beside = references.references(run)
  processes.led(lambda: _finish(run, workdir, rows, beside))
  return True


def _finish(run: Run, workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]],
            beside: Sequence[Mapping[str, Any]]) -> None:
  """Writes what a run ends with."""
  report.write_rows(workdir / "subnets.json", rows)
  references.write(workdir, beside)
  charts.pareto_chart(workdir / "pareto.png", rows, metric=run.task.metric.name, title=evaluation.title(run),
                      budget=evaluation.budget_text(rows[0]))
  atomic_write(workdir / "done", "")


def trained(run: Run, workdir: pathlib.Path, show_progress: bool = True) -> TrainState | None:
  """The state with which training ends, in a folder that is settled; None after SIGTERM."""
  options = run.config["train"]
  outcome = training.train(
    run.phases, run.batches, workdir, checkpoint_every=options["checkpoint_every"],
    log_every=options["log_every"], eval_every=options["eval_every"],
    evaluate=functools.partial(evaluation.watch, run), show_progress=show_progress)
  return outcome.state if outcome.finished else None


def begun(run: Run, workdir: pathlib.Path) -> bool:
  """`settle` of a run; one that has still to begin looks at the weights that it begins with.

  Raises:
    ValueError: As `settle`; or these weights are not there, or another network's.
  """
  if run.parent and not _made(workdir):
    run.parent.check()
  return settle(run.config, workdir)


def settle(config: Mapping[str, Any], workdir: pathlib.Path) -> bool:
  """Writes `config.json`, or checks that the one in `workdir` is of the same run.

  Returns:
    Whether that run is finished.

  Raises:
    ValueError: Another config, with every key that differs; or the folder holds something else; or
      the processes of the job see different folders.
  """
  made = _made(workdir)
  finished = processes.led(lambda: _settled(config, workdir, made))
  # Network file systems show a folder as it was up to a minute ago.
  processes.agree(
    lambda: {"config.json is there": (workdir / "config.json").exists(), "checkpoints": _made(workdir)},
    f"{workdir} must be one folder that every host sees", tries=60)
  return finished


def _made(workdir: pathlib.Path) -> list[int]:
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.steps


def _settled(config: Mapping[str, Any], workdir: pathlib.Path, made: Sequence[int]) -> bool:
  """What `settle` does in the process that writes."""
  path = workdir / "config.json"
  if not path.exists():
    if workdir.exists() and any(workdir.iterdir()):
      raise UserError(f"{workdir} is not empty and holds no config.json; name an empty folder")
    atomic_write(path, _dump({"config": config, "changes": []}))
    return False
  saved = _load(path)
  differing = _differing(saved["config"], config)
  # Phases would begin and end elsewhere.
  phased = config.get("phases") or saved["config"].get("phases")
  may = [key for key in MAY_DIFFER if key != "train.steps" or not phased]
  refused = [k for k in differing if not any(k == m or k.startswith(m + ".") for m in may)]
  if refused:
    lines = "\n".join(f"  {k}: {_short(old)} there, {_short(new)} asked for"
                      for k, (old, new) in differing.items() if k in refused)
    why = "; train.steps may not, as it says where phases begin and end" * ("train.steps" in refused)
    raise UserError(f"{workdir} holds a run of another config; name another workdir, or undo:\n{lines}\n"
                    f"({', '.join(may)} may differ{why})")
  training.check_length(made, config["train"]["steps"], workdir)
  if differing:
    if "train.steps" in differing:
      (workdir / "done").unlink(missing_ok=True)
    atomic_write(path, _dump({"config": config, "changes": [*saved["changes"], differing]}))
  return (workdir / "done").exists()


def _identity(run: Run) -> dict[str, Any]:
  """What must be the same in every process: software, config, and what its samplers make of it."""
  facts = {f"config.{name}": value for name, value in _flatten(run.config).items()}
  start = 0
  for phase in run.phases:
    for step in range(start, start + min(phase.steps, 8)):
      terms = phase.step.recipe.sampler.terms(step)
      facts[f"sub-networks of step {step}"] = [" or ".join(map(str, t.candidates)) for t in terms]
    start += phase.steps
  return facts | {"version of jax": jax.__version__}


def opened(workdir: str | os.PathLike[str]) -> tuple[Run, int, TrainState]:
  """The run in `workdir`, the step of its newest intact checkpoint, and the state.

  Of a run that is not at its end a line on stderr says so, and what has trained.

  Raises:
    FileNotFoundError: There is no run, or no checkpoint yet.
    ValueError: The run's files are damaged.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").is_file():
    raise MissingFileError(f"no run in {workdir}: config.json is missing")
  # Whatever trained it, one device looks at it.
  run = build(_load(workdir / "config.json")["config"], {"data": 1})
  found = training.restore(run.phases, workdir)
  if found is None:
    raise MissingFileError(f"no checkpoint in {workdir / 'checkpoints'}; train first: python -m "
                           f"experiments.train --config=... --workdir={workdir}")
  step, state = found
  provenance.tell(run, step)
  return run, step, state


def _load(path: pathlib.Path) -> dict[str, Any]:
  try:
    saved = json.loads(path.read_text())
    return {"config": saved["config"], "changes": saved["changes"]}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error}") from error


def _dump(content: Any) -> str:
  return json.dumps(content, indent=2) + "\n"


def _flatten(tree: Any) -> dict[str, Any]:
  return {key: value for key, (_, value) in _differing({}, tree).items()}


def _differing(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
  """What differs between two configs, by key, such as `phases[1].share`; None: it is not there."""
  if old == new:
    return {}
  if isinstance(old, Mapping | None) and isinstance(new, Mapping | None):
    old, new = old or {}, new or {}
    pairs = [(f"{key}.{k}" if key else k, old.get(k), new.get(k)) for k in sorted(old | new)]
  elif all(isinstance(x, list) and any(isinstance(y, Mapping) for y in x) for x in (old, new)):
    pairs = [(f"{key}[{i}]", *pair) for i, pair in enumerate(itertools.zip_longest(old, new))]
  else:
    return {key: [old, new]}
  # A phase that only one of them has is one thing, not many.
  whole = lambda name, *pair: None in pair and name.endswith("]")
  return {k: v for name, *pair in pairs
          for k, v in ({name: pair} if whole(name, *pair) else _differing(*pair, name)).items()}


def _short(value: Any) -> str:
  return textwrap.shorten(str(value), 120)
