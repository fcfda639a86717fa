"""One training step: gradients of the sub-networks that a recipe names, then one update.

Each sub-network's gradient is one compiled program that adds to donated sums, so that a step may
train any combination of them; a fixed short list runs as one program.
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
from nestnet.objectives.base import Objective, Targets
from nestnet.sampling import FIXED_LIMIT, Sampler, Term
from nestnet.sharding import replicated
from nestnet.slicing import scatter, take
from nestnet.subnet import Subnet

Optimizer = Callable[[Any], optax.GradientTransformation]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Program:
  """One of the compiled programs that make a step.

  Attributes:
    kind: `"teacher"`, `"loss"` of a candidate, `"gradient"`, `"update"`, or `"step"` for all in one.
    subnets: The sub-networks that it runs.
    call: The jitted function.
    computes: What it computes for these sub-networks, to be traced where FLOPs are counted.
    taught: Whether they learn from a teacher's outputs.
  """

  kind: str
  subnets: tuple[Subnet, ...]
  call: Callable[..., Any]
  computes: Callable[..., Any]
  taught: bool = False


Run = Callable[..., Any]


def _run(program: Program, *arguments: Any) -> Any:
  return program.call(*arguments)


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
    ema: Decay of that average.
    select: Which of a term's candidates trains: that of `"lowest"` or `"highest"` loss.
    untouched: What befalls weights that no sub-network of the step used: `"update"`: the
      optimizer's ordinary step, whose momentum moves them; `"decay_only"`: weight decay alone;
      `"freeze"`: nothing. In the latter two their optimizer state stays as it was.
  """

  sampler: Sampler
  objective: Objective
  teacher: str = "largest"
  ema: float = 0.999
  select: str = "lowest"
  untouched: str = "update"

  def __post_init__(self):
    for option, allowed in (("teacher", ("largest", "frozen", "ema")), ("select", ("lowest", "highest")),
                            ("untouched", ("update", "decay_only", "freeze"))):
      if getattr(self, option) not in allowed:
        raise one_of(f"recipe.{option}", getattr(self, option), allowed)
    if not 0 <= self.ema <= 1:
      raise UserError(f"recipe.ema: got {self.ema}, allowed is 0 to 1")


class Step:
  """The compiled step of one supernet, recipe and optimizer.

  Args:
    supernet: The family.
    recipe: What trains.
    optimizer: Makes the optax transformation from a mask of the weights that decay.
    mesh: The device mesh; batches are laid over its `data` axis.
    seed: Of initial values and of dropout.
  """

  def __init__(self, supernet: Supernet, recipe: Recipe, optimizer: Optimizer, mesh: jax.sharding.Mesh,
               seed: int = 0):
    self.supernet, self.recipe, self.mesh = supernet, recipe, mesh
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
    self.tx = optimizer(jax.tree.map(lambda a: bool(a.contracted), self.axes, is_leaf=is_axes))
    self._program = functools.lru_cache(maxsize=None)(self._compile)
    self._update = jax.jit(self._updated, donate_argnums=(0, 1))
    self._whole = jax.jit(self._fixed_step, donate_argnums=0)
    # Laid out as the update returns them, lest every program compile twice.
    self._start = jax.jit(self._zeros, out_shardings=replicated(mesh))
    self._sums = None

  def init(self) -> TrainState:
    """A fresh state, replicated over the mesh."""
    return jax.jit(self._fresh, out_shardings=replicated(self.mesh))(self._key)

  def abstract(self) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    return self._abstract(jax.eval_shape(self._fresh, self._key))

  def _abstract(self, shapes: Any) -> Any:
    sharding = replicated(self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

  def _fresh(self, key) -> TrainState:
    model_key, objective_key = jax.random.split(jax.random.fold_in(key, 0))
    variables = self.supernet.init(model_key)
    own, _, objective_state = self.recipe.objective.init(
      objective_key, self.supernet.model, self.supernet.space)
    trained = {"model": variables.pop("params"), "objective": own}
    return TrainState(
      step=jnp.zeros((), jnp.int32), trained=trained, fixed=variables, opt_state=self.tx.init(trained),
      teacher=self.teacher_of(trained), objective=objective_state)

  def teacher_of(self, trained: Any) -> Any:
    """The copy of `trained` that the recipe keeps as a teacher, or None."""
    if self.recipe.teacher == "largest":
      return None
    return jax.tree.map(jnp.copy, trained)

  def member(self, state: TrainState, subnet: Subnet) -> dict[str, Any]:
    """The variables of a sub-network as it is evaluated and extracted."""
    return execution.member(self.supernet, self.recipe.objective, self.axes["objective"],
                            state.trained, state.fixed, subnet)

  def __call__(self, state: TrainState, batch: Mapping[str, jax.Array], step: int
               ) -> tuple[TrainState, Metrics]:
    """Makes update number `step` on a batch; `state` is donated.

    Returns:
      The next state, and scalars still on the device: `loss` (the sum over sub-networks),
      `grad_norm`, and the objective's metrics of the first sub-network.
    """
    terms = self.recipe.sampler.terms(step)
    if self.is_whole:
      return self._whole(state, batch)
    sums, self._sums = self._sums or self._start(state.trained), None
    state, self._sums, metrics = self._make(terms, state, batch, sums, _run)
    return state, metrics

  @functools.cached_property
  def is_whole(self) -> bool:
    """Whether the whole step is one program, for a short list of terms that never changes."""
    terms = self.recipe.sampler.terms(0) if self.recipe.sampler.fixed else ()
    return 0 < len(terms) <= FIXED_LIMIT and all(len(t.candidates) == 1 for t in terms)

  def _fixed_step(self, state, batch):
    """The whole step in one program."""
    state, _, metrics = self._make(
      self.recipe.sampler.terms(0), state, batch, self._zeros(state.trained),
      lambda program, *arguments: program.computes(*arguments))
    return state, metrics

  def programs(self, terms: tuple[Term, ...], batch: Mapping[str, jax.ShapeDtypeStruct], run: Run
               ) -> Any:
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
      subnets = tuple(term.candidates[0] for term in self.recipe.sampler.terms(0))
      run(Program("step", subnets, self._whole, self._fixed_step), state, batch)
      return state, batch
    sums = self._abstract(jax.eval_shape(self._zeros, state.trained))

    def follow(program, *arguments):
      arguments = [self._abstract(a) if isinstance(a, jax.Array) else a for a in arguments]
      outputs = run(program, *arguments)
      if program.kind == "loss":
        # Which candidate trains is decided by values: the first stands for it.
        return 0.0
      # Donated: the very buffers come back.
      return (sums, *outputs[1:]) if program.kind == "gradient" else outputs

    self._make(terms, state, batch, sums, follow)
    return state, batch, sums

  def _make(self, terms, state, batch, sums, run: Run):
    """Adds up the terms' gradients, then updates."""
    taught, metrics = self._teacher_outputs(terms, state, batch, run), {}
    for index, term in enumerate(terms):
      seen = taught if term.taught else None
      subnet = self._selected(term, state, batch, seen, index, run)
      give = index == 0 and self._gives(terms)
      sums, outputs, own = run(
        self._gradient(subnet, term, give), state.trained, state.fixed, state.objective,
        batch, seen, state.step, self._key, index, term.weight, sums)
      taught = outputs if give else taught
      metrics = own if index == 0 else metrics
    update = Program("update", (), self._update, self._updated)
    state, sums, totals = run(update, state, sums, taught)
    return state, sums, metrics | totals

  def _gradient(self, subnet: Subnet, term: Term, gives: bool) -> Program:
    return Program("gradient", (subnet,), self._program(subnet, term.regularised, gives),
                   self._add_gradient(subnet, term.regularised, gives), term.taught)

  def runs_teacher(self, terms: tuple[Term, ...]) -> bool:
    """Whether a step needs the teacher's outputs beside those of its own terms."""
    in_place = self.recipe.teacher == "largest" and self._gives(terms)
    return any(t.taught for t in terms) and not in_place

  def _teacher_outputs(self, terms, state, batch, run):
    """What students see, where the teacher is not a term of the step itself."""
    if not self.runs_teacher(terms):
      return None
    trained = state.trained if state.teacher is None else state.teacher
    teacher = Program("teacher", (self.supernet.space.largest,), self._teach, self._teach)
    return run(teacher, trained, state.fixed, state.objective, batch, state.step)

  def _gives(self, terms: tuple[Term, ...]) -> bool:
    """Whether the first term's outputs are needed after it."""
    first = terms[0]
    in_place = (self.recipe.teacher == "largest" and not first.taught
                and first.candidates == (self.supernet.space.largest,)
                and any(t.taught for t in terms))
    return in_place or (self.recipe.objective.update is not None and not any(t.taught for t in terms))

  @functools.cached_property
  def _teach(self):
    def teach(trained, fixed, state, batch, step):
      largest, objective = self.supernet.space.largest, self.recipe.objective
      variables = self.supernet.cut({"params": trained["model"], **fixed}, largest)
      outputs = execution.forward(self.supernet, objective, variables, largest, batch)
      return objective.teach(trained["objective"], state, outputs, batch, step)
    return jax.jit(teach)

  def _selected(self, term, state, batch, taught, index, run) -> Subnet:
    if len(term.candidates) == 1:
      return term.candidates[0]
    losses = []
    for candidate in term.candidates:
      call = self._program(candidate, term.regularised, None)
      losses.append(run(Program("loss", (candidate,), call, call), state.trained, state.fixed,
                        state.objective, batch, taught, state.step, self._key, index))
    order = sorted(range(len(losses)), key=lambda i: float(losses[i]))
    return term.candidates[order[0 if self.recipe.select == "lowest" else -1]]

  def _compile(self, subnet: Subnet, regularised: bool, gives: bool | None):
    if gives is None:
      return jax.jit(functools.partial(self._loss, subnet, regularised))
    return jax.jit(self._add_gradient(subnet, regularised, gives), donate_argnums=9)

  def _loss(self, subnet, regularised, trained, fixed, state, batch, taught, step, key, index):
    return self._term(subnet, regularised, trained, fixed, state, batch, taught, step, key, index)[0]

  def _term(self, subnet, regularised, trained, fixed, state, batch, taught, step, key, index):
    rng = jax.random.fold_in(jax.random.fold_in(key, 1 + step), index)
    return execution.term_loss(
      self.supernet, self.recipe.objective, self.axes["objective"], subnet, regularised, trained,
      fixed, state, Targets(batch, taught), step, rng)

  def _add_gradient(self, subnet: Subnet, regularised: bool, gives: bool):
    """A pure function that adds one sub-network's weighted gradient and loss to `sums`."""
    def add(trained, fixed, state, batch, taught, step, key, index, weight, sums):
      def loss_fn(trained):
        return self._term(subnet, regularised, trained, fixed, state, batch, taught, step, key, index)

      (loss, (outputs, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
      total = {"loss": sums["loss"] + weight * loss, "grads": jax.tree.map(
        lambda s, g: s + weight * g, sums["grads"], grads)}
      if "touched" in sums:
        total["touched"] = jax.tree.map(jnp.logical_or, sums["touched"], self._touched(trained, subnet))
      given = self.recipe.objective.teach(
        trained["objective"], state, jax.lax.stop_gradient(outputs), batch, step) if gives else None
      return total, given, metrics
    return add

  def _touched(self, trained, subnet):
    """Which weights a sub-network uses, a tree of booleans."""
    groups = self.supernet.space.groups
    small = jax.eval_shape(lambda t: take(t, self.axes, subnet, groups, strict=False), trained)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), small)
    return jax.tree.map(lambda x: x > 0, scatter(ones, self.axes, subnet, trained, groups))

  def _zeros(self, trained):
    sums = {"loss": jnp.zeros(()), "grads": jax.tree.map(jnp.zeros_like, trained)}
    if self.recipe.untouched != "update":
      sums["touched"] = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), trained)
    return sums

  def _updated(self, state: TrainState, sums, outputs):
    """The optimizer's update from the sums, which come back as zeros."""
    updates, opt_state = self.tx.update(sums["grads"], state.opt_state, state.trained)
    if self.recipe.untouched != "update":
      updates, opt_state = self._spare(updates, opt_state, state, sums["touched"])
    trained = optax.apply_updates(state.trained, updates)
    teacher = state.teacher
    if self.recipe.teacher == "ema":
      teacher = optax.incremental_update(trained, teacher, 1 - self.recipe.ema)
    objective, update = state.objective, self.recipe.objective.update
    if update:
      objective = update(objective, trained, outputs, state.step)
    metrics = {"loss": sums["loss"], "grad_norm": optax.tree.norm(sums["grads"])}
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
