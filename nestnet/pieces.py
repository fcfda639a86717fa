"""What a member consists of: the layers of its stacks, and what stands around them.

A layer is independent of its neighbours, given the sizes of the axes of its own parameters. So
whatever adds up over layers (parameters, FLOPs, time) is known for every member of a family as soon
as each distinct layer has been looked at once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from nestnet import cost
from nestnet.axes import REST, Axes, flat, is_axes
from nestnet.execution import Supernet, resized, sizes_of
from nestnet.models.stack import applied
from nestnet.slicing import axes_in
from nestnet.subnet import INPUTS, Subnet, depth_of, kept_count

_LISTED = re.compile(r"(layers(?:_\d+)?)_(\d+)")
AROUND = "around"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
  """One layer, or all that stands around the layers.

  Attributes:
    name: Where it is, and the sizes of its axes.
    run: `run(variables, *inputs)` is what it does.
    variables: Shapes of `params` and of the other collections that it makes.
    inputs: Their shapes.
    outputs: The shape of what it gives.
  """

  name: str
  run: Callable[..., Any]
  variables: dict[str, Any]
  inputs: tuple[Any, ...]
  outputs: Any

  @functools.cached_property
  def params(self) -> int:
    """The number of its parameters."""
    return cost.count_tree(self.variables.get("params", {}))

  @functools.cached_property
  def flops(self) -> int:
    """FLOPs of its forward pass, as `cost.flops`."""
    return cost.count_flops(self.run, self.variables, *self.inputs)

  @functools.cached_property
  def train_flops(self) -> int:
    """FLOPs of its forward and backward pass; of a layer with respect to what it reads, too."""
    def loss(params, inputs, rest):
      return cost.squares(self.run({"params": params, **rest}, *inputs))

    rest = {name: tree for name, tree in self.variables.items() if name != "params"}
    argnums = (0,) if self.name.startswith(AROUND) else (0, 1)
    # Positions, which a layer reads too, have no derivative.
    derivative = jax.value_and_grad(loss, argnums, allow_int=True)
    return cost.count_flops(derivative, self.variables.get("params", {}), self.inputs, rest)


@dataclasses.dataclass(frozen=True)
class _Stack:
  """A stack in the supernet's tree.

  Attributes:
    path: Its key there.
    depth: The axis over its layers.
    length: How many layers it has.
    lead: Axes of the first layer's parameters where that is one of its own, else None.
    axes: Axes of the parameters of the others.
  """

  path: Path
  depth: str
  length: int
  lead: frozenset[str] | None
  axes: frozenset[str]


class Pieces:
  """The pieces of the members of a family; each distinct one is traced once.

  What a layer does must follow from its place, the sizes of its parameters' axes and what it reads.

  Args:
    supernet: The family.
    inputs: Shapes of the arguments of the model; the supernet's own by default.

  Example:
    >>> from nestnet import Space
    >>> from nestnet.models.vit import ViT
    >>> model = ViT(layers=2, embed=8, heads=2, mlp=16, classes=3)
    >>> images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    >>> pieces = Pieces(Supernet(model, Space(layers=(1, 2), mlp=(8, 16)), (images,)))
    >>> [piece.name for piece in pieces.of(Subnet(layers=2, mlp=(8, 16)))]
    ['around', 'blocks mlp=8', 'blocks mlp=16']
    >>> pieces.costs(Subnet(layers=1, mlp=8))
    {'params': 675, 'flops': 4656}
  """

  def __init__(self, supernet: Supernet, inputs: tuple[jax.ShapeDtypeStruct, ...] | None = None):
    self.supernet, self.inputs = supernet, inputs or supernet.inputs
    axes, shapes = supernet.axes["params"], supernet.shapes["params"]
    seen: dict[Path, None] = {}

    def note(place, *layer):
      seen[place[0]] = None
      return _layer_piece("", *layer)

    self._trace(supernet.space.largest, AROUND, note)
    self._stacks = tuple(_stack(path, axes, shapes) for path in seen)
    paths = {stack.path for stack in self._stacks}
    self._around = frozenset(_outside(axes, paths))
    # Sizes that no parameter shows may matter to any piece.
    self._hidden = (frozenset(sizes_of(supernet.model, supernet.space.largest)) - axes_in(axes)) | set(INPUTS)
    self._found: dict[tuple, Piece] = {}

  def of(self, subnet: Subnet) -> list[Piece]:
    """What stands around the layers, then the layers of each stack in order."""
    keys = self._keys(subnet)
    if any(key not in self._found for key in keys):
      self._look(subnet, keys)
    return [self._found[key] for key in keys]

  def costs(self, subnet: Subnet) -> dict[str, int]:
    """Parameters, and FLOPs of the forward pass on the inputs, exactly as `nestnet.cost` counts them."""
    pieces = self.of(subnet)
    return {"params": sum(p.params for p in pieces), "flops": sum(p.flops for p in pieces)}

  def train_flops(self, subnet: Subnet) -> int:
    """FLOPs of forward and backward pass, as `cost.flops(..., train=True)`."""
    return sum(p.train_flops for p in self.of(subnet))

  def _keys(self, subnet: Subnet) -> list[tuple]:
    sizes = dict(sizes_of(self.supernet.model, subnet).chosen)
    sizes |= {axis: subnet[axis] for axis in INPUTS if axis in subnet}
    keys: list[tuple] = [((AROUND,), False, _only(sizes, self._around | self._hidden))]
    for stack in self._stacks:
      named = _only(sizes, stack.axes | self._hidden)
      listed = any(isinstance(size, tuple) and depth_of(axis) == stack.depth for axis, size in named)
      for position in range(kept_count(sizes.get(stack.depth, stack.length))):
        led = stack.lead is not None and position == 0
        own = _only(sizes, stack.lead | self._hidden) if led else named
        if listed or led:
          own = tuple((axis, size[position] if isinstance(size, tuple) and depth_of(axis) == stack.depth
                       else size) for axis, size in own if axis != stack.depth)
        else:
          own = tuple((axis, size) for axis, size in own if axis != stack.depth)
        keys.append((stack.path, led, own))
    return keys

  def _look(self, subnet: Subnet, keys: list[tuple]) -> None:
    """Traces a member for those of its pieces that are not known yet."""
    places: dict[tuple[Path, int | None], tuple] = {}
    counts = collections.Counter()
    for key in keys:
      path, led, _ = key
      places[path, counts[path]] = key
      if not led:
        # A scanned stack is asked once for all that it has.
        places.setdefault((path, None), key)
      counts[path] += 1

    def make(place, *layer):
      key = places[place]
      if key not in self._found:
        self._found[key] = _layer_piece(_name(key), *layer)
      return self._found[key]

    if any(key not in self._found for key in keys[1:]):
      self._trace(subnet, AROUND, make)
    if keys[0] not in self._found:
      # Of whichever member it is asked for, it is the same program.
      self._found[keys[0]] = self._trace(
        self._shallow(subnet), _name(keys[0]), lambda _, *layer: _layer_piece("", *layer))

  def _shallow(self, subnet: Subnet) -> Subnet:
    """A member with the same sizes around its layers, and one layer in each stack."""
    depths = {stack.depth for stack in self._stacks}
    first = lambda axis, size: 1 if axis in depths else (
      size[0] if isinstance(size, tuple) and depth_of(axis) in depths else size)
    return Subnet(**{axis: first(axis, size) for axis, size in subnet.chosen.items()})

  def _trace(self, subnet: Subnet, name: str, make: Callable[..., Piece]) -> Piece:
    """What stands around the layers of a member; `make(place, layer, x, ...)` gives each layer's piece."""
    module, inputs = self.supernet.module(subnet), tuple(resized(x, subnet) for x in self.inputs)

    def stand_in(layer, x, *rest):
      return _stand_in(make(_place(tuple(layer.path)), layer, x, *rest), x)

    def run(variables, *inputs, **options):
      with applied(stand_in):
        return module.apply(variables, *inputs, **options)

    with applied(stand_in):
      outputs, variables = _made(module, *inputs)
    return Piece(name, run, variables, inputs, outputs)


def shared(supernet: Supernet, inputs: tuple[jax.ShapeDtypeStruct, ...] | None = None) -> Pieces:
  """The pieces of a family; what has been traced once serves all who count, and all families of its model."""
  inputs = inputs or supernet.inputs
  found = _shared(supernet.model, supernet.space.largest, inputs)
  if not found:
    found.append(Pieces(supernet, inputs))
  return found[0]


@functools.lru_cache(maxsize=32)
def _shared(model: nn.Module, largest: Subnet, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> list[Pieces]:
  """Where those of so large a network are kept."""
  del model, largest, inputs
  return []


def _layer_piece(name: str, layer: nn.Module, x: Any, constants: Any, remat: bool, kwargs: Mapping[str, Any]
                 ) -> Piece:
  arrays = {key: value for key, value in kwargs.items() if isinstance(value, jax.Array)}
  fixed = {key: value for key, value in kwargs.items() if key not in arrays}
  module = layer.clone(parent=None, name=None)

  def run(variables, x, constants, arrays, **options):
    def apply(variables, x, constants, arrays):
      return module.apply(variables, x, constants, **arrays, **fixed, **options)

    return (jax.checkpoint(apply) if remat else apply)(variables, x, constants, arrays)

  inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, dict(constants), arrays))
  outputs, variables = _made(_Fixed(module, fixed), *inputs)
  return Piece(name, run, variables, inputs, outputs)


class _Fixed:
  """A layer with the keyword arguments that are no arrays."""

  def __init__(self, module: nn.Module, fixed: Mapping[str, Any]):
    self.module, self.fixed = module, fixed

  def init_with_output(self, key, x, constants, arrays):
    return self.module.init_with_output(key, x, constants, **arrays, **self.fixed)


def _made(module: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
  """Shapes of a module's outputs and variables."""
  outputs, variables = jax.eval_shape(
    lambda *inputs: module.init_with_output(jax.random.key(0), *inputs), *inputs)
  return outputs, {"params": {}} | meta.unbox(dict(variables))


def _stand_in(piece: Piece, x: Any) -> Any:
  """An output of the right shape, that depends on what the layer reads and costs next to nothing."""
  total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x))
  return jax.tree.map(lambda s: jnp.broadcast_to(total, s.shape).astype(s.dtype), piece.outputs)


def _name(key: tuple) -> str:
  path, led, sizes = key
  place = "/".join(path) + " first" * led
  return f"{place} {','.join(f'{axis}={size}' for axis, size in sizes)}".strip()


def _place(path: Path) -> tuple[Path, int | None]:
  """The stack of a layer and its position; None for all of a scanned one."""
  position = None
  if match := _LISTED.fullmatch(path[-1]):
    path, position = path[:-1], int(match[2])
  if path[-1] == REST:
    return path[:-1], None if position is None else position + 1
  return path, position


def _stack(path: Path, axes: Any, shapes: Any) -> _Stack:
  for key in path:
    axes, shapes = axes[key], shapes[key]
  own = sorted((key for key in axes if _LISTED.fullmatch(key)), key=lambda k: int(k.rpartition("_")[2]))
  behind = {key: tree for key, tree in axes.items() if key not in own}
  if not own:
    depth = Axes.of(jax.tree.leaves(axes, is_leaf=is_axes)[0]).names[0]
    return _Stack(path, depth, jax.tree.leaves(shapes)[0].shape[0], None, frozenset(axes_in(axes)))
  rest = jax.tree.leaves(shapes[REST])[0].shape[0] if REST in axes else 0
  return _Stack(path, _LISTED.fullmatch(own[0])[1], len(own) + rest, frozenset(axes_in(axes[own[0]])),
                frozenset(axes_in(behind or axes)))


def _outside(axes: Any, paths: Iterable[Path], path: Path = ()) -> set[str]:
  """Axes of the parameters that are in no stack."""
  if path in paths:
    return set()
  if is_axes(axes) or not isinstance(axes, Mapping):
    names = Axes.of(axes)
    return {name for name in (*flat(names.names), *getattr(names.rule, "axes", ())) if not name.isdigit()}
  own = {match[1] for key in axes if (match := _LISTED.fullmatch(key))}
  return own.union(*(_outside(child, paths, (*path, key)) for key, child in axes.items()))


def _only(sizes: Mapping[str, Any], axes: frozenset[str]) -> tuple[tuple[str, Any], ...]:
  return tuple((axis, size) for axis, size in sizes.items() if axis in axes)
