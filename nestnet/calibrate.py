"""Statistics of batch normalisation for sub-networks, from batches of training images.

Trained with the moments of each batch, a network has none of its own until it is calibrated: the
moments of every normalisation are recorded, one forward pass a batch, and averaged. They belong to one
sub-network; those of another, cut, are wrong for it (1908.09791; 1903.05134, section 3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from nestnet.axes import abstract_variables
from nestnet.errors import UserError
from nestnet.execution import Runnable, resized
from nestnet.models.convolution import STATISTICS
from nestnet.models.switch import CHOICE
from nestnet.one_program import OneProgram
from nestnet.subnet import Subnet


def calibrate(module: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], pooled: bool = True
              ) -> dict[str, Any]:
  """The `batch_stats` of an ordinary network, such as a sub-network; empty where nothing normalises.

  Args:
    module: The network; it is compiled once for each size of a batch.
    variables: Its variables.
    batches: Images, `[batch, rows, columns, channels]` each.
    pooled: As in `average`.

  Example:
    >>> from nestnet.models.convolution import BatchNorm
    >>> net = nn.Sequential((lambda x: BatchNorm("channels", name="norm")(x, train=False),))
    >>> images = jnp.arange(4.0).reshape(4, 1, 1, 1)
    >>> stats = calibrate(net, net.init(jax.random.key(0), images), [images[:1], images[1:]])
    >>> jax.tree.map(lambda x: round(x.item(), 3), stats)
    {'norm': {'mean': 1.5, 'var': 1.25}}
  """
  return average(functools.partial(_alone, module, dict(variables)), batches, pooled)


def calibrate_all(one: OneProgram, variables: Mapping[str, Any], vectors: Any, batches: Iterable[Any],
                  pooled: bool = True) -> dict[str, Any]:
  """The `batch_stats` of an array of sub-networks, by one compiled program.

  Args:
    one: What runs them.
    variables: The supernet's.
    vectors: `[members, entries]`, as from `one.vector`.
    batches: Images, `[batch, rows, columns, channels]` each; all members see the same.
    pooled: As in `average`.

  Returns:
    Arrays `[members, ...]` in the shapes of the largest network's statistics, zeros behind what a
    member has.
  """
  return average(functools.partial(_together(one), dict(variables), jnp.asarray(vectors)), batches, pooled)


def average(moments_of: Callable[[Any], dict[str, Any]], batches: Iterable[Any], pooled: bool = True
            ) -> dict[str, Any]:
  """Means and variances over all batches from those of each, weighed by the number of images.

  Args:
    moments_of: From images to a tree of nodes with `mean` and `var`, as `moments` gives it.
    batches: Images `[batch, ...]`.
    pooled: Whether the variance of the batches' means is added to the mean of their variances. Then
      what the first layer gets are the moments of all images, however they are split; without it
      variances are too small by about one part in (images of a batch * positions), which tells
      in small batches of small images. False: as Once-for-All's code has it.

  Raises:
    ValueError: There is no batch.
  """
  total, seen = None, 0
  for images in batches:
    new, seen = moments_of(images), seen + len(images)
    total = new if total is None else _merged(total, new, np.float32(len(images) / seen), pooled)
  if total is None:
    raise UserError("calibration needs images: got no batch, allowed is at least 1")
  return total


def moments(runnable: Runnable, variables: Mapping[str, Any], images: Any) -> dict[str, Any]:
  """The moments of one batch wherever a sub-network normalises by them, in the shapes of what runs it.

  Pure, to be traced; a sub-network may be data.
  """
  own = runnable.cut({name: tree for name, tree in variables.items() if name != STATISTICS})
  if runnable.choice is not None:
    own = {**own, CHOICE: runnable.choice}
  _, recorded = runnable.module.apply(own, resized(images, runnable.subnet), mutable=[STATISTICS])
  return recorded.get(STATISTICS, {})


@functools.lru_cache(maxsize=256)
def normalises(module: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
  """Whether a network needs calibration: whether it records moments of a batch. Nothing is computed."""
  variables = meta.unbox(abstract_variables(module, *inputs))
  runnable = Runnable(Subnet(), lambda own: own, module)
  return bool(jax.tree.leaves(jax.eval_shape(lambda v, x: moments(runnable, v, x), variables, *inputs)))


@functools.partial(jax.jit, static_argnums=0)
def _alone(module, variables, images):
  return moments(Runnable(Subnet(), lambda own: own, module), variables, images)


@functools.lru_cache(maxsize=8)
def _together(one: OneProgram):
  @jax.jit
  def all_moments(variables, vectors, images):
    return jax.lax.map(lambda vector: one.moments(vector, variables, images), vectors)

  return all_moments


@functools.partial(jax.jit, static_argnums=3)
def _merged(total, new, share, pooled):
  """Moments of all images so far and of new ones, which are a `share` of them together."""
  if not isinstance(total.get("mean"), jax.Array):
    return {key: _merged(total[key], new[key], share, pooled) for key in total}
  apart = new["mean"] - total["mean"]
  var = total["var"] + share * (new["var"] - total["var"])
  return {"mean": total["mean"] + share * apart,
          "var": var + share * (1 - share) * jnp.square(apart) if pooled else var}
