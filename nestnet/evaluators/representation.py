"""Features judged by what simple readouts find in them; labels enter here, never in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nestnet.data import Dataset, arrays
from nestnet.errors import UserError, one_of
from nestnet.evaluators import readouts
from nestnet.evaluators.classification import BATCH, batches, output_of, seen_by
from nestnet.objectives.health import effective_rank, feature_std
from nestnet.subnet import Subnet

# Neighbours, as in POA, and for banks of fewer images than `LARGE`.
KS, KS_SMALL, LARGE = (10, 20, 100, 200), (1, 5, 20), 40_000
# By which networks are chosen: neighbours, labels of each class, and draws of these.
FEW_K, FEW_LABELS, DRAWS = 5, 10, 20
READOUTS = ("logistic", "probe")
# Features of which the health is told.
HEALTH = 2048

_std, _rank = jax.jit(feature_std), jax.jit(effective_rank)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What `config.eval` says of readouts.

  Attributes:
    knn_k: How many neighbours vote in the full bank.
    knn_labels: Labels of each class in a small bank.
    readouts: Of `READOUTS`, those that are fitted.
    bank: At most so many training images are the bank, evenly spread; 0: all.
    examples: The same of the images by which something is chosen.
  """

  knn_k: tuple[int, ...]
  knn_labels: int
  readouts: tuple[str, ...]
  bank: int
  examples: int


def settings(dataset: Dataset, options: Mapping[str, Any]) -> Settings:
  """The settings of a run, checked against its data.

  Args:
    dataset: Labelled images.
    options: `config.eval`.

  Raises:
    ValueError: The bank is smaller than the largest k or than the labels of all classes, or an option is not
      of its kind.
  """
  most, examples = options.get("bank") or 0, options.get("examples") or 0
  there = len(dataset.split("train"))
  size = min(most or there, there)
  ks = options.get("knn_k") or (KS if size >= LARGE else KS_SMALL)
  labels = options.get("knn_labels") or FEW_LABELS
  if not all(isinstance(k, int) for k in ks):
    raise UserError(f"config.eval.knn_k: got {ks}, allowed is a tuple of whole numbers, such as {KS_SMALL}")
  try:
    readouts.check_bank(size, ks)
  except UserError as error:
    raise UserError(f"config.eval.knn_k, bank of {size} training images: {error}") from None
  least = -(-FEW_K // dataset.classes)
  if not least <= labels <= size // dataset.classes:
    raise UserError(f"config.eval.knn_labels: got {labels} for each of {dataset.classes} classes, allowed is "
                    f"{least} to {size // dataset.classes}: at least the {FEW_K} neighbours, at most the bank of "
                    f"{size} training images")
  fitted = options.get("readouts")
  for name in (fitted := READOUTS if fitted is None else tuple(fitted)):
    if name not in READOUTS:
      raise one_of("config.eval.readouts", name, READOUTS)
  return Settings(tuple(ks), labels, fitted, most, examples)


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Readouts of one kind of features.

  Attributes:
    features: From images `[images, ...]` to features `[images, dim]`.
    bank: Features of the bank, `[examples, dim]`.
    labels: Their labels.
    draws: Numbers of the examples of the small banks, `[draws, examples]`.
    classes: Number of classes.
    knn_k: As in `Settings`.
    k: The one of them that is best on the validation split, the smaller of equals.
    learned: By name, from features to classes.
  """

  features: Callable[[np.ndarray], np.ndarray]
  bank: np.ndarray
  labels: np.ndarray
  draws: np.ndarray
  classes: int
  knn_k: tuple[int, ...]
  k: int
  learned: Mapping[str, readouts.Predict]


def fit(module: nn.Module, variables: Any, subnet: Subnet, dataset: Dataset, options: Mapping[str, Any]) -> Fitted:
  """Readouts of a network's `features`.

  Args:
    module: A network whose outputs have `features` `[batch, dim]`.
    variables: Its variables.
    subnet: Whose resolution the images are given at.
    dataset: Whose training images, as they are, are the bank, and whose validation images choose.
    options: `config.eval`.

  Raises:
    ValueError: As `settings` and `classification`; a class has too few labels; or there are no features.
  """
  inputs = seen_by(subnet)

  def features(images):
    found = [output_of(module, inputs, variables, batch, "features") for batch in batches(images)]
    return np.concatenate([np.asarray(x, np.float32) for x in found])[:len(images)]

  return fit_features(features, dataset, options)


def fit_features(features: Callable[[np.ndarray], np.ndarray], dataset: Dataset, options: Mapping[str, Any]
                 ) -> Fitted:
  """Readouts of any features of images; the arguments are those of `fit` and `Fitted`."""
  chosen = settings(dataset, options)
  bank, labels = _read(features, bank_of(dataset, chosen.bank))
  held, held_labels = _read(features, [arrays(dataset, "validation", chosen.examples)])
  found = readouts.knn(bank, labels, held, chosen.knn_k, dataset.classes)
  right = dict(zip(chosen.knn_k, np.mean(found == held_labels, axis=-1)))
  learn = {"logistic": lambda: readouts.logistic(bank, labels, held, held_labels),
           "probe": lambda: readouts.probe(bank, labels, held, held_labels, dataset.classes)}
  draws = readouts.stratified(labels, dataset.classes, chosen.knn_labels, DRAWS)
  return Fitted(features, bank, labels, draws, dataset.classes, chosen.knn_k,
                max(sorted(right), key=right.get), {name: learn[name]() for name in chosen.readouts})


def bank_of(dataset: Dataset, most: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Training images in batches, as evaluations see them: at most so many, evenly spread; 0: all.

  They need not fit into memory; a feature of each does.
  """
  source = dataset.split("train")
  count = min(most or len(source), len(source))
  indices = np.arange(count) * len(source) // count
  return (source.evaluated(indices[start:start + BATCH]) for start in range(0, count, BATCH))


def _read(features, examples: Iterable[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  found = [(features(batch["image"]), batch["label"]) for batch in examples]
  return tuple(np.concatenate(part) for part in zip(*found))


def representation(module: nn.Module, variables: Any, data: Mapping[str, np.ndarray],
                   subnet: Subnet, fitted: Fitted) -> Iterator[tuple[str, float]]:
  """Yields accuracies of readouts of a network's `features`, all shares, and the features' health.

  - `knn`: 5 nearest neighbours in a bank of few labels of each class, the mean over 20 draws of it.
  - `knn_full`: nearest neighbours in the full bank, with the k that is best on validation.
  - `logistic`, `probe`: linear classifiers, as `readouts` has them.
  - `knn_k1`, `knn_full_k1`, ...: neighbours by their number, for few labels as far as these go.
  - `feature_std`, `effective_rank`: of the first 2,048 features, as in `nestnet.objectives.health`.

  Args:
    module: Of no effect, as are the next: `fitted` has them.
    variables: Its variables.
    data: `image` `[examples, ...]` and `label` `[examples]`.
    subnet: Which member it is.
    fitted: As from `fit`.
  """
  del module, variables, subnet
  yield from measured(fitted, data)


def measured(fitted: Fitted, data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
  """The same of features of any kind."""
  queries, labels = fitted.features(data["image"]), data["label"]
  share = lambda found: float(np.mean(found == labels))
  few_k = sorted({k for k in fitted.knn_k if k <= fitted.draws.shape[1]} | {FEW_K})
  few = readouts.knn_of_draws(fitted.bank, fitted.labels, fitted.draws, queries, few_k, fitted.classes)
  few = {k: share(found) for k, found in zip(few_k, few.swapaxes(0, 1))}
  full = readouts.knn(fitted.bank, fitted.labels, queries, fitted.knn_k, fitted.classes)
  full = {k: share(found) for k, found in zip(fitted.knn_k, full)}
  yield "knn", few[FEW_K]
  yield "knn_full", full[fitted.k]
  for name, predict in fitted.learned.items():
    yield name, share(predict(queries))
  yield from ((f"knn_k{k}", value) for k, value in few.items())
  yield from ((f"knn_full_k{k}", value) for k, value in full.items())
  some = readouts.widened(queries[:HEALTH])
  # The zeros behind features count as dimensions.
  yield "feature_std", float(_std(some)) * some.shape[-1] / queries.shape[-1]
  yield "effective_rank", float(_rank(some))
