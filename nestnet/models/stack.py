"""How layers are stacked: the one place that knows scanned from unrolled.

A stack of equal layers is one scanned block, its parameters stacked over the depth axis. A stack
whose layers have sizes of their own is unrolled, its parameters under `layers_0`, `layers_1`, ...
`nestnet.slicing.take` goes from the one form to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import STACK, axes
from nestnet.errors import UserError
from nestnet.subnet import Size


def stack(block: Callable[..., nn.Module], x: Any, *, layers: int, sizes: Mapping[str, Size],
          name: str = "blocks", depth: str = "layers",
          constants: Mapping[str, Sequence[float]] | None = None, remat: bool = False,
          taps: bool = False, unroll: int = 1, **kwargs: Any) -> tuple[Any, Any]:
  """Applies `layers` blocks to `x`; call it in the compact method of an architecture.

  Args:
    block: Makes a block: `block(name=..., **sizes)`. The block is called as
      `block(x, constants, **kwargs)` and returns an `x` of the same shape.
    x: The input, an array or a tree.
    layers: Number of layers.
    sizes: Fields of the block: one size for all layers, or a tuple with one size a layer.
    name: Key of the stack in the parameter tree.
    depth: Name of the axis over the layers.
    constants: Values of each layer that are no parameters (drop-path rates). They live in the
      `constants` collection with a `depth` axis, so that `take` carries them with their layer.
    remat: Whether to recompute a block in the backward pass.
    taps: Whether to return every layer's output too.
    unroll: Layers in one iteration of the scan.
    **kwargs: Passed to every call of the block.

  Returns:
    The output, and the outputs of all layers, `[layers, ...]`, or None.

  Raises:
    ValueError: A tuple of sizes has another length than `layers`.
  """
  for field, size in sizes.items():
    if isinstance(size, tuple) and len(size) != layers:
      raise UserError(f"{field}={size} lists {len(size)} sizes for {depth}={layers}")
  constants = {k: jnp.asarray(v, jnp.float32) for k, v in (constants or {}).items()}
  run = _unrolled if any(isinstance(s, tuple) for s in sizes.values()) else _scanned
  return run(block, x, layers, sizes, name, depth, constants, remat, taps, unroll, kwargs)


def constant(module: nn.Module, name: str, initial: Mapping[str, Any]) -> jax.Array:
  """A layer's constant inside its block: the stored value; the initial one when there is none."""
  if not module.is_initializing() and not module.has_variable("constants", name):
    return initial[name]
  return module.variable("constants", name, axes(lambda: initial[name], "")).value


def _call(module, x, constants, remat, kwargs):
  if not remat:
    return module(x, constants, **kwargs)
  return nn.remat(lambda m, y, c: m(y, c, **kwargs), prevent_cse=False)(module, x, constants)


def _scanned(block, x, layers, sizes, name, depth, constants, remat, taps, unroll, kwargs):
  def body(module, carry, layer_constants):
    y = _call(module, carry, layer_constants, remat, kwargs)
    return y, y if taps else None

  scan = nn.scan(
    body, length=layers, unroll=min(unroll, layers), in_axes=0,
    variable_axes={"params": 0, "constants": 0},
    split_rngs={"params": True, "dropout": True},
    metadata_params={nn.PARTITION_NAME: depth, STACK: name})
  return scan(block(name=name, **sizes), x, constants)


class _Unrolled(nn.Module):
  """Layers that differ in size, one after another."""

  block: Callable[..., nn.Module]
  sizes: tuple[dict[str, int], ...]
  depth: str

  @nn.compact
  def __call__(self, x, constants, remat, kwargs):
    outputs = []
    for i, sizes in enumerate(self.sizes):
      layer_constants = {k: v[i] for k, v in constants.items()}
      x = _call(self.block(name=f"{self.depth}_{i}", **sizes), x, layer_constants, remat, kwargs)
      outputs.append(x)
    return x, outputs


def _unrolled(block, x, layers, sizes, name, depth, constants, remat, taps, unroll, kwargs):
  each = tuple({f: s[i] if isinstance(s, tuple) else s for f, s in sizes.items()}
               for i in range(layers))
  x, outputs = _Unrolled(block, each, depth, name=name)(x, constants, remat, kwargs)
  return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs) if taps else None
