"""Where the layers of a network are in the tree of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from nestnet.axes import REST, Axes, flat, is_axes
from nestnet.subnet import Subnet, is_depth, kept_ids

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Place:
  """Layers that stand together in the tree, or a module that is none of them.

  Attributes:
    depth: The axis over the layers; None for what is no layer.
    first: Which of them comes first here.
    count: How many they are.
    leads: Whether it stands alone, differs from any layers behind it, and is never absent.
  """

  depth: str | None
  first: int
  count: int
  leads: bool

  def kept(self, subnet: Subnet) -> list[tuple[int, int]]:
    """Of the layers here that a sub-network has: which it is, and which of all that are kept."""
    ids = kept_ids(subnet.chosen.get(self.depth, self.first + self.count))
    return [(i - self.first, at) for at, i in enumerate(ids) if 0 <= i - self.first < self.count]


def stacks(axes: Any, shapes: Any) -> dict[Path, Place]:
  """Where layers that are called by `stack` are in a tree.

  Args:
    axes: Axis names of the parameters.
    shapes: The parameters, abstract.
  """
  leads = dict(_leads(axes, ()))
  places = {path: Place(depth, 0, 1, True) for path, depth in leads.items()}
  for path, depth in _stacks(axes, ()):
    led = path[-1] == REST and any(lead[:-1] == path[:-1] for lead in leads)
    count = jax.tree.leaves(at(shapes, path))[0].shape[0]
    places[path] = Place(depth, int(led), count, False)
  return places


def _stacks(axes: Any, path: Path):
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


def _leads(axes: Any, path: Path):
  """`(path, depth axis)` of each layer that stands alone, before the others or without any."""
  if is_axes(axes) or not isinstance(axes, Mapping):
    return
  own = [key for key in axes if key != REST]
  depth = own[0].removesuffix("_0") if len(own) == 1 and own[0].endswith("_0") else ""
  if is_depth(depth):
    yield (*path, own[0]), depth
    return
  for key, child in axes.items():
    yield from _leads(child, (*path, key))


def owners(axes: Any, places: Mapping[Path, Place]) -> dict[str, set[Place | None]]:
  """For each name, the places that it occurs in, and None where it occurs in none."""
  found: dict[str, set[Place | None]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes):
    keys, leaf = tuple(entry.key for entry in path), Axes.of(leaf)
    place = next((p for where, p in places.items() if keys[:len(where)] == where), None)
    for name in (*flat(leaf.names), *getattr(leaf.rule, "axes", ())):
      found.setdefault(name, set()).add(place)
  return found


def at(tree: Any, path: Path) -> Any:
  """The node at a path; None where there is none."""
  for key in path:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def put(tree: Any, path: Path, node: Any) -> Any:
  """The tree with another node at a path."""
  return {**tree, path[0]: put(tree[path[0]], path[1:], node)} if path else node


def nested(entries: Iterable[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
  """Trees at their paths, as one tree."""
  collection: dict[str, Any] = {}
  for path, tree in entries:
    node = collection
    for key in path:
      node = node.setdefault(key, {})
    node.update(tree)
  return collection
