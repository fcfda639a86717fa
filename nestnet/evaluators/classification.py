"""Accuracy and loss on labelled images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestnet.errors import UserError
from nestnet.execution import resized
from nestnet.models.convolution import BORROWED, STATISTICS
from nestnet.models.switch import CHOICE
from nestnet.one_program import OneProgram
from nestnet.subnet import INPUTS, Subnet

BATCH = 256


def classification(module: nn.Module, variables: Any, data: Mapping[str, np.ndarray],
                   subnet: Subnet = Subnet()) -> Iterator[tuple[str, float]]:
  """Yields `accuracy`, a share, and `loss`, the mean cross-entropy in nats.

  Args:
    module: A network whose outputs have `logits` `[batch, classes]`.
    variables: Its variables.
    data: `image` `[examples, ...]` and `label` `[examples]`.
    subnet: Whose resolution the images are given at.

  Raises:
    ValueError: The network normalises by batch statistics and is not calibrated, or by those of another.
  """
  inputs = seen_by(subnet)
  logits = [output_of(module, inputs, variables, images, "logits") for images in batches(data["image"])]
  yield from metrics(np.concatenate(logits), data["label"])


def seen_by(subnet: Subnet) -> Subnet:
  """What of a sub-network steers its images: their resolution."""
  return Subnet(**{axis: size for axis, size in subnet.items() if axis in INPUTS})


@functools.partial(jax.jit, static_argnames=("module", "inputs", "name"))
def output_of(module: nn.Module, inputs: Subnet, variables: Any, images: np.ndarray, name: str) -> jax.Array:
  """An entry of a network's outputs on images, one program for each network.

  Args:
    module: The network.
    inputs: As from `seen_by`.
    variables: Its variables.
    images: `[batch, ...]`.
    name: Such as `"logits"`.

  Raises:
    ValueError: As `classification`; or there is no such entry.
  """
  images = resized(images, inputs)
  _check_own(module, variables)
  if STATISTICS in variables:
    return _named(module, module.apply(variables, images), name)
  outputs, recorded = module.apply(variables, images, mutable=[STATISTICS])
  _check_calibrated(module, recorded)
  return _named(module, outputs, name)


def _named(module, outputs, name):
  if name not in outputs:
    raise UserError(f"{type(module).__name__} gives {', '.join(outputs)}, no {name}, which its evaluation needs")
  return outputs[name]


def _check_calibrated(module, recorded):
  if jax.tree.leaves(recorded):
    # Its predictions would depend on which images stand beside one another.
    raise _uncalibrated(module, f"it has batch normalisation and its variables hold no {STATISTICS!r}")


def _check_own(module, variables):
  if BORROWED in variables.get(STATISTICS, {}):
    raise _uncalibrated(module, f"its {STATISTICS!r} are those of another network, from which it was cut or "
                        "loaded")


def _uncalibrated(module, why):
  return UserError(f"this {type(module).__name__} is not calibrated: {why}; first: "
                   f"variables[{STATISTICS!r}] = nestnet.calibrate.calibrate(module, variables, batches of "
                   "training images)")


def classification_all(one: OneProgram, variables: Mapping[str, Any], statistics: Any, vectors: np.ndarray,
                       data: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
  """The same of an array of sub-networks, `[members]`, by one compiled program.

  Args:
    one: What runs them.
    variables: The supernet's.
    statistics: As from `nestnet.calibrate.calibrate_all`; empty where nothing normalises by batches.
    vectors: `[members, entries]`, as from `one.vector`.
    data: As in `classification`; the resolution is that of each sub-network.

  Raises:
    ValueError: As in `classification`.
  """
  own = {STATISTICS: statistics} if statistics else {}
  _check_own(one.supernet.model, {**variables, **own})
  labels, hits, losses = data["label"], 0, 0.0
  for start, images in zip(range(0, len(labels), BATCH), batches(data["image"])):
    known = np.full(BATCH, -1, np.int32)
    known[:len(labels) - start] = labels[start:start + BATCH]
    right, loss = _scores(one)(variables, own, vectors, images, known)
    hits, losses = hits + np.asarray(right, np.int64), losses + np.asarray(loss, np.float64)
  yield "accuracy", hits / len(labels)
  yield "loss", losses / len(labels)


@functools.lru_cache(maxsize=8)
def _scores(one):
  """Of each member how many images it gets right, and its losses' sum; those without a label do not count."""
  def score(runnable, variables, images, labels):
    variables = {**runnable.cut(variables), CHOICE: runnable.choice}
    images, known = resized(images, runnable.subnet), labels >= 0
    outputs, recorded = runnable.module.apply(
      variables, images, mutable=[] if STATISTICS in variables else [STATISTICS])
    _check_calibrated(one.supernet.model, recorded)
    logits = outputs["logits"].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(known & (logits.argmax(-1) == labels)), jnp.sum(jnp.where(known, losses, 0))

  @jax.jit
  def all_scores(variables, own, vectors, images, labels):
    return jax.lax.map(lambda member: one.switch(
      score, member[0], {**variables, **member[1]}, images, labels), (vectors, own))

  return all_scores


def metrics(logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, float]]:
  """The same from logits, of which those past the last label are padding."""
  logits = jnp.asarray(logits[:len(labels)], jnp.float32)
  yield "accuracy", float(np.mean(np.asarray(logits.argmax(-1)) == labels))
  yield "loss", float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean())


def batches(images: np.ndarray, size: int = 0) -> Iterator[np.ndarray]:
  """Equal batches, of `BATCH` by default, so that one program serves all; the last is filled up with its
  first image."""
  size = size or BATCH
  for start in range(0, len(images), size):
    batch = images[start:start + size]
    yield np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
