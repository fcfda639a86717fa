"""From a config to the objects of a run; whatever is wrong with the config is said here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestnet import beside
from nestnet import phases as stretches
from nestnet import training
from nestnet.build_data import check_data, data_of, entries_of, stated
from nestnet.cli import check_fields
from nestnet.data import Batches, Dataset, Text, augmentation
from nestnet.data.crops import ENTRIES as OF_CROPS
from nestnet.errors import UserError, one_of
from nestnet.evaluators import TASKS, Task, task_of
from nestnet.execution import Supernet, module_of
from nestnet.imports import by_path
from nestnet.initial import Parent
from nestnet.interop.folder import make_module, module_fields
from nestnet.objectives import Objective, objective
from nestnet.optim import optimizer, rising, schedule
from nestnet.options import GROUPS, OF_MODEL, OPTIONAL, PHASE, RATE, REQUIRED, SCHEDULE, TOP, model_class
from nestnet.sampling import Context, Sampler, on_shards, sampler
from nestnet.sharding import batch_part, batch_sharding, batch_shards, make_mesh
from nestnet.space import Space
from nestnet.steps import Recipe, Step
from nestnet.subnet import Subnet


@dataclasses.dataclass(frozen=True)
class Run:
  """A config turned into objects.

  Attributes:
    config: The resolved config, plain and JSON-able.
    dataset: Where the images or the text come from.
    batches: This process's share of the training batches.
    phases: What the loop does; the last one's supernet is the family that is evaluated.
    also: Members that tables show beside those of the space.
  """

  config: dict[str, Any]
  dataset: Dataset | Text
  batches: Batches
  phases: tuple[training.Phase, ...]
  also: tuple[Subnet, ...] = ()

  @property
  def task(self) -> Task:
    return task_of(self.step.recipe.objective, self.dataset)

  @property
  def step(self) -> Step:
    return self.phases[-1].step

  @property
  def supernet(self) -> Supernet:
    return self.step.supernet

  @property
  def steps(self) -> int:
    return sum(phase.steps for phase in self.phases)

  @property
  def parent(self) -> Parent | None:
    """The weights that the run begins with, where they are not random."""
    enter = self.phases[0].enter
    return enter if isinstance(enter, Parent) else None


def build(config: Mapping[str, Any], mesh: Mapping[str, int] | None = None) -> Run:
  """Turns a config into a run; whatever is wrong with it is said here.

  Args:
    config: The groups `model`, `space`, `recipe`, `data`, `optim`, `train`, `mesh`, a `seed`, and
      optionally `eval`, `init_from` and `phases`. `init_from` is a folder whose weights the run begins
      with: an extracted network, or a decoder in Hugging Face's form. `phases` is a list of dicts. Each
      has its `steps`, or a `share` of `train.steps`; may name a function that makes the transition at its
      beginning, `enter="package.module:function"`, or `{"name": "package.module:function", ...}` with
      options of that function; and how many of the largest choices of axes are open in it,
      `open={"kernel": 1}`. Its other keys override groups. A phase with an `optim` of its own begins with
      a fresh optimizer.
    mesh: What to lay it over in place of the config's, to look at it and not to train: what only training
      needs is then neither built nor checked.

  Raises:
    ValueError: An unknown key or name, or sizes that do not go together.
    FileNotFoundError: The data set is not there.
  """
  config = plain(config)
  _check(config)
  dataset = data_of(config)
  # Of data that may differ from machine to machine the run says which it saw.
  config["data"] |= dataset.recorded
  here = make_mesh(mesh or config["mesh"])
  if mesh is None:
    # What -1 stood for is written out: who opens the run elsewhere knows how many data shards drew.
    config["mesh"] = {axis: here.shape[axis] for axis in config["mesh"]}
  phases = _phases(config, dataset, here, trains=mesh is None)
  batches = _batches(config, dataset, here, entries_of(dataset, phases))
  run = Run(config, dataset, batches, phases, beside.members(config, phases[-1].step.supernet))
  if run.task.check:
    run.task.check(dataset, config.get("eval") or {})
  return run


def planned(config: Mapping[str, Any], devices: Sequence[Any]
            ) -> tuple[tuple[training.Phase, ...], dict[str, jax.ShapeDtypeStruct]]:
  """What a run would do on devices that need not be here: its phases, and a batch in the abstract.

  Nothing is read of the data set where the config states `data.shape` and `data.classes`, or
  `data.length` and `data.vocab`.

  Raises:
    ValueError: As `build`.
    FileNotFoundError: The data set is not there and the config does not state them.
  """
  config = plain(config)
  _check(config)
  size = config["train"]["batch_size"]
  dataset = stated(config["data"]) or data_of(config)
  mesh = make_mesh(config["mesh"], devices)
  config["mesh"] = dict(mesh.shape)
  phases = _phases(config, dataset, mesh)
  laid = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
  entries = {name: dataset.entries[name] for name in entries_of(dataset, phases)}
  return phases, {name: laid((size, *shape), kind) for name, (shape, kind) in entries.items()}


def _phases(config: dict[str, Any], dataset: Dataset | Text, mesh: jax.sharding.Mesh, trains: bool = True
            ) -> tuple[training.Phase, ...]:
  size, parts = config["train"]["batch_size"], config["train"].get("accumulate", 1)
  if size % (batch_shards(mesh) * parts):
    raise UserError(f"config.train.batch_size: got {size}, allowed is a multiple of the {batch_shards(mesh)} "
                    f"devices of mesh.data and mesh.fsdp{f', times train.accumulate={parts}' * (parts > 1)}")
  overrides, settled, phases, first = config.get("phases") or [{}], [], [], 0
  stretched = _stretches(overrides, phase_steps(config))
  # All that needs no model is checked for every phase before the first model is built.
  for number, (override, (steps, stretch, _)) in enumerate(zip(overrides, stretched)):
    with _in_phase(number, len(overrides), steps):
      merged = _merge(config, {k: v for k, v in override.items() if k not in PHASE})
      _check(merged)
      merged["space"] = stretches.opened(merged["space"], override.get("open") or {})
      settled.append((_transition(override.get("enter")), merged, _rate(merged["optim"], stretch)))
  for number, ((enter, merged, rate), (steps, stretch, fresh)) in enumerate(zip(settled, stretched)):
    with _in_phase(number, len(overrides), steps):
      if number == 0 and config.get("init_from"):
        enter = _parent(config["init_from"], merged, dataset, enter)
      step = _step(merged, dataset, mesh, rate, (first, steps), stretch, trains)
      if step.recipe.teacher == "frozen" and not phases and not enter:
        raise UserError("config.recipe.teacher=frozen: the first phase has nothing trained to freeze; "
                        "put a phase before it, or name the phase's `enter` that sets a teacher, or "
                        "config.init_from")
    opens = stretches.widened(settled[number - 1][1]["space"], merged["space"]) if number else ()
    phases.append(training.Phase(steps, step, enter, fresh, tuple(opens)))
    first += steps
  return tuple(phases)


def _parent(folder: str, config: dict[str, Any], dataset: Dataset, enter: training.Transition | None
            ) -> Parent:
  """The weights of a folder that holds all that the config's model and space describe."""
  alone = config["recipe"].get("subnet")
  recipe = {key: value for key, value in config["recipe"].items() if key != "subnet"}
  family = _supernet(config | {"recipe": recipe}, dataset)
  return Parent(folder, family, family.space.subnet(alone) if alone else None, enter)


@contextlib.contextmanager
def _in_phase(number: int, count: int, steps: int) -> Iterator[None]:
  """Names the phase, where there are several, in what is said to be wrong."""
  try:
    yield
  except UserError as error:
    if count == 1:
      raise
    raise UserError(f"phase {number + 1} of {count}, config.phases[{number}], which has "
                    f"{steps} step{'s' * (steps > 1)}: {error}") from error


def _transition(enter: str | Mapping[str, Any] | None) -> training.Transition | None:
  if not enter:
    return None
  options = {"name": enter} if isinstance(enter, str) else dict(enter)
  name = options.pop("name", "")
  make = by_path(name, "transition")
  accepted = inspect.signature(make).parameters
  for option in options:
    if option not in accepted:
      raise one_of(f"option of the transition {name}", option, accepted)
  return make(**options)


def _check(config: Mapping[str, Any]) -> None:
  """Every key is known, and those without which nothing can be built are there."""
  check_fields(config, TOP, "")
  phases = config.get("phases") or []
  for number, phase in enumerate(phases if isinstance(phases, list) else [phases]):
    if not isinstance(phases, list) or not isinstance(phase, Mapping):
      where = f"[{number}]" * isinstance(phases, list)
      raise UserError(f"config.phases{where}: got {phase!r}; allowed is a list of dicts, such as "
                      "[{'share': 2, 'open': {'layers': 1}}, {'share': 1}]")
    check_fields(phase, PHASE | GROUPS, f"phases[{number}]")
  for group, known in GROUPS.items():
    if group in OPTIONAL and not config.get(group):
      continue
    if group not in config:
      raise UserError(f"config.{group} is missing")
    if group not in OF_MODEL:
      check_fields(config[group], known, group)
    for key in REQUIRED.get(group, ()):
      if config[group].get(key) in (None, ""):
        raise UserError(f"config.{group}.{key} is missing")
  for part in ("sampler", "objective"):
    if not config["recipe"][part].get("name"):
      raise UserError(f"config.recipe.{part}.name is missing")
  for key, least in (("steps", 1), ("batch_size", 1), ("checkpoint_every", 1), ("log_every", 1),
                     ("eval_every", 0), ("accumulate", 1)):
    value = config["train"].get(key, 1 if key == "accumulate" else None)
    if not isinstance(value, int) or value < least:
      raise UserError(f"config.train.{key}: got {value}, allowed is a whole number of at least {least}")
  for key, value in (config.get("eval") or {}).items():
    if key == "members":
      if not (isinstance(value or [], list) and all(isinstance(x, str) and x.strip() for x in value or [])):
        raise UserError(f"config.eval.members: got {value!r}, allowed is a tuple of texts, such as "
                        "('mlp=64', 'mlp=64:64:128:128')")
    elif key not in ("mix", "knn_k", "readouts") and (not isinstance(value, int) or value < 1):
      raise UserError(f"config.eval.{key}: got {value}, allowed is a whole number of at least 1")
  check_data(config["data"])
  for phase in config.get("phases") or ():
    check_fields(phase, dict.fromkeys((*PHASE, "model", "space", "recipe", "optim")), "phases")
  phase_steps(config)


def phase_steps(config: Mapping[str, Any], steps: int | None = None) -> list[int]:
  """The steps of each phase of a run of `train.steps`, or of `steps`.

  Raises:
    ValueError: The phases do not make up so many.
  """
  total = config["train"]["steps"] if steps is None else steps
  return stretches.lengths(config["phases"], total) if config.get("phases") else [total]


def _stretches(phases: Sequence[Mapping], steps: Sequence[int]) -> list[tuple[int, int, bool]]:
  """For each phase: its steps, those of the optimizer that it runs under, whether that begins here."""
  begins = [i for i, p in enumerate(phases) if i == 0 or "optim" in p]
  lengths = {b: sum(steps[b:e]) for b, e in zip(begins, [*begins[1:], len(phases)])}
  return [(n, lengths[max(b for b in begins if b <= i)], i in begins[1:]) for i, n in enumerate(steps)]


def _rate(optim: Mapping[str, Any], steps: int) -> optax.Schedule:
  """The learning rate over the steps of an optimizer."""
  warmup = optim.get("warmup_steps", 0) + round(optim.get("warmup_share", 0.0) * steps)
  highest = optim["learning_rate"] * optim.get("factor", 1.0)
  return schedule(optim.get("schedule", "constant"), highest, warmup, steps,
                  **{k: optim[k] for k in SCHEDULE if k in optim})


def _step(config: dict[str, Any], dataset: Dataset | Text, mesh: jax.sharding.Mesh, rate: optax.Schedule,
          phase: tuple[int, int], stretch: int, trains: bool) -> Step:
  """The step of a phase, given its learning rate, its own first step and number of steps, and how many steps
  its optimizer makes."""
  recipe, seed = config["recipe"], config.get("seed", 0)
  minimised = _objective(recipe["objective"], dataset)
  supernet = _supernet(config, dataset)
  optim = {k: v for k, v in config["optim"].items() if k not in RATE}
  shards = config["mesh"].get("data", 1) if config["train"].get("per_shard_subnets") else 1
  passes = minimised.passes({k: shape for k, (shape, _) in dataset.entries.items()}) if minimised.passes else ()
  for shape in {p.shape for p in passes}:
    # A crop that the network cannot read is told of here.
    jax.eval_shape(supernet.model.apply, supernet.shapes, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
  for key in ("ema", "ema_end"):
    if not 0 <= (value := recipe.get(key) or 0.0) <= 1:
      raise UserError(f"config.recipe.{key}: got {value}, allowed is 0 to 1")
  made = Recipe(
    _sampler(recipe["sampler"], supernet.space, seed, shards, Context(*phase, _cost(supernet))),
    minimised, passes=passes, ema=rising(recipe.get("ema", 0.999), recipe.get("ema_end"), *phase),
    **{k: recipe[k] for k in ("teacher", "hands_out", "select", "judge", "untouched") if k in recipe})
  if optim.get("coupled") and made.untouched == "decay_only":
    raise UserError("config.recipe.untouched=decay_only with config.optim.coupled=True, whose decay is a part of "
                    "the gradient; allowed: untouched of update or freeze, or coupled=False")
  return Step(supernet, made, optimizer(optim.pop("name"), rate, steps=stretch, **optim), mesh, seed,
              config["train"].get("execution", "auto"), config["train"].get("accumulate", 1), trains)


@functools.lru_cache(maxsize=32)
def _cost(supernet: Supernet) -> Callable[[Subnet], float]:
  """The FLOPs of members, counted when one is asked for."""
  @functools.cache
  def counter():
    # Evaluation is built on this module.
    from nestnet import evaluation
    return evaluation.member_flops(supernet)

  return functools.cache(lambda subnet: counter()(subnet, False))


def _sampler(options: Mapping[str, Any], space: Space, seed: int, shards: int, context: Context) -> Sampler:
  """One sampler; or one for each data shard, with seeds that no other run's shards have."""
  options = dict(options) | {"context": context}
  name = options.pop("name")
  if shards == 1:
    return sampler(name, space, seed, **options)
  return on_shards([sampler(name, space, seed * shards + k, **options) for k in range(shards)])


def _objective(options: Mapping[str, Any], dataset: Dataset | Text) -> Objective:
  made = objective(**options)
  if missing := [name for name in made.needs if name not in dataset.entries]:
    crops = f", or with config.data.crops that make {missing[0]}" * (missing[0] in OF_CROPS)
    raise UserError(f"config.recipe.objective.name={options['name']} learns from {', '.join(made.needs)}; "
                    f"{dataset.name} has {', '.join(dataset.entries)}, no {missing[0]}; allowed with it: "
                    f"{TASKS[dataset.task].objective}{crops}")
  return made


def _supernet(config: dict[str, Any], dataset: Dataset | Text) -> Supernet:
  fields = dict(config["model"])
  name = fields.pop("name")
  made = model_class(name)
  check_fields(fields, made)
  # What is used by its features has no head, unless the config asks for one.
  headless = task_of(objective(**config["recipe"]["objective"]), dataset).output != "logits"
  for key, size in dataset.sizes.items():
    size = 0 if headless else size
    if key in {f.name for f in dataclasses.fields(made)} and fields.setdefault(key, size) < size:
      raise UserError(f"config.model.{key}: got {fields[key]}, allowed is at least {size}, as {dataset.name} "
                      "has it; or leave it out")
  model = make_module(made, {k: v for k, v in fields.items() if v is not None})
  # What could not be written at extraction is said before training.
  module_fields(model)
  space = Space(**_space(config["space"], tuple(f.name for f in dataclasses.fields(made))))
  if "subnet" in config["recipe"]:
    member = space.subnet(config["recipe"]["subnet"])
    model = module_of(model, member)
    space = Space(couple={" ".join(member): [tuple(member.values())]})
  one = {name: jax.ShapeDtypeStruct((1, *shape), kind) for name, (shape, kind) in dataset.entries.items()}
  return _shared_supernet(model, space, (jax.eval_shape(TASKS[dataset.task].inputs, one),))


# Runs that differ in seed or recipe share one: checking its members takes about a second.
_shared_supernet = functools.lru_cache(maxsize=32)(Supernet)


def _space(config: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
  """Options of a space, axes in the order of the model's fields (a `ConfigDict` sorts its keys)."""
  order = lambda axis: fields.index(axis) if axis in fields else len(fields)
  options = {k: config[k] for k in sorted(config, key=order) if config[k] is not None}
  if isinstance(options.get("constraint"), str):
    options["constraint"] = by_path(options["constraint"], "constraint")
  return options


def _merge(base: Any, override: Any) -> Any:
  if not isinstance(base, dict) or not isinstance(override, dict):
    return override
  if override.get("name", base.get("name")) != base.get("name"):
    # Options belong to what is named.
    return override
  return base | {k: _merge(base.get(k), v) for k, v in override.items()}


def plain(config: Any) -> Any:
  """A config as dicts, lists and scalars."""
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {str(k): plain(v) for k, v in config.items()}
  return [plain(v) for v in config] if isinstance(config, (tuple, list)) else config


def _batches(config: Mapping[str, Any], dataset: Dataset | Text, mesh: jax.sharding.Mesh,
             entries: Sequence[str]) -> Batches:
  data = config["data"]
  return Batches(dataset, "train", config["train"]["batch_size"], config.get("seed", 0),
                 augmentation(data.get("augment", "none")), *batch_part(mesh), entries=entries)
