"""What frozen features tell of labels: nearest neighbours, and two linear classifiers.

All take arrays, whatever made the features. A bank is the examples whose labels are known.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl

from nestnet.errors import UserError
from nestnet.evaluators.classification import batches
from nestnet.objectives.health import unit

Predict = Callable[[np.ndarray], np.ndarray]

TEMPERATURE = 0.07
# Programs are for widths that are multiples of this.
WIDTHS = 64
# Of the logistic regression: inverse strengths of its penalty, and of a large bank so many examples.
CS, FITTED = (0.01, 0.1, 1.0), 10_000
# Products of fewer multiplications than this take longer by several threads, which wait for one another.
THREADED = 2 ** 30
# Of the probe; 12,500 steps are those of POA's on ImageNet.
RATES, EPOCHS, STEPS, BATCH = (0.01, 0.03, 0.1, 0.3, 1.0), 10, (300, 12_500), 256


def knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, ks: Sequence[int], classes: int,
        temperature: float = TEMPERATURE) -> np.ndarray:
  """The classes that nearest neighbours give queries, as in DINO and POA (2408.01031, `eval/knn.py`).

  Similarities are cosines. Of the `max(ks)` nearest a softmax at the temperature makes weights; the first
  k vote with them. Of equally near ones the first in the bank counts, of equal votes the lowest class.

  Args:
    bank: `[examples, dim]`, of any lengths.
    labels: `[examples]`, those of the bank.
    queries: `[queries, dim]`.
    ks: How many neighbours vote, each answered.
    classes: Number of classes.
    temperature: T of the softmax of similarity / T.

  Returns:
    Classes, int32 `[ks, queries]`.

  Raises:
    ValueError: The bank has fewer examples than the largest k, or a k is below 1.

  Example:
    >>> bank = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    >>> knn(bank, np.array([0, 1, 1]), np.array([[2.0, 0.1]]), (1, 3), 2).tolist()
    [[0], [0]]
  """
  check_bank(len(bank), ks)
  known = jax.device_put((widened(bank), np.asarray(labels, np.int32)))
  found = [_knn(*known, batch, tuple(ks), classes, temperature) for batch in batches(widened(queries))]
  return np.concatenate(list(map(np.asarray, found)), axis=-1)[:, :len(queries)]


def knn_of_draws(bank: np.ndarray, labels: np.ndarray, draws: np.ndarray, queries: np.ndarray,
                 ks: Sequence[int], classes: int, temperature: float = TEMPERATURE) -> np.ndarray:
  """The same with parts of the bank: `draws` `[draws, examples]` names those of each.

  Returns:
    Classes, int32 `[draws, ks, queries]`.

  Raises:
    ValueError: As `knn`.
  """
  check_bank(draws.shape[1], ks)
  known = jax.device_put((widened(bank), np.asarray(labels, np.int32), draws))
  found = [_draws(*known, batch, tuple(ks), classes, temperature) for batch in batches(widened(queries))]
  return np.concatenate(list(map(np.asarray, found)), axis=-1)[..., :len(queries)]


def widened(features: np.ndarray) -> np.ndarray:
  """Features with zeros behind them up to a multiple of 64, float32 `[examples, dim]`.

  Angles and singular values stay what they are, and one program serves networks of several widths.
  """
  return np.pad(np.asarray(features, np.float32), ((0, 0), (0, -features.shape[-1] % WIDTHS)))


def check_bank(size: int, ks: Sequence[int]) -> None:
  """Raises `ValueError` unless a bank of so many examples has neighbours for every k."""
  if min(ks, default=0) < 1 or max(ks) > size:
    raise UserError(f"k of nearest neighbours: got {', '.join(map(str, ks)) or 'none'}; allowed is 1 to {size}, "
                    "the number of examples in the bank")


@functools.partial(jax.jit, static_argnames=("ks", "classes", "temperature"))
def _knn(bank, labels, queries, ks, classes, temperature):
  similar = jnp.matmul(unit(queries.astype(jnp.float32)), unit(bank).T, precision=jax.lax.Precision.HIGHEST)
  nearest, which = jax.lax.top_k(similar, max(ks))
  weights, near = jax.nn.softmax(nearest / temperature), labels[which]
  votes = jax.vmap(lambda weight, label: jax.ops.segment_sum(weight, label, classes))
  return jnp.stack([votes(weights[:, :k], near[:, :k]).argmax(-1) for k in ks]).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("ks", "classes", "temperature"))
def _draws(bank, labels, draws, queries, ks, classes, temperature):
  return jax.lax.map(
    lambda drawn: _knn(bank[drawn], labels[drawn], queries, ks, classes, temperature), draws)


def stratified(labels: np.ndarray, classes: int, each: int, draws: int, seed: int = 0) -> np.ndarray:
  """Draws of equally many examples of every class, without replacement.

  Args:
    labels: `[examples]`.
    classes: Number of classes.
    each: Examples of a class in a draw.
    draws: How many draws.
    seed: Of the draws.

  Returns:
    Numbers of examples, int32 `[draws, classes * each]`, class by class.

  Raises:
    ValueError: A class has fewer examples.

  Example:
    >>> labels = np.array([1, 0, 1, 0, 0])
    >>> labels[stratified(labels, 2, 2, draws=2)].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
  """
  members = [np.flatnonzero(labels == label) for label in range(classes)]
  for label, found in enumerate(members):
    if len(found) < each:
      raise UserError(f"{each} labels of each class: the bank has {len(found)} of class {label}; allowed is "
                      f"config.eval.knn_labels of at most {min(map(len, members))}, or a larger bank")
  rng = np.random.default_rng(seed)
  return np.stack([np.concatenate([rng.permutation(found)[:each] for found in members])
                   for _ in range(draws)]).astype(np.int32)


def logistic(bank: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray,
             cs: Sequence[float] = CS) -> Predict:
  """Logistic regression by scikit-learn on standardised features.

  Of a bank of more than 10,000 examples so many count, evenly spread.

  Args:
    bank: `[examples, dim]`.
    labels: `[examples]`, of at least two classes.
    held: `[held, dim]`, by which the penalty is chosen: the strongest of those that are best.
    held_labels: `[held]`.
    cs: Scikit-learn's C, inverse strengths of the penalty, to choose from.

  Returns:
    From features `[queries, dim]` to classes `[queries]`.
  """
  # Takes half a second, which commands without readouts need not wait.
  from sklearn import exceptions, linear_model, preprocessing

  count = min(len(bank), FITTED)
  some = np.arange(count) * len(bank) // count
  scaler = preprocessing.StandardScaler().fit(bank[some])
  known, classes = scaler.transform(bank[some]), len(np.unique(labels))
  models = [linear_model.LogisticRegression(C=c, max_iter=1000) for c in sorted(cs)]
  threads = 1 if known.size * classes < THREADED else None
  with warnings.catch_warnings(), threadpoolctl.threadpool_limits(threads):
    # Features of which one is nearly a sum of others converge slowly, and predict as well long before.
    warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
    for model in models:
      model.fit(known, labels[some])
  model = max(models, key=lambda model: np.mean(model.predict(scaler.transform(held)) == held_labels))
  return lambda queries: model.predict(scaler.transform(queries))


def probe(bank: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray, classes: int,
          rates: Sequence[float] = RATES, seed: int = 0) -> Predict:
  """A linear classifier by SGD on standardised features, from zeros.

  As POA's and DINOv2's (`eval/linear.py`): momentum 0.9, no decay, a cosine down to 0, batches of 256, 10 epochs
  (here at least 300 steps, at most 12,500), and several learning rates; unlike there the one that is best
  on held-out examples is taken, the smaller of equals, and none looks at the test split.

  Args:
    bank: `[examples, dim]`.
    labels: `[examples]`.
    held: `[held, dim]`, by which the rate is chosen.
    held_labels: `[held]`.
    classes: Number of classes.
    rates: Learning rates to choose from.
    seed: Of the order of examples.

  Returns:
    From features `[queries, dim]` to classes `[queries]`.
  """
  from sklearn import preprocessing

  scaler = preprocessing.StandardScaler().fit(bank)
  size = min(BATCH, len(bank))
  steps = int(np.clip(EPOCHS * len(bank) // size, *STEPS))
  rng = np.random.default_rng(seed)
  epochs = [rng.permutation(len(bank)) for _ in range(-(-steps * size // len(bank)))]
  order = np.concatenate(epochs)[:steps * size].reshape(steps, size).astype(np.int32)
  made = _probes(widened(scaler.transform(bank)), labels.astype(np.int32), order,
                 np.asarray(sorted(rates), np.float32), classes)
  weights, biases = jax.device_get(made)
  weights = weights[:, :bank.shape[1]]
  every = (scaler.transform(held) @ weights + biases[:, None]).argmax(-1)
  best = int(np.mean(every == held_labels, axis=-1).argmax())
  return lambda queries: (scaler.transform(queries) @ weights[best] + biases[best]).argmax(-1)


@functools.partial(jax.jit, static_argnums=4)
def _probes(bank, labels, order, rates, classes):
  """Weights `[rates, dim, classes]` and biases `[rates, classes]`, all rates side by side."""
  def trained(rate):
    tx = optax.sgd(optax.cosine_decay_schedule(rate, len(order)), momentum=0.9)
    params = jnp.zeros((bank.shape[1], classes)), jnp.zeros((classes,))

    def loss(params, batch):
      logits = bank[batch] @ params[0] + params[1][None]
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    def step(carry: Any, batch: jax.Array):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params, batch), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]

  return jax.vmap(trained)(rates)
