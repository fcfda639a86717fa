"""Accuracy from the genes of a sub-network: what search asks in place of an evaluation.

As in Once-for-All (1908.09791, section 3.4, and its code): one-hot genes, all zero for what is
absent, into an MLP of three hidden layers of 400.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from nestnet.errors import UserError
from nestnet.logs import Progress
from nestnet.space import Space
from nestnet.subnet import Subnet

# Fewer evaluated members than that teach nothing.
LEAST = 10
# Keeps the draws apart from those of training and of search.
_STREAM = 11
_PATIENCE = 100


def encode(space: Space, members: Iterable[Subnet]) -> np.ndarray:
  """Members as `[members, choices of all genes]` of 0 and 1: one-hot genes, zeros where one is absent.

  Example:
    >>> encode(Space(layers=(1, 2), mlp=(8, 16), per_layer=("mlp",)), [Subnet(layers=1, mlp=16)]).tolist()
    [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
  """
  genes = np.array([space.encode(m) for m in members], np.int32).reshape(-1, len(space.genes))
  columns = [genes[:, [i]] == np.arange(1, size + 1) for i, (_, size) in enumerate(space.genes)]
  return np.concatenate(columns, axis=1).astype(np.float32)


def decode(space: Space, codes: np.ndarray) -> list[Subnet]:
  """The members of `encode`'s rows."""
  ends = np.cumsum([size for _, size in space.genes])
  genes = [np.where(c.any(1), c.argmax(1) + 1, 0) for c in np.split(codes, ends[:-1], axis=1)]
  return [space.decode(row) for row in np.stack(genes, axis=1)]


class MLP(nn.Module):
  """`[members, inputs]` to `[members]`."""

  hidden: tuple[int, ...] = (400, 400, 400)

  @nn.compact
  def __call__(self, x):
    for size in self.hidden:
      x = nn.relu(nn.Dense(size)(x))
    return nn.Dense(1)(x)[:, 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
  """Predicts accuracy.

  Attributes:
    space: The family.
    module: The MLP.
    params: Its parameters.
    mean: What its output, at first around 0, is added to: the mean of the accuracies that it learned.
    scale: What its output is multiplied by: their standard deviation.
  """

  space: Space
  module: MLP
  params: Any
  mean: float
  scale: float

  def __call__(self, members: Sequence[Subnet]) -> np.ndarray:
    """Predicted accuracies `[members]`."""
    codes = encode(self.space, members)
    # A few lengths only, each a program.
    length = max(64, 1 << (len(codes) - 1).bit_length())
    padded = np.pad(codes, ((0, length - len(codes)), (0, 0)))
    return self.mean + self.scale * np.asarray(_apply(self.module, self.params, padded))[:len(codes)]


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, codes):
  return module.apply(params, codes)


def train(space: Space, members: Sequence[Subnet], accuracies: Sequence[float], seed: int = 0,
          epochs: int = 1000, hidden: tuple[int, ...] = (400, 400, 400), batch_size: int = 256) -> Predictor:
  """Learns accuracies of members: Adam of 1e-3 with a weight decay of 1e-4 on the squared error.

  A tenth is held out; the parameters that do best there are kept, and 100 epochs without a better
  one end it.

  Args:
    space: The family.
    members: At least 10 members.
    accuracies: One for each.
    seed: Of the start, the split and the order.
    epochs: At most so many.
    hidden: Sizes of the hidden layers.
    batch_size: Members in a step.

  Raises:
    ValueError: Fewer than 10 members.
  """
  if len(members) < LEAST:
    raise UserError(f"a predictor needs at least {LEAST} evaluated sub-networks, got {len(members)}")
  rng, codes, y = np.random.default_rng((_STREAM, seed)), encode(space, members), np.array(accuracies, float)
  order = rng.permutation(len(y))
  held, kept = np.split(order, [max(2, len(y) // 10)])
  mean, scale = float(y[kept].mean()), float(y[kept].std()) or 1.0
  targets = ((y - mean) / scale).astype(np.float32)
  size = min(batch_size, len(kept))
  module = MLP(tuple(hidden))
  params = module.init(jax.random.key(seed), codes[:1])
  # Decay as a part of the gradient, which is what "Adam with weight decay" meant there.
  optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3))
  loss = lambda params, x, y: jnp.square(module.apply(params, x) - y).mean()

  @jax.jit
  def epoch(params, moments, batches):
    def step(carry, batch):
      updates, moments = optimizer.update(jax.grad(loss)(carry[0], *batch), carry[1], carry[0])
      return (optax.apply_updates(carry[0], updates), moments), None

    (params, moments), _ = jax.lax.scan(step, (params, moments), batches)
    return params, moments, loss(params, codes[held], targets[held])

  moments, best, since = optimizer.init(params), (np.inf, params), 0
  for _ in range(epochs):
    shuffled = rng.permutation(kept)[:len(kept) // size * size].reshape(-1, size)
    params, moments, missed = epoch(params, moments, (codes[shuffled], targets[shuffled]))
    since += 1
    if missed < best[0]:
      best, since = (float(missed), params), 0
    if since == _PATIENCE:
      break
  return Predictor(space, module, best[1], mean, scale)


def quality(predicted: Sequence[float], accuracies: Sequence[float]) -> dict[str, float]:
  """Kendall's tau of the order, and the root of the mean squared error.

  Where all predictions are equal, or all accuracies, there is no order to be right about: tau is 0.

  Example:
    >>> quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    {'kendall_tau': 1.0, 'rmse': 0.0}
  """
  tau = float(stats.kendalltau(predicted, accuracies).statistic)
  return {"kendall_tau": 0.0 if np.isnan(tau) else round(tau, 12),
          "rmse": float(np.sqrt(np.mean(np.square(np.subtract(predicted, accuracies)))))}


def drawn(space: Space, count: int, seed: int = 0) -> list[Subnet]:
  """`count` distinct random members, always the same; all of a smaller space.

  A longer list begins with a shorter one.
  """
  found: dict[Subnet, None] = {}
  for draw in range(50 * count):
    if len(found) == count:
      break
    found.setdefault(space.sample((_STREAM, seed, draw)))
  return list(found)


def evaluated(path: str | os.PathLike[str], members: Iterable[Subnet],
              evaluate: Callable[[list[Subnet]], Iterable[Mapping[str, Any]]], at_once: int = 16,
              progress: Progress | None = None) -> list[dict[str, Any]]:
  """Rows of members, evaluated where the file does not have them yet; a kill loses nothing.

  Args:
    path: JSON lines, one row with `subnet` a line. Half a line at its end is dropped.
    members: Which.
    evaluate: Gives the rows of a list of members, in order.
    at_once: How many members are evaluated between two writes.
    progress: Shows how many are.

  Returns:
    The rows of `members`, in order.

  Raises:
    ValueError: A line that is not the last is damaged.
  """
  path, members = pathlib.Path(path), list(members)
  rows, whole = _read(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "ab") as file:
    file.truncate(whole)
    missing = [m for m in dict.fromkeys(members) if str(m) not in rows]
    if progress:
      progress.extend(len(missing))
    for start in range(0, len(missing), at_once):
      for row in evaluate(missing[start:start + at_once]):
        rows[row["subnet"]] = dict(row)
        file.write(json.dumps(row).encode() + b"\n")
        if progress:
          progress.advance(row)
      file.flush()
      os.fsync(file.fileno())
  return [rows[str(m)] for m in members]


def _read(path: pathlib.Path) -> tuple[dict[str, dict[str, Any]], int]:
  """The rows of a file, by sub-network, and the length of its whole lines in bytes."""
  content = path.read_bytes() if path.exists() else b""
  whole, rows = content.rfind(b"\n") + 1, {}
  for number, line in enumerate(content[:whole].splitlines(), 1):
    try:
      row = json.loads(line)
      rows[row["subnet"]] = row
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path}, line {number} is damaged: {error}; remove that line to go on") from error
  return rows, whole
