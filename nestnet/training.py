"""The one loop: phases, exact resume, checkpoints of finite states only."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nestnet import processes
from nestnet.checkpoint import Checkpoints
from nestnet.errors import Failure, UserError
from nestnet.logs import Logs, NoLogs, Progress, Warnings
from nestnet.sharding import put_batch
from nestnet.steps import Step, TrainState


@dataclasses.dataclass(frozen=True)
class Border:
  """What stands around the beginning of a phase; a transition may look at it.

  Attributes:
    before: The step of the phase that ends; None at the beginning of the run.
    after: The step of the phase that begins. Its `axes` name the axes of the weights.
    batches: The run's batches, by the number of a step.
  """

  before: Step | None
  after: Step
  batches: Any


Transition = Callable[[TrainState, Border], TrainState]


class NonFinite(Failure):
  """The loss or the gradient is no number any more; the last good checkpoint is kept."""


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of training with one supernet, recipe and optimizer.

  Attributes:
    steps: Updates in this phase.
    step: What an update does.
    enter: Pure function of the train state at its beginning and of the `Border`, such as a permutation
      of channels or the growth of a layer; the state it gets is as the phase before left it. A teacher
      that the phase before had not is a copy of the parameters.
    fresh_optimizer: Whether the optimizer's state begins anew.
    opens: The kinds of axes that have more choices than in the phase before, to be told.
  """

  steps: int
  step: Step
  enter: Transition | None = None
  fresh_optimizer: bool = False
  opens: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Where `train` ended: the state, and whether all steps are done."""

  state: TrainState
  finished: bool


def train(phases: Sequence[Phase], batches: Any, workdir: str | os.PathLike[str], *,
          checkpoint_every: int, log_every: int = 10, eval_every: int = 0,
          evaluate: Callable[[Step, TrainState], dict[str, float]] | None = None,
          show_progress: bool = True) -> Outcome:
  """Trains, or goes on with what `workdir` holds.

  Killed at any moment and started again, it ends with the parameters of the uninterrupted run, bit
  for bit on the same hardware and mesh. A checkpoint is written only after its own step's loss and
  gradient norm were seen finite. SIGTERM in any process makes all save the same step and return.

  Args:
    phases: What to do, one after another.
    batches: `batches[step]` is the batch of a step, a dict of arrays `[batch, ...]`.
    workdir: Gets `checkpoints/`, `metrics.jsonl` and TensorBoard events.
    checkpoint_every: Steps between checkpoints; the last step always has one.
    log_every: Steps between rows of `metrics.jsonl`.
    eval_every: Steps between calls of `evaluate`; 0: never.
    evaluate: Scalars of a state, logged beside the metrics.
    show_progress: Whether to show a bar, or lines where there is no terminal.

  Raises:
    NonFinite: The loss or the gradient norm is infinite or no number.
    ValueError: The checkpoints in `workdir` belong to another model or to a longer run.
  """
  ends = _ends(phases)
  total = ends[-1]
  with Checkpoints(pathlib.Path(workdir) / "checkpoints") as checkpoints:
    check_length(checkpoints.steps, total, workdir)
    restored = checkpoints.restore(lambda step: phases[_phase_at(step, ends)].step.abstract())
    start = restored[0] if restored else 0
    current = _phase_at(start, ends)
    progress = Progress(total, start) if show_progress and processes.first() else None
    _announce(phases, current + (start == ends[current]), progress)
    state = restored[1] if restored else phases[0].step.init()
    if start == 0 and restored is None and phases[0].enter:
      state = _enter(phases[0], state, Border(None, phases[0].step, batches))
    with processes.Stop() as stop:
      logs = Logs(workdir, start) if processes.first() else NoLogs()
      report = functools.partial(_report, logs=logs, log_every=log_every, progress=progress, warnings=Warnings())
      pending = None
      try:
        for step in range(start, total):
          if step == ends[current]:
            current += 1
            if pending:
              report(*pending)
              pending = None
            if step > start:
              _announce(phases, current, progress)
            state = _enter(phases[current], state, Border(phases[current - 1].step, phases[current].step,
                                                         batches))
          phase = phases[current]
          batch = put_batch(batches[step], phase.step.mesh)
          state, metrics = phase.step(state, batch, step)
          if len(phases) > 1:
            metrics = {**metrics, "phase": current + 1}
          done = step + 1
          # The metrics of the step before are read while this one runs.
          if pending:
            report(*pending)
          pending = (done, metrics, phase.step.recipe.objective.watch)
          stopping = stop.requested(done)
          saves = done % checkpoint_every == 0 or done == total or stopping
          evaluates = evaluate and eval_every and done % eval_every == 0 and done < total
          if saves or evaluates:
            report(*pending)
            pending = None
          # Rows come before the checkpoint that vouches for them.
          if evaluates:
            logs.write(done, evaluate(phase.step, state))
          if saves:
            checkpoints.save(done, state)
          if stopping:
            return Outcome(state, done == total)
      finally:
        logs.close()
        if progress:
          progress.close()
  return Outcome(state, True)


def restore(phases: Sequence[Phase], workdir: str | os.PathLike[str]) -> tuple[int, TrainState] | None:
  """The newest intact state in `workdir` and its step, or None where there is none."""
  ends = _ends(phases)
  with Checkpoints(pathlib.Path(workdir) / "checkpoints") as checkpoints:
    return checkpoints.restore(lambda step: phases[_phase_at(step, ends)].step.abstract())


def check_length(made: Sequence[int], steps: int, workdir: str | os.PathLike[str]) -> None:
  """Raises `ValueError` where a checkpoint, of those `made`, is past the last of so many steps."""
  if (newest := max(made, default=0)) > steps:
    raise UserError(f"{workdir} is at step {newest}, train.steps is {steps}; allowed is at least as many")


def _ends(phases: Sequence[Phase]) -> list[int]:
  """The number of updates made when each phase ends."""
  return list(itertools.accumulate(phase.steps for phase in phases))


def _phase_at(step: int, ends: Sequence[int]) -> int:
  """The phase whose state stands after `step` updates; transitions come after the save."""
  return next((i for i, end in enumerate(ends) if step <= end), len(ends) - 1)


def _enter(phase: Phase, state: TrainState, border: Border) -> TrainState:
  """The state with which a phase begins, from that with which the last one ended."""
  if phase.enter:
    state = phase.enter(state, border)
  step = phase.step
  shapes = step.abstract()
  if (state.teacher is None) != (shapes.teacher is None):
    state = state.replace(teacher=step.teacher_of(state.trained))
  if phase.fresh_optimizer:
    state = state.replace(opt_state=jax.jit(step.tx.init)(state.trained))
  return jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))


def _announce(phases: Sequence[Phase], number: int, progress: Progress | None) -> None:
  """Says before the first step of a phase what keeps it waiting; nothing where no phase is left."""
  if not progress or number >= len(phases):
    return
  if len(phases) == 1:
    progress.say("train: compiling")
    return
  phase, name = phases[number], f"phase {number + 1} of {len(phases)}"
  several = len(phase.opens) > 1 or phase.opens == ("layers",)
  opens = f", {', '.join(phase.opens)} open{'' if several else 's'}" if phase.opens else ""
  progress.say(f"{name}: {phase.steps} step{'s' * (phase.steps > 1)}{opens}; compiling", f"train, {name},")


def _report(done: int, metrics: dict[str, jax.Array], watch: Callable[[int, dict[str, float]], str] | None,
            logs: Logs | NoLogs, log_every: int, progress: Progress | None, warnings: Warnings) -> None:
  scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
  for name in ("loss", "grad_norm"):
    if not math.isfinite(scalars[name]):
      raise NonFinite(f"step {done}: {name} is {scalars[name]}; training stopped, the last good "
                      "checkpoint is kept. A lower optim.learning_rate or optim.clip_norm may help.")
  if done % log_every == 0:
    logs.write(done, scalars)
    if watch and processes.first():
      warnings.look(done, watch(done, scalars))
  if progress:
    progress.update(done, scalars)
