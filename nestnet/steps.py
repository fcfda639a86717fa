"""One training step: gradients of the sub-networks that a recipe names, then one update.

A sub-network's gradient is a compiled program that adds to donated sums, so that a step may train any
combination of them: a program for each sub-network, or one to which the sub-network is data. A fixed
short list runs as one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from nestnet import execution
from nestnet.axes import Axes, is_axes
from nestnet.errors import UserError, one_of
from nestnet.execution import Supernet
from nestnet.gradients import Gradients, Program, as_data
from nestnet.objectives.base import Objective, Pass
from nestnet.one_program import OneProgram
from nestnet.sampling import FIXED_LIMIT, Member, Sampler, Term
from nestnet.sharding import batch_sharding, batch_shards, check_mesh, place, replicated
from nestnet.subnet import Subnet

Optimizer = Callable[[Any], optax.GradientTransformation]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
  """All that a run carries from step to step.

  Attributes:
    step: Number of updates made.
    trained: `{"model": params, "objective": params}`.
    fixed: The model's collections beside its parameters, such as `constants`.
    opt_state: The optimizer's state.
    teacher: A frozen or averaged copy of `trained`, or None.
    objective: The objective's untrained state.
  """

  step: jax.Array
  trained: dict[str, Any]
  fixed: dict[str, Any]
  opt_state: Any
  teacher: dict[str, Any] | None
  objective: Any


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Which sub-networks train, on what, and taught by whom.

  Attributes:
    sampler: `step -> terms`.
    objective: What each of them minimises.
    teacher: Whose outputs taught terms see, gradients stopped: the `"largest"` of this very step
      (in-place distillation), a `"frozen"` copy, or the moving average `"ema"` of the largest.
    ema: Decay of that average, or a function from the number of a step to it.
    passes: What the networks of a step are run on for each example of a batch, where that is not its input.
    hands_out: Whose weights members are evaluated and extracted with: the `"trained"` ones, or the
      `"teacher"`'s.
    select: Which of a term's candidates trains: that of `"lowest"` or `"highest"` loss.
    judge: Which loss that is: the term's `"own"`, or that with the `"labels"` even where it is taught.
    untouched: What befalls weights that no sub-network of the step used: `"update"`: the
      optimizer's ordinary step, whose momentum moves them; `"decay_only"`: weight decay alone;
      `"freeze"`: nothing. In the latter two their optimizer state stays as it was.
  """

  sampler: Sampler
  objective: Objective
  teacher: str = "largest"
  ema: float | Callable[[jax.Array], jax.Array] = 0.999
  passes: tuple[Pass, ...] = ()
  hands_out: str = "trained"
  select: str = "lowest"
  judge: str = "own"
  untouched: str = "update"

  def __post_init__(self):
    for option, allowed in (("teacher", ("largest", "frozen", "ema")), ("select", ("lowest", "highest")),
                            ("hands_out", ("trained", "teacher")), ("judge", ("own", "labels")),
                            ("untouched", ("update", "decay_only", "freeze"))):
      if getattr(self, option) not in allowed:
        raise one_of(f"recipe.{option}", getattr(self, option), allowed)
    if not callable(self.ema) and not 0 <= self.ema <= 1:
      raise UserError(f"recipe.ema: got {self.ema}, allowed is 0 to 1")
    if self.hands_out == "teacher" and self.teacher == "largest":
      raise UserError("recipe.hands_out=teacher: the largest of a step has no weights of its own; allowed with "
                      "it: recipe.teacher of ema or frozen")


class Step:
  """The compiled step of one supernet, recipe and optimizer.

  Args:
    supernet: The family.
    recipe: What trains.
    optimizer: Makes the optax transformation from the axis names of what trains.
    mesh: The device mesh.
    seed: Of initial values and of dropout.
    execution: How sub-networks run: `"slice"`: a program for each; `"one_program"`: one for all;
      `"auto"`: slices where the recipe trains a fixed list or the members are few.
    accumulate: In how many parts a batch is run, one after another, before the update; each needs the
      memory of its own part alone.
    trains: Whether updates are to come: what only they need is then looked at right away.
  """

  def __init__(self, supernet: Supernet, recipe: Recipe, optimizer: Optimizer, mesh: jax.sharding.Mesh,
               seed: int = 0, execution: str = "auto", accumulate: int = 1, trains: bool = True):
    self.supernet, self.recipe, self.mesh, self.accumulate = supernet, recipe, mesh, accumulate
    self._key = jax.random.key(seed)
    objective_axes = []

    def own():
      params, axes, state = recipe.objective.init(jax.random.key(0), supernet.model, supernet.space)
      objective_axes.append(axes)
      return params, state

    shapes, _ = jax.eval_shape(own)
    self.axes = {"model": supernet.axes["params"], "objective": jax.tree.map(
      Axes.of, objective_axes[0], is_leaf=is_axes)}
    unnamed = jax.tree.structure(shapes) != jax.tree.structure(self.axes["objective"], is_leaf=is_axes)
    if unnamed:
      raise UserError("the objective's axes must name every leaf of its parameters: got "
                      f"{self.axes['objective']} for {shapes}")
    self.tx = optimizer(self.axes)
    self._shapes = jax.eval_shape(self._state, supernet.shapes, self._key)
    check_mesh(mesh, self.axes, self._shapes.trained, supernet.space)
    # Said of every result: a program that found its arguments laid out anew would compile twice.
    self._places = self._placed(self._shapes)
    sums = self._sums_of(replicated(mesh), self._places.trained)
    self._execution, self._sums_places = execution, sums
    self._update = jax.jit(self._updated, donate_argnums=(0, 1), out_shardings=(self._places, sums, None))
    self._whole = jax.jit(self._fixed_step, donate_argnums=0, out_shardings=(self._places, None))
    self._start = jax.jit(self._zeros, out_shardings=sums)
    self._split = jax.jit(self._parts, out_shardings=batch_sharding(mesh))
    self._sums = None
    if trains:
      # Whether members can be data takes as long to see as to trace one.
      self._gradients

  @functools.cached_property
  def _gradients(self) -> Gradients:
    data = as_data(self._execution, self.supernet, self.recipe.sampler)
    return Gradients(self.supernet, self.recipe.objective, self.axes, self.mesh, data, self._sums_places)

  def init(self) -> TrainState:
    """A fresh state, laid over the mesh."""
    return jax.jit(self._fresh, out_shardings=self._places)(self._key)

  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    return _abstract(self._shapes, self._places)

  def _placed(self, shapes: TrainState) -> TrainState:
    """Where a state lies: optimizer state and averages with their weights, all else everywhere."""
    everywhere = replicated(self.mesh)
    trained = place(self.axes, shapes.trained, self.mesh)
    opt_state = optax.tree_map_params(
      self.tx, lambda x, weight, sharding: sharding if x.shape == weight.shape else everywhere,
      shapes.opt_state, shapes.trained, trained, transform_non_params=lambda _: everywhere)
    whole = lambda tree: jax.tree.map(lambda _: everywhere, tree)
    return TrainState(step=everywhere, trained=trained, fixed=whole(shapes.fixed), opt_state=opt_state,
                      teacher=None if shapes.teacher is None else trained, objective=whole(shapes.objective))

  def _sums_of(self, loss: Any, trained: Any) -> dict[str, Any]:
    """What a step adds up: a loss, and trees like `trained`."""
    touched = {} if self.recipe.untouched == "update" else {"touched": trained}
    return {"loss": loss, "grads": trained} | touched

  def _fresh(self, key) -> TrainState:
    model_key, objective_key = jax.random.split(jax.random.fold_in(key, 0))
    return self._state(self.supernet.init(model_key), objective_key)

  def _state(self, variables, key) -> TrainState:
    """The state with which variables of the model begin to train."""
    own, _, objective_state = self.recipe.objective.init(key, self.supernet.model, self.supernet.space)
    trained = {"model": variables.pop("params"), "objective": own}
    return TrainState(
      step=jnp.zeros((), jnp.int32), trained=trained, fixed=variables, opt_state=self.tx.init(trained),
      teacher=self.teacher_of(trained), objective=objective_state)

  def teacher_of(self, trained: Any) -> Any:
    """The copy of `trained` that the recipe keeps as a teacher, or None."""
    if self.recipe.teacher == "largest":
      return None
    return jax.tree.map(jnp.copy, trained)

  @property
  def one(self) -> OneProgram | None:
    """The one program of all members, where there is one."""
    return self._gradients.one

  def member(self, state: TrainState, subnet: Subnet) -> dict[str, Any]:
    """The variables of a sub-network as it is evaluated and extracted."""
    return execution.member(self.supernet, self.recipe.objective, self.axes["objective"],
                            self.weights(state), state.fixed, subnet)

  def weights(self, state: TrainState) -> dict[str, Any]:
    """The weights that members are evaluated and extracted with: `{"model": ..., "objective": ...}`."""
    return state.teacher if self.recipe.hands_out == "teacher" else state.trained

  def __call__(self, state: TrainState, batch: Mapping[str, jax.Array], step: int
               ) -> tuple[TrainState, Metrics]:
    """Makes update number `step` on a batch; `state` is donated.

    Returns:
      The next state, and scalars still on the device: `loss` (the sum over sub-networks),
      `grad_norm`, and the objective's metrics of the first sub-network.
    """
    if self.is_whole:
      return self._whole(state, batch)
    terms = self.recipe.sampler.terms(step)
    sums, self._sums = self._sums or self._start(state.trained), None
    state, self._sums, metrics = self._make(
      terms, state, batch, sums, lambda program, *arguments: program.call(*arguments))
    return state, metrics

  @functools.cached_property
  def is_whole(self) -> bool:
    """Whether the whole step is one program, for a short list of slices that never changes."""
    terms = self.recipe.sampler.terms(0) if self.recipe.sampler.fixed else ()
    return (0 < len(terms) <= FIXED_LIMIT and all(len(t.candidates) == 1 for t in terms)
            and self.accumulate == 1 and self.one is None)

  def _fixed_step(self, state, batch):
    """The whole step in one program."""
    state, _, metrics = self._make(
      self.recipe.sampler.terms(0), state, batch, self._zeros(state.trained),
      lambda program, *arguments: program.computes(*arguments))
    return state, metrics

  def programs(self, terms: tuple[Term, ...], batch: Mapping[str, jax.ShapeDtypeStruct],
               run: Callable[..., Any]) -> Any:
    """Goes through the programs of a step on abstract values, without running any.

    Args:
      terms: What the step trains; where the whole step is one program, that of its own terms.
      batch: Shapes, dtypes and shardings of a batch.
      run: `run(program, *arguments)`, called as the step would call the program, returns its outputs
        as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      What stays on the devices during the step: trees of the very objects that are arguments.
    """
    state = self.abstract()
    if self.is_whole:
      members = tuple(term.candidates[0] for term in self.recipe.sampler.terms(0))
      run(Program("step", members, self._whole, self._fixed_step), state, batch)
      return state, batch
    sums = _abstract(jax.eval_shape(self._zeros, state.trained), self._sums_of(
      replicated(self.mesh), self._places.trained))

    def follow(program, *arguments):
      arguments = [_abstract(a, replicated(self.mesh)) if isinstance(a, jax.Array) else a for a in arguments]
      outputs = run(program, *arguments)
      if program.kind == "loss":
        # Which candidate trains is decided by values: the first stands for it.
        return 0.0
      # Donated: the very buffers come back.
      return (sums, *outputs[1:]) if program.kind == "gradient" else outputs

    self._make(terms, state, batch, sums, follow)
    return state, batch, sums

  def _make(self, terms, state, batch, sums, run):
    """Adds up the terms' gradients over the parts of the batch, then updates."""
    parts = (batch,) if self.accumulate == 1 else run(Program("split", (), self._split, self._parts), batch)
    nothing = (None,) * len(parts)
    taught, shared, metrics = self._teacher_outputs(terms, state, parts, run), nothing, ()
    for index, term in enumerate(terms):
      seen = tuple(zip(taught if term.taught else nothing, shared))
      member = self._selected(term, state, parts, seen, index, run)
      gives = self._gives(terms) if index == 0 else None
      program, given, owns = self._gradients.gradient(member, term, gives), [], []
      for number, (part, targets) in enumerate(zip(parts, seen)):
        sums, outputs, own = run(
          program, state.trained, state.fixed, state.objective, part, targets, state.step, self._key,
          index + number * len(terms), term.weight / len(parts), sums)
        given.append(outputs)
        owns.append(own)
      taught = tuple(given) if gives == "teach" else taught
      shared = tuple(given) if gives == "share" else shared
      metrics = tuple(owns) if index == 0 else metrics
    return run(Program("update", (), self._update, self._updated), state, sums, taught, metrics)

  def _parts(self, batch):
    """The batch in parts, each an equal share of what every device has of it."""
    shards = batch_shards(self.mesh)

    def part(number, x):
      x = x.reshape(shards, self.accumulate, -1, *x.shape[1:])
      return x[:, number].reshape(-1, *x.shape[3:])

    return tuple(jax.tree.map(functools.partial(part, number), batch) for number in range(self.accumulate))

  def runs_teacher(self, terms: tuple[Term, ...]) -> bool:
    """Whether a step needs the teacher's outputs beside those of its own terms."""
    in_place = self.recipe.teacher == "largest" and self._gives(terms) == "teach"
    return any(t.taught for t in terms) and not in_place

  def _teacher_outputs(self, terms, state, parts, run):
    """What students see of each part, where the teacher is not a term of the step itself."""
    if not self.runs_teacher(terms):
      return (None,) * len(parts)
    trained = state.trained if state.teacher is None else state.teacher
    return tuple(run(self._gradients.teacher, trained, state.fixed, state.objective, part, state.step)
                 for part in parts)

  def _gives(self, terms: tuple[Term, ...]) -> str | None:
    """What is made of the first term's outputs, where they are needed after it: `"teach"`, `"share"`."""
    objective, taught = self.recipe.objective, any(t.taught for t in terms)
    whole = terms[0].candidates == (self.supernet.space.largest,)
    in_place = self.recipe.teacher == "largest" and not terms[0].taught and whole and taught
    if in_place or (objective.update is not None and not taught):
      return "teach"
    return "share" if objective.share is not None and whole and len(terms) > 1 else None

  def _selected(self, term, state, parts, seen, index, run) -> Member:
    """The sub-network that a term trains; with several on the data shards, one for each."""
    if len(term.candidates) == 1:
      return term.candidates[0]
    if self.recipe.judge == "labels":
      term, seen = dataclasses.replace(term, taught=False), ((None, None),) * len(parts)
    losses = [sum(run(self._gradients.loss(candidate, term), state.trained, state.fixed, state.objective,
                      part, targets, state.step, self._key, index) for part, targets in zip(parts, seen))
              for candidate in term.candidates]
    order = sorted(range(len(losses)), key=lambda i: float(losses[i]))
    return term.candidates[order[0 if self.recipe.select == "lowest" else -1]]

  def _zeros(self, trained):
    sums = self._sums_of(jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    if "touched" in sums:
      sums["touched"] = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), trained)
    return sums

  def _updated(self, state: TrainState, sums, taught, metrics):
    """The optimizer's update from the sums, which come back as zeros.

    Args:
      state: What to update.
      sums: Of losses and gradients.
      taught: What the objective gave of each part of the batch, or None for each.
      metrics: The objective's, of each part.
    """
    updates, opt_state = self.tx.update(sums["grads"], state.opt_state, state.trained)
    if self.recipe.untouched != "update":
      updates, opt_state = self._spare(updates, opt_state, state, sums["touched"])
    trained = optax.apply_updates(state.trained, updates)
    teacher = state.teacher
    if self.recipe.teacher == "ema":
      decay = self.recipe.ema(state.step) if callable(self.recipe.ema) else self.recipe.ema
      teacher = optax.incremental_update(trained, teacher, 1 - decay)
    objective, update = state.objective, self.recipe.objective.update
    if update:
      outputs = taught[0] if len(taught) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *taught)
      objective = update(objective, trained, outputs, state.step)
    metrics = jax.tree.map(lambda *x: sum(x) / len(x), *metrics) | {
      "loss": sums["loss"], "grad_norm": optax.tree.norm(sums["grads"])}
    state = state.replace(step=state.step + 1, trained=trained, opt_state=opt_state, teacher=teacher,
                          objective=objective)
    return state, self._zeros(trained), metrics

  def _spare(self, updates, opt_state, state, touched):
    """Leaves weights that no sub-network touched as they were, but for weight decay if asked."""
    idle = jax.tree.map(jnp.zeros_like, updates)
    if self.recipe.untouched == "decay_only":
      # Without gradient and without momentum, weight decay is all that is left of an update.
      still = optax.tree_map_params(self.tx, jnp.zeros_like, state.opt_state)
      idle, _ = self.tx.update(idle, still, state.trained)
    updates = jax.tree.map(jnp.where, touched, updates, idle)
    kept = optax.tree_map_params(self.tx, lambda _, mask: mask, opt_state, touched,
                                 transform_non_params=lambda _: True)
    return updates, jax.tree.map(jnp.where, kept, opt_state, state.opt_state)


def _abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of a tree, with where it lies."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
