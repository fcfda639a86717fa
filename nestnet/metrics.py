"""How good a network is, by the names of columns: which direction is better, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measure of a network.

  Attributes:
    name: Its column; that of another split than test has a prefix, as `validation_accuracy`.
    lower_is_better: Whether the smallest value is the best.
    scale: What a value is multiplied by to be shown.
    unit: What stands behind a value that is shown.
    decimals: Digits that tables of comparisons show.
    words: What it is called, where that is not its name.

  Example:
    >>> of("validation_accuracy").text(0.9712), of("bits_per_byte").text(1.5), of("speed").text(12345.6)
    ('97.1%', '1.500', '1.235e+04')
  """

  name: str
  lower_is_better: bool = False
  scale: float = 1.0
  unit: str = ""
  decimals: int | None = None
  words: str = ""

  @property
  def title(self) -> str:
    """The name in words."""
    return self.words or self.name.replace("_", " ")

  @property
  def note(self) -> str:
    """What stands in brackets behind the title on an axis."""
    note = self.unit or "lower is better" * self.lower_is_better
    return f" ({note})" if note else ""

  @property
  def in_tables(self) -> str:
    """What the numbers of a table of comparisons are, whose cells have no unit."""
    return self.title + (" in percent" if self.unit == "%" else self.note)

  def score(self, value: float) -> float:
    """The value as a number of which the largest is the best."""
    return -value if self.lower_is_better else value

  def value(self, score: float) -> float:
    """The value of a score."""
    return self.score(score)

  def text(self, value: float) -> str:
    """The value as tables of sub-networks and charts say it."""
    return f"{value:.4g}" if self.decimals is None else f"{self.scale * value:.{self.decimals}f}{self.unit}"


ACCURACY = Metric("accuracy", scale=100.0, unit="%", decimals=1)
BITS_PER_BYTE = Metric("bits_per_byte", lower_is_better=True, decimals=3)
PERPLEXITY = Metric("perplexity", lower_is_better=True)
LOSS = Metric("loss", lower_is_better=True)
# How alike a network and a larger one are: `nestnet.evaluators.consistency`.
AGREEMENT = Metric("agreement", scale=100.0, unit="%", decimals=1)
KL = Metric("kl", lower_is_better=True, decimals=4)
# Accuracies of readouts of features: `nestnet.evaluators.representation`.
KNN = Metric("knn", scale=100.0, unit="%", decimals=1, words="k-NN accuracy with few labels")
READOUTS = (Metric("knn_full", scale=100.0, unit="%", decimals=1, words="k-NN accuracy with all labels"),
            Metric("logistic", scale=100.0, unit="%", decimals=1, words="accuracy of logistic regression"),
            Metric("probe", scale=100.0, unit="%", decimals=1, words="accuracy of a linear probe"))
# By which networks are chosen and compared, one for each task.
MAIN = (ACCURACY, BITS_PER_BYTE, KNN)
_KNOWN = (*MAIN, *READOUTS, PERPLEXITY, LOSS, AGREEMENT, KL)
# What a progress bar says of a step or a row.
PROGRESS = ("loss", "accuracy", "bits_per_token", "bits_per_byte", "knn")


def of(column: str) -> Metric:
  """The metric of a column, by the end of its name; of one that is not known the largest is the best."""
  return next((metric for metric in _KNOWN if column.endswith(metric.name)), Metric(column))


def main(row: Mapping[str, Any]) -> Metric:
  """The metric by which a row is compared with others: the first of `MAIN` that it has.

  Example:
    >>> main({"params": 10, "loss": 0.7, "validation_bits_per_byte": 1.2}).name
    'bits_per_byte'
  """
  return next((metric for metric in MAIN if any(key.endswith(metric.name) for key in row)), ACCURACY)
