"""Members that are cut layer by layer: any of them as data to one program, each at its own cost.

Axes that only occur inside stacks of layers (heads, the MLP's width), and depth itself, are chosen
layer by layer (`nestnet.models.switch`). All other axes (the residual width) are static in the
branches of one outer switch, each of which holds its own derivative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import Axes, flat, is_axes
from nestnet.errors import UserError
from nestnet.execution import Runnable, Supernet
from nestnet.models.switch import CHOICE, Layers
from nestnet.sharding import gatherer
from nestnet.slicing import take
from nestnet.subnet import OneOf, Subnet, depth_of, is_depth, kept_count, kept_ids


class OneProgram:
  """The members of a supernet's space as vectors, and what runs them.

  Args:
    supernet: The family.
    mesh: Where its parameters lie; None where each device has them whole.
  """

  def __init__(self, supernet: Supernet, mesh: jax.sharding.Mesh | None = None):
    self.supernet, self.mesh = supernet, mesh
    self._whole = mesh is None or mesh.shape["fsdp"] == 1
    space = supernet.space
    # Where each stack is in the tree, and the axis over its layers.
    self.stacks = stacks(supernet.axes["params"])
    depths = set(self.stacks.values())
    outside = _outside(supernet.axes["params"])
    self.inner = tuple(a for a in space.axes if not is_depth(a) and a not in outside
                       and depth_of(a) in depths)
    self.outer = tuple(a for a in space.axes if a not in self.inner and a not in depths)
    self.widths = space.combinations(self.outer)
    self.lengths = {path: _length(supernet.shapes["params"], path) for path in self.stacks}

  def check(self) -> None:
    """Raises `ValueError` where the model does not leave its layers' sizes to the stack."""
    vector, supernet = self.vector(self.supernet.space.smallest), self.supernet
    one = self._branch(self.widths[vector[0]], _nested(self._entries(vector[1:])))
    apply = lambda variables, *inputs: one.module.apply({**one.cut(variables), CHOICE: one.choice}, *inputs)
    try:
      jax.eval_shape(apply, supernet.shapes, *supernet.inputs)
    except TypeError as error:
      raise UserError(
        f"{type(supernet.model).__name__} cannot run as one program: {error}. Its layers' sizes must "
        "reach their modules through stack(sizes=...); allowed as it is: train.execution=slice") from error

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
    choice = _nested(self._entries(vector[1:]))

    def branch(width):
      return lambda choice, *operands: run(self._branch(width, choice), *operands)

    branches = [branch(width) for width in self.widths]
    if len(branches) == 1:
      return branches[0](choice, *operands)
    return jax.lax.switch(vector[0], branches, choice, *operands)

  def _branch(self, width, choice) -> Runnable:
    """The members of some outer sizes."""
    inner = {axis: OneOf(axis, self.choices(axis, width)) for axis in self.inner}
    module = self._module(width, inner, {d: self.lengths[path] for path, d in self.stacks.items()})
    subnet = Subnet(**width)
    return Runnable(subnet, functools.partial(self._cut, subnet=subnet), module, choice)

  def only(self, subnet: Subnet) -> Runnable:
    """One member as a program of its own, its layers cut one by one."""
    subnet = self.supernet.space.subnet(subnet)
    width = {axis: subnet.chosen[axis] for axis in self.outer}
    depths = {depth: subnet.chosen[depth] for depth in self.stacks.values() if depth in subnet}
    inner, numbers = {}, []
    for path, depth in self.stacks.items():
      count, positions = self.kept(subnet, depth), {}
      for axis in self.listed(depth):
        sizes = subnet.chosen[axis]
        if isinstance(sizes, tuple):
          inner[axis] = OneOf(axis, tuple(sorted(set(sizes))))
          positions[axis] = jnp.asarray([inner[axis].sizes.index(size) for size in sizes])
        else:
          inner[axis] = OneOf(axis, (sizes,))
          positions[axis] = jnp.zeros(count, jnp.int32)
      numbers.append((path, positions))
    cut = functools.partial(self._cut, subnet=Subnet(**width, **depths))
    module = self._module(width, inner, {depth: self.kept(subnet, depth) for depth in self.stacks.values()})
    return Runnable(subnet, cut, module, _nested(numbers))

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
    def outside(names):
      if not names.stack:
        return names
      # Its layers cut themselves. What they cut alike costs less here, but where a leaf lies in shares.
      inside = names.names if self._whole else (names.names[0], *("1" for _ in names.names[1:]))
      # A rule runs once, inside the layer, where all sizes are known.
      return dataclasses.replace(names, names=inside, rule=None)

    axes = jax.tree.map(outside, self.supernet.axes, is_leaf=is_axes)
    return {name: take(tree, axes[name], subnet, self.supernet.space.groups, strict=False)
            for name, tree in variables.items()}

  def listed(self, depth: str) -> list[str]:
    """The axes that have a size in each layer of a stack."""
    return [axis for axis in self.inner if depth_of(axis) == depth]

  def choices(self, axis: str, width: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes that an inner axis may have beside outer ones, in rising order."""
    return _sizes(self.supernet.space, axis, tuple(width.items()))

  def _module(self, width, inner, counts):
    layers = {depth: Layers(counts[depth], Subnet(**width), self.supernet.space.groups, self._gather(path))
              for path, depth in self.stacks.items()}
    return self.supernet.model.clone(**width, **inner, **layers)

  def _gather(self, path):
    """Makes the parameters of a layer whole."""
    if self._whole:
      return lambda params: params
    axes, shapes = self.supernet.axes["params"], self.supernet.shapes["params"]
    for key in path:
      axes, shapes = axes[key], shapes[key]
    axes = jax.tree.map(lambda a: a.without(self.stacks[path]), axes, is_leaf=is_axes)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return gatherer({"params": axes}, {"params": shapes}, self.mesh)

  def _entries(self, numbers):
    start = 0
    for path, depth in self.stacks.items():
      tree = {}
      for axis in (depth, *self.listed(depth)):
        tree[axis] = numbers[start:start + self.lengths[path]]
        start += self.lengths[path]
      yield path, tree


@functools.lru_cache(maxsize=None)
def _sizes(space, axis, width):
  return space.sizes(axis, dict(width))


def _nested(entries: Iterable[tuple[tuple[str, ...], dict[str, Any]]]) -> dict[str, Any]:
  """Trees at their paths, as one tree."""
  collection: dict[str, Any] = {}
  for path, tree in entries:
    node = collection
    for key in path:
      node = node.setdefault(key, {})
    node.update(tree)
  return collection


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
