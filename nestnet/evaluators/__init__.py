"""Metrics of one network: small generators of (name, value); and what they are for each kind of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nestnet import metrics
from nestnet.data import Dataset, Text
from nestnet.errors import UserError, one_of
from nestnet.evaluators import classification as _images
from nestnet.evaluators import language_modelling as _text
from nestnet.evaluators import representation as _features
from nestnet.objectives import Objective, language

__all__ = ["TASKS", "Task", "task_of"]


@dataclasses.dataclass(frozen=True)
class Task:
  """What networks are for: all that a run must know of its kind of data and of what is learnt of it.

  Attributes:
    objective: The objective that learns it from the data alone.
    reads: The entry of a batch that a network reads.
    inputs: From a batch to what it is given of that.
    output: The entry of a network's outputs that it is used by.
    metric: By which networks are chosen and compared.
    evaluate: `(module, variables, data, subnet)`, and behind them what `fit` gives where there is that: yields
      the metrics of a network.
    evaluate_all: `(one, variables, statistics, vectors, data)`: those of an array of sub-networks; None where
      each is evaluated alone.
    first: From data `[examples, ...]` to the inputs of a first batch, such as an evaluation runs.
    example: What one input is called; FLOPs and latencies are those of one.
    counted: What budgets count.
    count: How many of these are in an example whose entries have the given shapes.
    fit: `(module, variables, subnet, dataset, options)`: what is learnt of a network's outputs before they are
      evaluated, on splits that are not; `options` is `config.eval`.
    check: `(dataset, options)`: raises `ValueError` where that will not be possible.
  """

  objective: str
  reads: str
  inputs: Callable[[Mapping[str, Any]], Any]
  output: str
  metric: metrics.Metric
  evaluate: Callable[..., Any]
  evaluate_all: Callable[..., Any] | None
  first: Callable[[Mapping[str, Any]], Any]
  example: str
  counted: str
  count: Callable[[Mapping[str, tuple[int, ...]]], int]
  fit: Callable[..., Any] | None = None
  check: Callable[..., Any] | None = None


_CLASSIFICATION = Task(
  objective="classification", reads="image", inputs=lambda batch: batch["image"], output="logits",
  metric=metrics.ACCURACY, evaluate=_images.classification, evaluate_all=_images.classification_all,
  first=lambda data: next(_images.batches(data["image"])), example="image", counted="images",
  count=lambda shapes: 1)
TASKS = {
  "classification": _CLASSIFICATION,
  "representation": dataclasses.replace(
    _CLASSIFICATION, output="features", metric=metrics.KNN, evaluate=_features.representation,
    evaluate_all=None, fit=_features.fit, check=_features.settings),
  "language_modelling": Task(
    objective="language_modelling", reads="tokens", inputs=language.inputs_of, output="logits",
    metric=metrics.BITS_PER_BYTE, evaluate=_text.language_modelling, evaluate_all=_text.language_modelling_all,
    first=lambda data: language.inputs_of({"tokens": next(_text.windows(data))}), example="window",
    counted="tokens", count=lambda shapes: shapes["tokens"][0] - 1),
}


def task_of(objective: Objective, dataset: Dataset | Text) -> Task:
  """What networks are for that learn by an objective from a data set.

  Raises:
    ValueError: The objective names a task that is not there, or one of other data.
  """
  name = objective.task or dataset.task
  if name not in TASKS:
    raise one_of("task of the objective", name, TASKS)
  if TASKS[name].reads not in dataset.entries:
    raise UserError(f"the objective's task {name} reads {TASKS[name].reads}; {dataset.name} has "
                    f"{', '.join(dataset.entries)}, which allows {dataset.task}")
  return TASKS[name]
