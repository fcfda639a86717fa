"""The record that the training loop asks of an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


class Targets(NamedTuple):
  """What one term of a step learns from.

  Attributes:
    batch: The batch, a dict of arrays `[batch, ...]`.
    teacher: The teacher's outputs, gradients stopped, as `Objective.teach` left them; None for a
      term that is not taught.
    first: The outputs of the step's first term, gradients stopped, as `Objective.share` left them; None
      for that term itself, and where nothing is shared.
  """

  batch: dict[str, Any]
  teacher: Any = None
  first: Any = None


class Pass(NamedTuple):
  """Inputs of one shape that a network is run on for each example of a batch.

  Attributes:
    shape: Of one input, `(height, width, channels)`.
    trained: How many of them a network reads that trains.
    taught: How many the teacher reads.
  """

  shape: tuple[int, ...]
  trained: int
  taught: int


def _no_params(rng, model, space):
  return {}, {}, {}


def _forward_image(apply, batch):
  return apply(batch["image"])


def _keep_outputs(params, state, outputs, batch, step):
  return outputs


def _keep_variables(variables, params, subnet):
  return variables


@dataclasses.dataclass(frozen=True)
class Objective:
  """Pure functions that say what is minimised.

  Attributes:
    loss: `(params, state, outputs, targets, step, rng) -> (loss, metrics)`: the loss of one
      sub-network, a mean over the batch, and a dict of scalars. `params` are the objective's own,
      cut to the sub-network; `outputs` is what `forward` returned; `targets` is a `Targets`.
    init: `(rng, model, space) -> (params, axes, state)`: the objective's own trained parameters
      and their axis names, and its untrained state. They are optimised, sliced, sharded and saved
      beside the model's.
    forward: `(apply, batch) -> outputs`: runs the network on what it needs of the batch.
    teach: `(params, state, outputs, batch, step) -> targets`: what students see of the teacher's
      outputs; `params` are the teacher's own. Runs once a step.
    update: `(state, params, outputs, step) -> state` once a step, after the optimizer; None where
      nothing is to update. `params` is `{"model": ..., "objective": ...}`; `outputs` is what `teach`
      made of the teacher's outputs, or of the first term's where no term is taught.
    attach: `(variables, params, subnet) -> variables`: puts what the objective holds (a head) into
      a sub-network's variables, for evaluation and extraction.
    needs: The entries of a batch that it reads, so that data that has them not is refused at the
      beginning, and no others are made beside the labels; empty where it does not say.
    uses: Entries that it reads where they are there, beside these.
    forward_teacher: As `forward`, for a teacher that is no term of the step; None: the same.
    share: `(params, state, outputs, batch, step) -> targets`: what later terms see of the outputs of the
      first, where that is the largest network; None: nothing.
    passes: From the shapes of an example's entries to the `Pass`es that FLOPs are counted of; None: one
      input as the data has it, for each network.
    watch: `(step, metrics) -> warning`: what the metrics of a step show to be wrong, or "".
    task: What its networks are for, a name of `nestnet.evaluators.TASKS`, which decides how they are evaluated;
      None: what the data is for.
  """

  loss: Callable[..., tuple[Any, dict[str, Any]]]
  init: Callable[..., tuple[Any, Any, Any]] = _no_params
  forward: Callable[..., Any] = _forward_image
  teach: Callable[..., Any] = _keep_outputs
  update: Callable[..., Any] | None = None
  attach: Callable[..., Any] = _keep_variables
  needs: tuple[str, ...] = ()
  uses: tuple[str, ...] = ()
  forward_teacher: Callable[..., Any] | None = None
  share: Callable[..., Any] | None = None
  passes: Callable[..., tuple[Pass, ...]] | None = None
  watch: Callable[[int, dict[str, float]], str] | None = None
  task: str | None = None
