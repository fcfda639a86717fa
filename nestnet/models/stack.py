"""How layers are stacked: the one place that knows scanned from unrolled.

A stack of equal layers is one scanned block, its parameters stacked over the depth axis. A stack
whose layers have sizes of their own is unrolled, its parameters under `layers_0`, `layers_1`, ...
`nestnet.slicing.take` goes from the one form to the other.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import REST, STACK, axes
from nestnet.errors import UserError
from nestnet.models.switch import Layers, Part, Switched

Block = Callable[..., nn.Module]
_APPLIED: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar("applied", default=None)


@contextlib.contextmanager
def applied(apply: Callable[..., Any]) -> Iterator[None]:
  """Within, `apply(module, x, constants, remat, kwargs)` stands for each layer and gives its output.

  A scanned stack asks once for all its layers. What counts or times layers one by one looks here.
  """
  token = _APPLIED.set(apply)
  try:
    yield
  finally:
    _APPLIED.reset(token)


def stack(block: Block | Mapping[str, Block], x: Any, *, layers: int, sizes: Mapping[str, Any],
          name: str = "blocks", depth: str = "layers",
          constants: Mapping[str, Sequence[float]] | None = None, remat: bool = False,
          taps: bool = False, unroll: int = 1, lead: Block | None = None, reads: Any = None,
          writes: Any = None, **kwargs: Any) -> tuple[Any, Any]:
  """Applies `layers` blocks to `x`; call it in the compact method of an architecture.

  A `layers` of the type `Layers` is cut layer by layer, from the parameters of the largest. With sizes
  that are `OneOf` several it is the whole family in one program: the `choice` collection says which
  layers are there and how large each is.

  Args:
    block: Makes a block: `block(name=..., **sizes)`. The block is called as
      `block(x, constants, **kwargs)` and returns an `x` of the same shape. Or the parts that a layer
      applies in turn, by name, each such a block; parts have sizes of their own, so one program for
      a whole family needs a branch for each size of a part and not for each pair of sizes.
    x: The input, an array or a tree.
    layers: Number of layers.
    sizes: Fields of the block: one size for all layers, or a tuple with one size a layer. With
      parts: such fields by part.
    name: Key of the stack in the parameter tree.
    depth: Name of the axis over the layers.
    constants: Values of each layer that are no parameters (drop-path rates). They live in the
      `constants` collection with a `depth` axis, so that `take` carries them with their layer.
    remat: Whether to recompute a block in the backward pass.
    taps: Whether to return every layer's output too.
    unroll: Layers in one iteration of the scan.
    lead: Makes the first layer where it differs from the others (a stride, another width of its input),
      called as a block is. It is one of the `layers` and has the first of the sizes; its parameters are
      under `layers_0`, and those of the others, a stack of their own, under `rest`.
    reads: The last dimension of `x`, for models whose `carried` axes it follows from: where data says
      which of several it is, `x` has zeros behind it.
    writes: The same of the output; without `lead` it is what is read.
    **kwargs: Passed to every call of the block; arrays among them may have a derivative.

  Returns:
    The output, and the outputs of all layers, `[layers, ...]`, or None.

  Raises:
    ValueError: A tuple of sizes has another length than `layers`.
  """
  if lead is not None:
    _check_lengths(sizes, layers, depth)
    led = _Led(lead, block, layers, sizes, depth, dict(constants or {}), remat, taps, unroll, reads, writes,
               name=name)
    return led(x, kwargs)
  parts = _parts(block, sizes, reads)
  constants = {k: jnp.asarray(v, jnp.float32) for k, v in (constants or {}).items()}
  unroll = min(unroll, layers)
  if isinstance(layers, Layers):
    return Switched(parts, layers, depth, name=name)(x, constants, taps, unroll, kwargs)
  lists = {f: s for part in parts for f, s in part.sizes.items() if isinstance(s, tuple)}
  _check_lengths(lists, layers, depth)
  run = _unrolled if lists else _scanned
  return run(parts, x, layers, name, depth, constants, remat, taps, unroll, kwargs)


def single(block: Block, x: Any, *, sizes: Mapping[str, Any], name: str, reads: Any = None,
           writes: Any = None, **kwargs: Any) -> Any:
  """Applies one module that stands outside of stacks; call it in the compact method of an architecture.

  It is for what depends on the `carried` axes of a model, which lists its name among its `singles`. With
  sizes that are `OneOf` several, data says in one program which it has.

  Args:
    block: Makes the module: `block(name=..., **sizes)`. It is called as `block(x, **kwargs)`.
    x: The input, an array or a tree.
    sizes: Fields of the module.
    name: Its key in the parameter tree.
    reads: As in `stack`.
    writes: As in `stack`.
    **kwargs: Passed to the call; arrays among them may have a derivative.
  """
  part = Part(None, block, sizes, reads, writes)
  if part.several:
    return Switched((part,), Layers(1, part.several[0].sites), None, name=name)(x, None, False, 1, kwargs)[0]
  return block(name=name, **sizes)(x, **kwargs)


def _check_lengths(sizes, layers, depth):
  for field, size in sizes.items():
    if isinstance(size, tuple) and len(size) != layers:
      raise UserError(f"{field}={size} lists {len(size)} sizes for {depth}={layers}")


def constant(module: nn.Module, name: str, initial: Mapping[str, Any], needed: bool = False) -> jax.Array:
  """A layer's constant inside its block: the stored value; the initial one when there is none.

  Args:
    module: The block.
    name: Of the constant.
    initial: What the block is called with, which follows from the layer's position.
    needed: Whether only the stored value will do: a layer that moved would be another one without it.

  Raises:
    ValueError: It is needed and not stored.
  """
  if not module.is_initializing() and not module.has_variable("constants", name):
    if needed:
      raise UserError(f"{type(module).__name__}: there is no {name} among the variables; allowed are all those "
                      "of `init`, {'params': ..., 'constants': ...}, as `take` cuts both")
    return initial[name]
  return module.variable("constants", name, axes(lambda: initial[name], "")).value


def _parts(block, sizes, carried) -> tuple[Part, ...]:
  if not isinstance(block, Mapping):
    return (Part(None, block, sizes, carried, carried),)
  return tuple(Part(name, make, sizes.get(name, {}), carried, carried) for name, make in block.items())


class _Layer(nn.Module):
  """A layer that applies several parts in turn."""

  parts: tuple[Part, ...]

  @nn.compact
  def __call__(self, x, constants, **kwargs):
    for part in self.parts:
      x = part.make(name=part.name, **part.sizes)(x, constants, **kwargs)
    return x


def _layer(parts: tuple[Part, ...], name: str, position: int = 0) -> nn.Module:
  """The layer at a position, with the sizes that it has there."""
  parts = tuple(dataclasses.replace(p, sizes={
    f: s[position] if isinstance(s, tuple) else s for f, s in p.sizes.items()}) for p in parts)
  if parts[0].name is None:
    return parts[0].make(name=name, **parts[0].sizes)
  return _Layer(parts, name=name)


def _call(module, x, constants, remat, kwargs):
  if apply := _APPLIED.get():
    return apply(module, x, constants, remat, kwargs)
  if not remat:
    return module(x, constants, **kwargs)
  return nn.remat(lambda m, y, c: m(y, c, **kwargs), prevent_cse=False)(module, x, constants)


def _scanned(parts, x, layers, name, depth, constants, remat, taps, unroll, kwargs):
  def body(module, carry, layer_constants):
    y = _call(module, carry, layer_constants, remat, kwargs)
    return y, y if taps else None

  scan = nn.scan(
    body, length=layers, unroll=unroll, in_axes=0,
    variable_axes={True: 0}, split_rngs={True: True},
    metadata_params={nn.PARTITION_NAME: depth, STACK: name})
  return scan(_layer(parts, name), x, constants)


class _Unrolled(nn.Module):
  """Layers that differ in size, one after another."""

  parts: tuple[Part, ...]
  layers: int
  depth: str

  @nn.compact
  def __call__(self, x, constants, remat, kwargs):
    outputs = []
    for i in range(self.layers):
      layer_constants = {k: v[i] for k, v in constants.items()}
      x = _call(_layer(self.parts, f"{self.depth}_{i}", i), x, layer_constants, remat, kwargs)
      outputs.append(x)
    return x, outputs


class _Led(nn.Module):
  """A layer that differs from those behind it, and a stack of these."""

  lead: Block
  block: Block
  layers: int
  sizes: Mapping[str, Any]
  depth: str
  constants: Mapping[str, Sequence[float]]
  remat: bool
  taps: bool
  unroll: int
  reads: Any
  writes: Any

  @nn.compact
  def __call__(self, x, kwargs):
    constants = {k: jnp.asarray(v, jnp.float32) for k, v in self.constants.items()}
    name = f"{self.depth}_0"
    sizes = {field: size[0] if isinstance(size, tuple) else size for field, size in self.sizes.items()}
    count = self.layers.of if isinstance(self.layers, Layers) else int
    if isinstance(self.layers, Layers):
      part = Part(None, self.lead, sizes, self.reads, self.writes)
      first = Switched((part,), count(1), self.depth, name=name)
      x, _ = first(x, {k: v[:1] for k, v in constants.items()}, False, 1, kwargs)
    else:
      x = _call(self.lead(name=name, **sizes), x, {k: v[0] for k, v in constants.items()}, self.remat, kwargs)
    outputs = jax.tree.map(lambda y: y[None], x)
    if self.layers > 1:
      behind = {field: _behind(size) for field, size in self.sizes.items()}
      x, more = stack(
        self.block, x, layers=count(self.layers - 1), sizes=behind, name=REST, depth=self.depth,
        constants={k: v[1:] for k, v in constants.items()}, remat=self.remat, taps=self.taps,
        unroll=self.unroll, reads=self.writes, **kwargs)
      if self.taps:
        outputs = jax.tree.map(lambda y, ys: jnp.concatenate([y, ys]), outputs, more)
    return x, outputs if self.taps else None


def _behind(size):
  """The sizes behind the first one: one for all where they are equal, as a `Subnet` has it."""
  if not isinstance(size, tuple):
    return size
  return size[1] if len(set(size[1:])) == 1 else size[1:]


def _unrolled(parts, x, layers, name, depth, constants, remat, taps, unroll, kwargs):
  x, outputs = _Unrolled(parts, layers, depth, name=name)(x, constants, remat, kwargs)
  return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs) if taps else None
