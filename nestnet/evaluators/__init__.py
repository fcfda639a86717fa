"""Metrics of one network: small generators of (name, value); and what they are for each kind of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from nestnet import metrics
from nestnet.evaluators import classification as _images
from nestnet.evaluators import language_modelling as _text
from nestnet.objectives import language

__all__ = ["TASKS", "Task"]


@dataclasses.dataclass(frozen=True)
class Task:
  """What a data set is for: all that a run must know of its kind of data.

  Attributes:
    objective: The objective that learns it from the data alone.
    reads: The entry of a batch that a network reads.
    inputs: From a batch to what it is given of that.
    metric: By which networks are chosen and compared.
    evaluate: `(module, variables, data, subnet)`: yields the metrics of a network.
    evaluate_all: `(one, variables, statistics, vectors, data)`: those of an array of sub-networks.
    first: From data `[examples, ...]` to the inputs of a first batch, such as an evaluation runs.
    example: What one input is called; FLOPs and latencies are those of one.
    counted: What budgets count.
    count: How many of these are in an example whose entries have the given shapes.
  """

  objective: str
  reads: str
  inputs: Callable[[Mapping[str, Any]], Any]
  metric: metrics.Metric
  evaluate: Callable[..., Any]
  evaluate_all: Callable[..., Any]
  first: Callable[[Mapping[str, Any]], Any]
  example: str
  counted: str
  count: Callable[[Mapping[str, tuple[int, ...]]], int]


TASKS = {
  "classification": Task(
    objective="classification", reads="image", inputs=lambda batch: batch["image"], metric=metrics.ACCURACY,
    evaluate=_images.classification, evaluate_all=_images.classification_all,
    first=lambda data: next(_images.batches(data["image"])), example="image", counted="images",
    count=lambda shapes: 1),
  "language_modelling": Task(
    objective="language_modelling", reads="tokens", inputs=language.inputs_of, metric=metrics.BITS_PER_BYTE,
    evaluate=_text.language_modelling, evaluate_all=_text.language_modelling_all,
    first=lambda data: language.inputs_of({"tokens": next(_text.windows(data))}), example="window",
    counted="tokens", count=lambda shapes: shapes["tokens"][0] - 1),
}
