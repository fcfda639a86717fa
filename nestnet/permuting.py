"""Units of an axis in another order, wherever the axis is: `permute`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from nestnet.axes import REST, Axes, is_axes
from nestnet.errors import UserError, one_of
from nestnet.slicing import axes_in, unrolled_over
from nestnet.subnet import depth_of

# Where each unit comes from: one order for all layers, or one for each layer; of units that are another
# axis's own (`enclosing`), one for each unit of that.
Order = Any | Sequence[Any]


def permute(tree: Any, axes: Any, orders: Mapping[str, Order]) -> Any:
  """`tree` with the units of some axes in another order, wherever the axes are.

  Args:
    tree: Parameters, or anything of their shapes: averages, moments.
    axes: Its axis names.
    orders: For each axis where its units come from: an array `[size]`, unit i being the old unit
      `order[i]`; or a tuple of such arrays, one for each layer of the stack that the axis is inside.
      Where another axis encloses it, the arrays may be `[units of that, size]`, an order for each of its
      units, which is meant whatever order of its own it has.

  Raises:
    ValueError: An axis that no leaf has, an order of another length than the axis, or a product axis.

  Example:
    >>> params = {"up": np.array([[1, 2, 3]]), "down": np.array([[10], [20], [30]])}
    >>> axes = {"up": "embed -> mlp", "down": "mlp -> embed"}
    >>> permute(params, axes, {"mlp": np.array([2, 0, 1])})["up"].tolist()
    [[3, 1, 2]]
  """
  known = axes_in(axes)
  for axis in orders:
    if axis not in known:
      raise one_of("axis", axis, sorted(known))
  moves = permutation(axes, orders)
  return jax.tree.map(lambda move, leaf: jax.tree.map(move, leaf), moves, meta.unbox(tree))


def permutation(axes: Any, orders: Mapping[str, Order]) -> Any:
  """What `permute` does to each leaf: a tree of functions of an array."""
  outer = enclosing(axes)
  return jax.tree.unflatten(jax.tree.structure(axes, is_leaf=is_axes), [
    _mover(path, names, first, orders, outer) for path, names, first in named_leaves(axes)])


def enclosing(axes: Any) -> dict[str, str]:
  """Axes whose units belong each to a unit of another axis, and that other axis.

  It is the one that stands before the axis, on the same side of the arrow, in every leaf that has it. The
  heads of a group that share keys and values are such units: the first heads of two groups have nothing in
  common.

  Example:
    >>> enclosing({"q": "embed -> kv_heads queries", "out": "kv_heads queries -> embed", "bias": "-> embed"})
    {'queries': 'kv_heads'}
  """
  before: dict[str, set[str | None]] = {}
  for _, names, _ in named_leaves(axes):
    last: dict[str, str | None] = {}
    for name in names.names:
      if not isinstance(name, str):
        last = {}
      elif not name.isdigit() and (role := names.role(name)) != "stack":
        before.setdefault(name, set()).add(last.get(role))
        last[role] = name
  return {name: found.pop() for name, found in before.items() if len(found) == 1 and None not in found}


def named_leaves(axes: Any) -> Iterator[tuple[tuple[str, ...], Axes, dict[str, int]]]:
  """`(path, names, layers)` of each leaf of a tree of names, in the order of `jax.tree.leaves`.

  `layers` tells, of each depth axis whose layers stand apart (`layers_0`, ..., `rest`), which layer the
  leaf belongs to, or the first of those that it stacks.
  """
  for path, names in jax.tree.leaves_with_path(axes, is_leaf=is_axes):
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    layers: dict[str, int] = {}
    node = axes
    for key in keys:
      if not isinstance(node, Mapping):
        break
      if depth := unrolled_over(node):
        own = len(node) - 1 if key == REST else int(key.rpartition("_")[2])
        layers[depth] = layers.get(depth, 0) + own
      node = node[key]
    yield keys, Axes.of(names), layers


def _mover(path, names: Axes, layers, orders, outer) -> Callable[[Any], Any]:
  def move(array):
    if isinstance(array, jax.ShapeDtypeStruct):
      return array
    # What encloses an axis stands before it, and moves after it.
    for dimension, name in reversed([*enumerate(names.names)]):
      if name in orders:
        array = _reorder(array, dimension, names, orders[name], layers, path, outer)
      elif not isinstance(name, str) and any(factor in orders for factor, _ in name):
        raise UserError(f"{'/'.join(path)}: {str(names)!r} has a product axis, whose units cannot be "
                        "reordered")
    return array

  return move


def _reorder(array, dimension, names, order, layers, path, outer):
  name = names.names[dimension]
  depth = depth_of(name)
  per_layer = isinstance(order, (tuple, list))
  along = names.names.index(depth) if per_layer and depth in names.names else None
  first = layers.get(depth, 0)
  used = order[first:first + (1 if along is None else array.shape[along])] if per_layer else [order]
  around = [names.names.index(outer[name])] if name in outer and any(np.ndim(o) == 2 for o in used) else []
  shape = tuple(array.shape[d] for d in (*around, dimension))
  if len(used) != (1 if along is None else array.shape[along]) or any(np.shape(o) != shape for o in used):
    raise UserError(f"{'/'.join(path)}: {name} has {' x '.join(map(str, shape))} units, got orders of "
                    f"{[' x '.join(map(str, np.shape(o))) for o in used]}".replace("'", ""))
  library = jnp if any(isinstance(x, jax.Array) for x in (array, *used)) else np
  if along is None and not around:
    return library.take(array, used[0], axis=dimension)
  dimensions = [along] * (along is not None) + around + [dimension]
  index = library.stack(used) if along is not None else used[0]
  index = library.transpose(index, np.argsort(dimensions))
  shape = [n if d in dimensions else 1 for d, n in enumerate(array.shape)]
  return library.take_along_axis(array, index.reshape(shape), axis=dimension)
