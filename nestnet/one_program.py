"""Any member of a space as data: one compiled program serves them all, each at its own cost.

Axes that only occur inside stacks of layers (heads, the MLP's width), and depth itself, are chosen
layer by layer (`nestnet.models.switch`). All other axes (the residual width) are static in the
branches of one outer switch, each of which holds its own derivative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import Axes, flat, is_axes
from nestnet.errors import UserError
from nestnet.execution import Runnable, Supernet
from nestnet.models.switch import Layers
from nestnet.slicing import take
from nestnet.subnet import OneOf, Subnet, depth_of, is_depth, kept_count, kept_ids


class OneProgram:
  """The members of a supernet's space as vectors, and what runs them.

  Args:
    supernet: The family.

  Raises:
    ValueError: The model stacks no layers, or an axis cannot be told apart by data.
  """

  def __init__(self, supernet: Supernet):
    self.supernet = supernet
    space = supernet.space
    # Where each stack is in the tree, and the axis over its layers.
    self.stacks = stacks(supernet.axes["params"])
    if not self.stacks:
      raise UserError(f"{type(supernet.model).__name__} has no stack of layers, so its sub-networks "
                      "cannot be data; allowed: train.execution=slice")
    depths = set(self.stacks.values())
    outside = _outside(supernet.axes["params"])
    self.inner = tuple(a for a in space.axes if not is_depth(a) and a not in outside
                       and depth_of(a) in depths)
    self.outer = tuple(a for a in space.axes if a not in self.inner and a not in depths)
    self.widths = space.combinations(self.outer)
    self.lengths = {path: _length(supernet.shapes["params"], path) for path in self.stacks}

  def vector(self, subnet: Subnet) -> np.ndarray:
    """A member as int32 `[entries]`: its outer sizes, then for each layer what it is."""
    subnet = self.supernet.space.subnet(subnet)
    width = {axis: subnet.chosen[axis] for axis in self.outer}
    numbers = [[self.widths.index(width)]]
    for path, depth in self.stacks.items():
      length = self.lengths[path]
      ids = kept_ids(subnet.chosen.get(depth, length))
      present = np.zeros(length, np.int32)
      present[list(ids)] = 1
      numbers.append(present)
      for axis in self.listed(depth):
        choices, position = self.choices(axis, width), np.zeros(length, np.int32)
        sizes = subnet.chosen[axis]
        sizes = sizes if isinstance(sizes, tuple) else (sizes,) * len(ids)
        position[list(ids)] = [choices.index(size) for size in sizes]
        numbers.append(position)
    return np.concatenate(numbers).astype(np.int32)

  def kept(self, subnet: Subnet, depth: str) -> int:
    """How many layers of a stack a member has."""
    lengths = {d: self.lengths[path] for path, d in self.stacks.items()}
    return kept_count(subnet.chosen.get(depth, lengths[depth]))

  def switch(self, run: Callable[..., Any], vector: jax.Array, *operands: Any) -> Any:
    """`run(runnable, *operands)` in the branch of the vector's outer sizes.

    What runs cuts only the outer sizes from the supernet. All branches must return the same shapes.
    """
    choice = self._collection(vector[1:])

    def branch(width):
      subnet, module = Subnet(**width), self._module(width)
      cut = functools.partial(self._cut, subnet=subnet)
      return lambda choice, *operands: run(Runnable(subnet, cut, module, choice), *operands)

    branches = [branch(width) for width in self.widths]
    if len(branches) == 1:
      return branches[0](choice, *operands)
    return jax.lax.switch(vector[0], branches, choice, *operands)

  def sizes(self, vector: jax.Array) -> dict[str, Any]:
    """What `vector` keeps: a size of each axis, `[layers]` sizes of an inner one, and for a depth
    axis 1 or 0 for each layer."""
    entries = {}
    for path, tree in self._entries(vector[1:]):
      depth = self.stacks[path]
      entries[depth] = tree[depth]
      for axis in self.listed(depth):
        table = np.zeros((len(self.widths), max(len(self.choices(axis, w)) for w in self.widths)), np.int32)
        for row, width in zip(table, self.widths):
          choices = self.choices(axis, width)
          row[:len(choices)] = choices
        entries[axis] = jnp.asarray(table)[vector[0], tree[axis]]
    for axis in self.outer:
      entries[axis] = jnp.asarray([width[axis] for width in self.widths])[vector[0]]
    return entries

  def _cut(self, variables, subnet):
    # A rule of a stacked leaf runs once, inside its layer, where all of its sizes are known.
    axes = jax.tree.map(lambda a: dataclasses.replace(a, rule=None) if a.stack else a,
                        self.supernet.axes, is_leaf=is_axes)
    return {name: take(tree, axes[name], subnet, self.supernet.space.groups, strict=False)
            for name, tree in variables.items()}

  def listed(self, depth: str) -> list[str]:
    """The axes that have a size in each layer of a stack."""
    return [axis for axis in self.inner if depth_of(axis) == depth]

  def choices(self, axis: str, width: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes that an inner axis may have beside outer ones, in rising order."""
    return _choices(self.supernet.space, axis, tuple(width.items()))

  def _module(self, width):
    space, model = self.supernet.space, self.supernet.model
    inner: dict[str, Any] = {axis: OneOf(axis, self.choices(axis, width)) for axis in self.inner}
    depths = {depth: Layers(self.lengths[path], Subnet(**width), space.groups)
              for path, depth in self.stacks.items()}
    return model.clone(**width, **inner, **depths)

  def _entries(self, numbers):
    start = 0
    for path, depth in self.stacks.items():
      tree = {}
      for axis in (depth, *self.listed(depth)):
        tree[axis] = numbers[start:start + self.lengths[path]]
        start += self.lengths[path]
      yield path, tree

  def _collection(self, numbers) -> dict[str, Any]:
    collection: dict[str, Any] = {}
    for path, tree in self._entries(numbers):
      node = collection
      for key in path:
        node = node.setdefault(key, {})
      node.update(tree)
    return collection


@functools.lru_cache(maxsize=None)
def _choices(space, axis, width):
  sizes = {s for size in space.choices(axis, dict(width))
           for s in (size if isinstance(size, tuple) else (size,))}
  return tuple(sorted(sizes))


def stacks(axes: Any) -> dict[tuple[str, ...], str]:
  """Where stacks of layers are in a tree of axis names, and the axis over their layers."""
  return dict(_stacks(axes, ()))


def _stacks(axes: Any, path: tuple[str, ...]):
  """`(path, depth axis)` of each node whose leaves are stacked over layers."""
  if is_axes(axes) or not isinstance(axes, Mapping):
    return
  leaves = [Axes.of(leaf) for leaf in jax.tree.leaves(axes, is_leaf=is_axes)]
  stacked = {leaf.names[0] if leaf.stack else None for leaf in leaves}
  if path and len(stacked) == 1 and None not in stacked and leaves[0].stack == path[-1]:
    yield path, stacked.pop()
    return
  for key, child in axes.items():
    yield from _stacks(child, (*path, key))


def _outside(axes: Any) -> set[str]:
  """Axes of arrays that are not stacked over layers."""
  leaves = [Axes.of(leaf) for leaf in jax.tree.leaves(axes, is_leaf=is_axes)]
  return {name for leaf in leaves if not leaf.stack for name in flat(leaf.names)}


def _length(shapes: Any, path: tuple[str, ...]) -> int:
  for key in path:
    shapes = shapes[key]
  return jax.tree.leaves(shapes)[0].shape[0]
