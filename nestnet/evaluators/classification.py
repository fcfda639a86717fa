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
from nestnet.models.convolution import STATISTICS
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
    ValueError: The network normalises by batch statistics and is not calibrated.
  """
  inputs = Subnet(**{axis: size for axis, size in subnet.items() if axis in INPUTS})
  logits = [_logits(module, inputs, variables, images) for images in batches(data["image"])]
  yield from metrics(np.concatenate(logits), data["label"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(module, inputs, variables, images):
  images = resized(images, inputs)
  if STATISTICS in variables:
    return module.apply(variables, images)["logits"]
  outputs, recorded = module.apply(variables, images, mutable=[STATISTICS])
  if jax.tree.leaves(recorded):
    # Its predictions would depend on which images stand beside one another.
    raise UserError(f"this {type(module).__name__} is not calibrated: it has batch normalisation and its "
                    f"variables hold no {STATISTICS!r}; first: variables[{STATISTICS!r}] = "
                    "nestnet.calibrate.calibrate(module, variables, batches of training images)")
  return outputs["logits"]


def metrics(logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, float]]:
  """The same from logits, of which those past the last label are padding."""
  logits = jnp.asarray(logits[:len(labels)], jnp.float32)
  yield "accuracy", float(np.mean(logits.argmax(-1) == labels))
  yield "loss", float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean())


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
  """Equal batches, so that one program serves all; the last is filled up with its first image."""
  for start in range(0, len(images), BATCH):
    batch = images[start:start + BATCH]
    yield np.concatenate([batch, np.repeat(batch[:1], BATCH - len(batch), axis=0)])
