"""Which units matter, and the order that says so: scores from weights or activations.

Axes inside a stack have an order in each layer; others, such as the residual stream, one for all that read
and write them; those that another axis encloses one in each of its units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import flat
from nestnet.errors import UserError, one_of
from nestnet.permuting import Order, enclosing, named_leaves
from nestnet.subnet import depth_of, is_depth

# Below it kernels weigh units that others carry on: they tell of a unit only where nothing else reads it.
GATE = "squeeze"


def orders(model: nn.Module, axes: Any, weights: Any, wanted: Iterable[str], by: str = "l1",
           trained: Mapping[str, Any] | None = None, seen: Any = None,
           groups: Mapping[str, int] | None = None) -> dict[str, Order]:
  """The orders of axes, most important units first, dealt round-robin into the groups of the space.

  Units of an axis that another one encloses have an order in each unit of that (`permute`).

  Args:
    model: The network. `tied_axes` of it names axes whose units are the same, a tuple for each
      space, the longest first; shorter ones are leading parts of it. `together` of it says how many
      units side by side move as one, as those do that GroupNorm normalises as one. `placed` of it tells
      why units of some axes stay where they are.
    axes: Axis names of `weights`.
    weights: What kernels are read from.
    wanted: Which axes, with those tied to them.
    by: As in `Sort`.
    trained: As from `sizes_trained`: sizes between which units stay.
    seen: As recorded for `"activation"`.
    groups: As in `Space.groups`.

  Raises:
    ValueError: An unknown axis, one that no kernel reads, or one whose units have no other order.
  """
  full, inside, read = lengths_of(axes, weights), _inside(axes), set()
  for _, names, _ in named_leaves(axes):
    read |= names.contracted
  spaces = {axis: space for space in getattr(model, "tied_axes", ()) for axis in space}
  together, placed = getattr(model, "together", 1), getattr(model, "placed", {})
  found: dict[str, Order] = {}
  for axis in wanted:
    if axis not in full:
      raise one_of("axis to sort", axis, [a for a in full if a not in placed])
    if axis in placed:
      raise UserError(f"units of {axis} cannot be sorted: {placed[axis]}; allowed are axes whose units stand "
                      "for themselves")
    space = spaces.get(axis, (axis,))
    if space[0] in found:
      continue
    lengths = full[space[0]]
    edges = [{size for tied in space for size in sizes_at((trained or {}).get(tied, ()), layer)} | {
      length for tied in space[1:] for length in full[tied]} for layer in range(len(lengths))]
    parts = [scores(axes, weights, tied, by, len(lengths), seen)
             for tied in space if tied in read or tied == axis]
    padded = lambda s, n: jnp.pad(s, [*[(0, 0)] * (s.ndim - 1), (0, n - s.shape[-1])])
    score = [sum(padded(s, n) for s in layer) for n, layer in zip(lengths, zip(*parts))]
    made = _each_ranked(score, edges, groups=(groups or {}).get(axis, 1), together=together)
    for tied in space:
      cut = [order[..., :n] for order, n in zip(made, full[tied])]
      found[tied] = tuple(cut) if tied in inside else cut[0]
  return found


def scores(axes: Any, weights: Any, axis: str, by: str = "l1", layers: int = 1, seen: Any = None
           ) -> list[jax.Array]:
  """How important the units of an axis are, summed over the kernels that contract it.

  Args:
    axes: Axis names of `weights`.
    weights: The parameters.
    axis: Which axis.
    by: `"l1"`, `"l2"` (sums of squares) or `"activation"`.
    layers: Of the stack that the axis is inside; 1 where it is not.
    seen: For `"activation"`, what `nestnet.activations.activations` gives.

  Returns:
    `[units]` for each layer; `[units of the axis that encloses it, units]` where one does.

  Raises:
    ValueError: No kernel reads the axis.

  Example:
    >>> kernel = jnp.array([[1.0, -2.0], [0.5, 0.0]])
    >>> scores({"down": "mlp -> embed"}, {"down": kernel}, "mlp")[0].tolist()
    [3.0, 0.5]
  """
  leaves = list(zip(named_leaves(axes), jax.tree.leaves(weights), strict=True))
  readers = [(path, names, first, leaf) for (path, names, first), leaf in leaves if axis in names.contracted
             and (by != "activation" or path[0] in seen)]
  readers = [r for r in readers if GATE not in r[0]] or readers
  if not readers:
    raise UserError(f"no kernel reads {axis}, so its units have no order; allowed are axes that some "
                    "kernel contracts")
  totals: list[Any] = [0.0] * layers
  depth, inside, around = depth_of(axis), axis in _inside(axes), enclosing(axes).get(axis)
  for path, names, first, leaf in readers:
    stacked = inside and depth in names.names
    if by == "activation":
      value = functools.reduce(lambda node, key: node[key], path[:-1], seen)[axis]
      kept = range(value.ndim - 1 - stacked - bool(around), value.ndim)
    else:
      value = jnp.abs(leaf.astype(jnp.float32)) if by == "l1" else jnp.square(leaf.astype(jnp.float32))
      kept = [names.names.index(a) for a in (depth if stacked else None, around, axis) if a]
    value = value.sum(tuple(d for d in range(value.ndim) if d not in kept))
    for i, own in enumerate(value if stacked else [value]):
      totals[first.get(depth, 0) + i if inside else 0] += own
  return totals


def ranked(score: jax.Array, sizes: Iterable[int] = (), groups: int = 1, together: int = 1) -> jax.Array:
  """Where each unit comes from, so that leading parts hold those of the highest score.

  Args:
    score: `[units]`; equal ones keep their order.
    sizes: Units do not move across these.
    groups: Equal groups, each with a leading part: the best units are dealt to them in turn.
    together: Units side by side that move as one, by the sum of their scores.

  Example:
    >>> ranked(jnp.array([1.0, 4.0, 3.0, 2.0])).tolist()
    [1, 2, 3, 0]
    >>> ranked(jnp.array([1.0, 4.0, 3.0, 2.0]), sizes=(1,)).tolist()
    [0, 1, 2, 3]
    >>> ranked(jnp.array([1.0, 4.0, 3.0, 2.0]), groups=2).tolist()
    [1, 3, 2, 0]
    >>> ranked(jnp.array([1.0, 4.0, 3.0, 3.0]), together=2).tolist()
    [2, 3, 0, 1]
  """
  if together > 1:
    blocks = ranked(score.reshape(-1, together).sum(1), [size // together for size in sizes], groups)
    return (blocks[:, None] * together + jnp.arange(together)[None]).reshape(-1)
  units = len(score)
  each = units // groups
  place, group = np.arange(units) % each, np.arange(units) // each
  edges = sorted(size // groups for size in sizes if size < units)
  part = np.searchsorted(edges, place, side="right")
  slots = np.lexsort((group, place))
  best = jnp.lexsort((-score[slots], jnp.asarray(part[slots])))
  return jnp.zeros(units, jnp.int32).at[slots].set(jnp.asarray(slots, jnp.int32)[best])


def _each_ranked(score: list[jax.Array], sizes: list[set[int]], **options: int) -> list[jax.Array]:
  """`ranked` along the last dimension of each layer's scores."""
  def rows(score, sizes):
    rank = functools.partial(ranked, sizes=sizes, **options)
    return jax.vmap(rank)(score.reshape(-1, score.shape[-1])).reshape(score.shape)

  if all(s.shape == score[0].shape for s in score) and all(own == sizes[0] for own in sizes):
    # One sort for all layers: each takes long to compile.
    return [*rows(jnp.stack(score), sizes[0])]
  return [rows(*own) for own in zip(score, sizes)]


def sizes_at(sizes: Any, layer: int) -> set[int]:
  """The sizes that an axis has in a layer, of those from `nestnet.importance.sizes_trained`."""
  return set().union(sizes.get(None, ()), sizes.get(layer, ())) if sizes else set()


def _inside(axes: Any) -> set[str]:
  """Axes that are inside the layers of their stack alone, so that each layer has units of its own."""
  inside, outside = set(), set()
  for _, names, first in named_leaves(axes):
    for axis in flat(names.names):
      depth = depth_of(axis)
      (inside if depth in names.names or depth in first else outside).add(axis)
  return {axis for axis in inside - outside if not is_depth(axis)}


def lengths_of(axes: Any, weights: Any) -> dict[str, list[int]]:
  """How many units axes have: one number, or one for each layer."""
  found: dict[str, dict[int, int]] = {}
  inside = _inside(axes)
  for (path, names, first), leaf in zip(named_leaves(axes), jax.tree.leaves(weights), strict=True):
    for dimension, axis in enumerate(names.names):
      if not isinstance(axis, str) or axis.isdigit() or is_depth(axis):
        continue
      depth = depth_of(axis)
      count = leaf.shape[names.names.index(depth)] if axis in inside and depth in names.names else 1
      start = first.get(depth, 0) if axis in inside else 0
      for layer in range(start, start + count):
        length = found.setdefault(axis, {}).setdefault(layer, leaf.shape[dimension])
        if length != leaf.shape[dimension]:
          found[axis][layer] = max(length, leaf.shape[dimension])
  return {axis: [lengths[i] for i in range(len(lengths))] for axis, lengths in found.items()}
