"""What a network computes on the way, on some batches: what kernels read, and what layers change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError
from nestnet.models.stack import applied
from nestnet.permuting import enclosing, named_leaves

SEEN = "importance"
# `forward(apply, batch)`: runs a network on what it needs of a batch.
Forward = Callable[[Callable[..., Any], Any], Any]


def _itself(apply, batch):
  return apply(batch)


def activations(model: nn.Module, axes: Any, variables: Mapping[str, Any], batches: Iterable[Any],
                forward: Forward = _itself) -> Any:
  """How large the inputs of every kernel are, unit by unit: the scores of Minitron (2407.14679, section 2.2).

  A unit's is its absolute value, or, where further dimensions of the input are inside it, as those of a
  head are, their Euclidean norm; the mean over all else that it stands beside, examples and positions.

  Args:
    model: The network.
    axes: Axis names of its parameters.
    variables: Its variables.
    batches: What it is run on, at least one.
    forward: How; by default a batch is its argument.

  Returns:
    By the place of each kernel's module, then by the axes that it contracts, `[units]`, or `[units of the
    axis that encloses it, units]`; stacked over the layers of a stack.
  """
  outer = enclosing(axes)
  kernels = {path[:-1]: [n for n in names.names if n in names.contracted]
             for path, names, _ in named_leaves(axes) if path[-1] == "kernel"}

  def record(call, args, kwargs, context):
    names = kernels.get(context.module.path, ())
    if context.method_name == "__call__":
      # The contracted dimensions of a kernel are the trailing ones of its input.
      x = args[0].astype(jnp.float32)
      for i, name in enumerate(names, x.ndim - len(names)):
        size = jnp.sqrt(jnp.square(x).sum([*range(i + 1, x.ndim)])) if i + 1 < x.ndim else jnp.abs(x)
        around = [x.ndim - len(names) + names.index(outer[name])] if outer.get(name) in names else []
        _sow(context.module, name, size.mean([d for d in range(i) if d not in around]))
    return call(*args, **kwargs)

  def recorded(variables, batch):
    with nn.intercept_methods(record):
      return _seen(model, variables, batch, forward)

  return _mean(recorded, variables, batches)


def influence(model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any],
              forward: Forward = _itself) -> np.ndarray:
  """How much each layer changes the direction of what it is given: 1 - cos(input, output).

  The mean over examples and positions (block importance of Minitron, 2407.14679, section 2.2, and of
  ShortGPT, 2403.03853). `nestnet.importance.rank_layers` says which layers to keep.

  Args:
    model: A network with one stack of layers.
    variables: Its variables.
    batches: As in `activations`.
    forward: As in `activations`.

  Returns:
    `[layers]`, from 0 to 2.

  Raises:
    ValueError: The model has no stack of layers, or several.
  """
  def watch(module, x, constants, remat, kwargs):
    del remat
    y = module(x, constants, **kwargs)
    a, b = (v.astype(jnp.float32) for v in (x, y))
    lengths = jnp.sqrt(jnp.square(a).sum(-1) * jnp.square(b).sum(-1))
    # What is zero has no direction, and changes none.
    cosine = jnp.where(lengths > 0, (a * b).sum(-1) / jnp.maximum(lengths, 1e-30), 1.0)
    _sow(module, SEEN, 1 - cosine.mean())
    return y

  def recorded(variables, batch):
    with applied(watch):
      return _seen(model, variables, batch, forward)

  found = _mean(recorded, variables, batches)
  if len(found) != 1:
    raise UserError(f"{type(model).__name__} has {len(found)} stacks of layers; allowed are networks with "
                    "one")
  leaves = jax.tree.leaves_with_path(found)
  # Where layers stand apart, layers_10 is behind layers_9.
  number = lambda keys: [int(n) for n in re.findall(r"_(\d+)'", jax.tree_util.keystr(keys))]
  return np.concatenate([np.atleast_1d(leaf) for _, leaf in sorted(leaves, key=lambda pair: number(pair[0]))])


def _sow(module, name, value):
  module.sow(SEEN, name, value, init_fn=lambda: 0.0, reduce_fn=lambda _, new: new)


def _seen(model, variables, batch, forward):
  """What is sown while the network runs on a batch."""
  seen = {}

  def apply(*inputs, **options):
    outputs, recorded = model.apply(variables, *inputs, mutable=[SEEN], **options)
    seen.update(recorded.get(SEEN, {}))
    return outputs

  forward(apply, batch)
  return seen


def _mean(recorded, variables, batches):
  run, total, count = jax.jit(recorded), None, 0
  for batch in batches:
    found = jax.device_get(run(variables, batch))
    total = found if total is None else jax.tree.map(np.add, total, found)
    count += 1
  if not count:
    raise UserError("no batches to see what a network computes; allowed is at least one")
  return jax.tree.map(lambda x: x / count, total)
