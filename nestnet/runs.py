"""A run: what a config means, and the folder that holds what came of it.

A workdir holds `config.json` (resolved), `metrics.jsonl`, TensorBoard events, `checkpoints/`,
`subnets.json`, `pareto.png` and, once all is finished, `done`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet import charts, cost, report, training
from nestnet.cli import check_fields
from nestnet.data import Batches, Dataset, arrays, augment, load
from nestnet.errors import MissingFileError, UserError
from nestnet.evaluators.classification import classification
from nestnet.execution import Supernet
from nestnet.files import atomic_write
from nestnet.imports import by_path
from nestnet.interop.folder import make_module
from nestnet.models import ARCHITECTURES, architecture
from nestnet.objectives import objective
from nestnet.optim import optimizer, schedule
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh
from nestnet.space import Space
from nestnet.steps import Recipe, Step, TrainState
from nestnet.subnet import Subnet

LISTED = 64
MAY_DIFFER = ("train.steps", "train.eval_every", "train.checkpoint_every", "mesh")
GROUPS = {
  "model": None,
  "space": None,
  "recipe": ("name", "sampler", "objective", "teacher", "ema", "select", "untouched", "subnet"),
  "data": ("name", "data_dir", "augment"),
  "optim": ("name", "learning_rate", "schedule", "warmup_steps", "weight_decay", "clip_norm", "momentum",
            "b1", "b2"),
  "train": ("steps", "batch_size", "checkpoint_every", "log_every", "eval_every"),
  "mesh": ("data",),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """A config turned into objects.

  Attributes:
    config: The resolved config, plain and JSON-able.
    dataset: Where the images come from.
    phases: What the loop does; the last one's supernet is the family that is evaluated.
  """

  config: dict[str, Any]
  dataset: Dataset
  phases: tuple[training.Phase, ...]

  @property
  def step(self) -> Step:
    return self.phases[-1].step

  @property
  def supernet(self) -> Supernet:
    return self.step.supernet

  @property
  def steps(self) -> int:
    return sum(phase.steps for phase in self.phases)


# From a config to objects.


def build(config: Mapping[str, Any]) -> Run:
  """Turns a config into a run; whatever is wrong with it is said here.

  Args:
    config: The groups `model`, `space`, `recipe`, `data`, `optim`, `train`, `mesh`, a `seed`, and
      optionally `phases`: a list of `{"steps": ..., "enter": "package.module:function", ...}` whose
      other keys override groups. A phase with an `optim` of its own begins with a fresh optimizer.

  Raises:
    ValueError: An unknown key or name, or sizes that do not go together.
    FileNotFoundError: The data set is not there.
  """
  config = plain(config)
  check_fields(config, {"seed": 0, "phases": (), **GROUPS}, "")
  for group in GROUPS:
    if group not in config:
      raise UserError(f"config.{group} is missing")
  _check_train(config["train"])
  dataset = load(config["data"]["name"], config["data"].get("data_dir") or None)
  mesh = make_mesh(config["mesh"])
  if config["train"]["batch_size"] % mesh.shape["data"]:
    raise UserError(f"config.train.batch_size: got {config['train']['batch_size']}, allowed is a "
                    f"multiple of the {mesh.shape['data']} devices of mesh.data")
  overrides = config.get("phases") or [{}]
  if len(overrides) > 1 and sum(p.get("steps", 0) for p in overrides) != config["train"]["steps"]:
    raise UserError("the steps of config.phases must add up to train.steps="
                    f"{config['train']['steps']}, got {[p.get('steps') for p in overrides]}")
  stretches = _stretches(overrides, config["train"]["steps"])
  phases = []
  for override, (steps, stretch, fresh) in zip(overrides, stretches):
    merged = _merge(config, {k: v for k, v in override.items() if k not in ("steps", "enter")})
    for group, known in GROUPS.items():
      if known:
        check_fields(merged[group], dict.fromkeys(known), group)
    enter = by_path(override["enter"], "transition") if override.get("enter") else None
    phases.append(training.Phase(steps, _step(merged, dataset, mesh, stretch), enter, fresh))
  return Run(config, dataset, tuple(phases))


def _stretches(phases: Sequence[Mapping], total: int) -> list[tuple[int, int, bool]]:
  """For each phase: its steps, those of the optimizer that it runs under, whether that begins here."""
  steps = [p.get("steps", total) for p in phases]
  begins = [i for i, p in enumerate(phases) if i == 0 or "optim" in p]
  lengths = {b: sum(steps[b:e]) for b, e in zip(begins, [*begins[1:], len(phases)])}
  return [(n, lengths[max(b for b in begins if b <= i)], i in begins[1:]) for i, n in enumerate(steps)]


def _step(config: dict[str, Any], dataset: Dataset, mesh: jax.sharding.Mesh, steps: int) -> Step:
  supernet = _supernet(config, dataset)
  recipe, optim, seed = config["recipe"], dict(config["optim"]), config.get("seed", 0)
  options = dict(recipe["sampler"])
  made = Recipe(
    sampler(options.pop("name"), supernet.space, seed, **options), objective(**recipe["objective"]),
    **{k: recipe[k] for k in ("teacher", "ema", "select", "untouched") if k in recipe})
  rate = schedule(optim.pop("schedule", "constant"), optim.pop("learning_rate"),
                  optim.pop("warmup_steps", 0), steps)
  return Step(supernet, made, optimizer(optim.pop("name"), rate, **optim), mesh, seed)


def _supernet(config: dict[str, Any], dataset: Dataset) -> Supernet:
  fields = dict(config["model"])
  name = fields.pop("name")
  made = (by_path(name, "model") if ":" in name else architecture(name))
  check_fields(fields, made)
  if "classes" in {f.name for f in dataclasses.fields(made)}:
    fields.setdefault("classes", dataset.classes)
  model = make_module(made, {k: v for k, v in fields.items() if v is not None})
  space = Space(**_space(config["space"], tuple(f.name for f in dataclasses.fields(made))))
  alone = config["recipe"].get("subnet")
  if alone or config["recipe"].get("name") == "separate":
    member = space.subnet(alone) if alone else space.largest
    model, space = model.clone(**member), Space(**{axis: (size,) for axis, size in member.items()})
  return _shared_supernet(model, space, (jax.ShapeDtypeStruct((1, *dataset.shape), jnp.float32),))


# Runs that differ in seed or recipe share one: checking its members takes about a second.
_shared_supernet = functools.lru_cache(maxsize=32)(Supernet)


def _space(config: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
  """Options of a space, axes in the order of the model's fields (a `ConfigDict` sorts its keys)."""
  order = lambda axis: fields.index(axis) if axis in fields else len(fields)
  options = {k: config[k] for k in sorted(config, key=order) if config[k] is not None}
  if isinstance(options.get("constraint"), str):
    options["constraint"] = by_path(options["constraint"], "constraint")
  return options


def _check_train(train: Mapping[str, Any]) -> None:
  for key, least in (("steps", 1), ("batch_size", 1), ("checkpoint_every", 1), ("log_every", 1),
                     ("eval_every", 0)):
    value = train.get(key)
    if not isinstance(value, int) or value < least:
      raise UserError(f"config.train.{key}: got {value}, allowed is a whole number of at least {least}")


def _merge(base: Any, override: Any) -> Any:
  if not isinstance(base, dict) or not isinstance(override, dict):
    return override
  return base | {k: _merge(base.get(k), v) for k, v in override.items()}


def plain(config: Any) -> Any:
  """A config as dicts, lists and scalars."""
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {str(k): plain(v) for k, v in config.items()}
  return [plain(v) for v in config] if isinstance(config, (tuple, list)) else config


# The workdir.


def train(config: Mapping[str, Any], workdir: str | os.PathLike[str], show_progress: bool = True) -> bool:
  """Trains, or goes on where `workdir` stands, then evaluates the family and draws it.

  Returns:
    Whether the run is finished; False after SIGTERM, when the same call goes on.

  Raises:
    ValueError: The config is wrong, or `workdir` holds a run of another config.
    nestnet.training.NonFinite: Training diverged.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / "done").exists():
    settle(build(config), workdir)
  if (workdir / "done").exists():
    return True
  run, state = trained(config, workdir, show_progress)
  if state is None:
    return False
  rows = evaluate(run, state, evaluated(run.supernet.space), show_progress=show_progress)
  report.write_rows(workdir / "subnets.json", rows)
  charts.pareto_chart(workdir / "pareto.png", rows, title=title(run), budget=budget_text(rows[0]))
  atomic_write(workdir / "done", "")
  return True


def trained(config: Mapping[str, Any], workdir: str | os.PathLike[str], show_progress: bool = True
            ) -> tuple[Run, TrainState | None]:
  """The first half of `train`: the run, and the state that it ends with; None after SIGTERM."""
  workdir, run = pathlib.Path(workdir), build(config)
  data = batches(run)
  settle(run, workdir)
  outcome = training.train(
    run.phases, data, workdir, checkpoint_every=run.config["train"]["checkpoint_every"],
    log_every=run.config["train"]["log_every"], eval_every=run.config["train"]["eval_every"],
    evaluate=functools.partial(_watch, run), show_progress=show_progress)
  return run, outcome.state if outcome.finished else None


def settle(run: Run, workdir: pathlib.Path) -> None:
  """Writes `config.json`, or checks that the one in `workdir` is of the same run.

  Raises:
    ValueError: Another config, with every key that differs; or the folder holds something else.
  """
  path = workdir / "config.json"
  if not path.exists():
    if workdir.exists() and any(workdir.iterdir()):
      raise UserError(f"{workdir} is not empty and holds no config.json; name an empty folder")
    atomic_write(path, _dump({"config": run.config, "changes": []}))
    return
  saved = _load(path)
  old, new = _flatten(saved["config"]), _flatten(plain(run.config))
  differing = {k: [old.get(k), new.get(k)] for k in sorted(old | new) if old.get(k) != new.get(k)}
  refused = [k for k in differing if not any(k == m or k.startswith(m + ".") for m in MAY_DIFFER)]
  if refused:
    lines = "\n".join(f"  {k}: {old.get(k)} there, {new.get(k)} asked for" for k in refused)
    raise UserError(f"{workdir} holds a run of another config; name another workdir, or undo:\n{lines}\n"
                    f"({', '.join(MAY_DIFFER)} may differ)")
  if differing:
    (workdir / "done").unlink(missing_ok=True)
    atomic_write(path, _dump({"config": run.config, "changes": [*saved["changes"], differing]}))


def opened(workdir: str | os.PathLike[str]) -> tuple[Run, int, TrainState]:
  """The run in `workdir`, the step of its newest intact checkpoint, and the state.

  Raises:
    FileNotFoundError: There is no run, or no checkpoint yet.
    ValueError: The run's files are damaged.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").is_file():
    raise MissingFileError(f"no run in {workdir}: config.json is missing")
  run = build(_load(workdir / "config.json")["config"])
  found = training.restore(run.phases, workdir)
  if found is None:
    raise MissingFileError(f"no checkpoint in {workdir / 'checkpoints'}; train first: python -m "
                           f"experiments.train --config=... --workdir={workdir}")
  return run, *found


def _load(path: pathlib.Path) -> dict[str, Any]:
  try:
    saved = json.loads(path.read_text())
    return {"config": saved["config"], "changes": saved["changes"]}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: {error}") from error


def _dump(content: Any) -> str:
  return json.dumps(content, indent=2) + "\n"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  return {k: v for key, value in tree.items()
          for k, v in _flatten(value, f"{prefix}.{key}" if prefix else key).items()}


# Data and evaluation.


def batches(run: Run) -> Batches:
  """The training batches of a run, this process's share."""
  data, train_config = run.config["data"], run.config["train"]
  return Batches(
    run.dataset, "train", train_config["batch_size"], run.config.get("seed", 0),
    augment.by_name(data.get("augment", "none")), jax.process_index(), jax.process_count())


def evaluated(space: Space) -> list[Subnet]:
  """The whole space where it has at most 64 members; else a sample of 64, spread over the cost."""
  if space.size <= LISTED:
    return list(space)
  members = dict.fromkeys([space.smallest, space.largest, *space.pool])
  for draw in range(50 * LISTED):
    if len(members) >= LISTED:
      break
    members[space.without_pool().sample(draw, by="cost")] = None
  return list(members)


def evaluate(run: Run, state: TrainState, subnets: Iterable[Subnet], splits: Sequence[str] = (
    "validation", "test"), show_progress: bool = False) -> list[dict[str, Any]]:
  """Rows of `subnets.json`: `subnet`, `params`, `flops` of an image, metrics, and their budget.

  Metrics of the test split have plain names (`accuracy`), those of others a prefix
  (`validation_accuracy`).
  """
  data = {split: arrays(run.dataset, split) for split in splits}
  spent = budget(run)
  progress = training.Progress(len(subnets := list(subnets)), label="evaluate") if show_progress else None
  rows = []
  for subnet in subnets:
    module, variables = run.supernet.module(subnet), run.step.member(state, subnet)
    row = {"subnet": str(subnet), **costs(run.supernet, subnet)}
    for split, examples in data.items():
      prefix = "" if split == "test" else f"{split}_"
      row |= {prefix + name: value for name, value in classification(module, variables, examples)}
    rows.append(row | spent)
    if progress:
      progress.update(len(rows), row)
  if progress:
    progress.close()
  return rows


def costs(supernet: Supernet, subnet: Subnet) -> dict[str, int]:
  """Parameters, and FLOPs of one image's forward pass."""
  module = supernet.module(subnet)
  return {"params": cost.count_params(module, *supernet.inputs),
          "flops": cost.flops(module, *supernet.inputs)}


def budget(run: Run) -> dict[str, Any]:
  """What training took: steps, images seen, FLOPs of all forward and backward passes, the seed."""
  batch_size, flops, start = run.config["train"]["batch_size"], 0, 0
  for phase in run.phases:
    flops += sum(map(step_flops(phase.step), range(start, start + phase.steps)))
    start += phase.steps
  return {"steps": run.steps, "images": run.steps * batch_size, "train_flops": int(flops * batch_size),
          "seed": run.config.get("seed", 0)}


def step_flops(step: Step) -> Callable[[int], int]:
  """The function from a step's number to its FLOPs, all passes, for one image of the batch."""
  supernet, sampler = step.supernet, step.recipe.sampler

  @functools.cache
  def flops(subnet: Subnet, train: bool) -> int:
    return _flops(supernet.module(subnet), supernet.inputs, train)

  def count(number: int) -> int:
    terms = sampler.terms(number)
    trained = sum(flops(term.candidates[0], True) for term in terms)
    tried = sum(flops(c, False) for term in terms if len(term.candidates) > 1 for c in term.candidates)
    taught = flops(supernet.space.largest, False) if step.runs_teacher(terms) else 0
    return trained + tried + taught

  return count


@functools.lru_cache(maxsize=1024)
def _flops(module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...], train: bool) -> int:
  return cost.flops(module, *inputs, train=train)


def budget_text(row: Mapping[str, Any]) -> str:
  """One line about what a row's network took to train."""
  return (f"{row['steps']} steps, {report.human(row['images'])} images, "
          f"{report.human(row['train_flops'])} training FLOPs, seed {row['seed']}")


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The columns of rows that a table of accuracies shows."""
  columns = ("subnet", "params", "flops", "latency_ms", "validation_accuracy", "accuracy")
  return [{c: row[c] for c in columns if c in row} for row in rows]


def title(run: Run) -> str:
  return f"{run.config['data']['name']}, {run.config['model']['name']}, {run.config['recipe']['name']}"


def _watch(run: Run, step: Step, state: TrainState) -> dict[str, float]:
  """Validation accuracy of the extremes while training."""
  examples, space = arrays(run.dataset, "validation"), step.supernet.space
  return {f"{which}_validation_{name}": value
          for which, subnet in (("largest", space.largest), ("smallest", space.smallest))
          for name, value in classification(
            step.supernet.module(subnet), step.member(state, subnet), examples)}
