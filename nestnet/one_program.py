"""Members that are cut layer by layer: any of them as data to one program, each at its own cost.

Axes that only occur inside stacks of layers (heads, the MLP's width, the kernels of a stage), and depth
itself, are chosen layer by layer (`nestnet.models.switch`). All other axes (the residual width) are
static in the branches of one outer switch, each of which holds its own derivative. So is the resolution
of the images.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import REST, Axes, flat, is_axes, statistics_axes
from nestnet.errors import UserError
from nestnet.execution import Runnable, Supernet, module_of, resized, sizes_of
from nestnet.models.convolution import STATISTICS
from nestnet.models.switch import CHOICE, Layers, Site
from nestnet.sharding import gatherer
from nestnet.slicing import scatter, take, used
from nestnet.subnet import INPUTS, OneOf, Subnet, depth_of, is_depth, kept_count, kept_ids

# Each branch of the outer switch holds the whole network once more.
BRANCHES = 32


@dataclasses.dataclass(frozen=True)
class Place:
  """Layers that stand together in the tree.

  Attributes:
    depth: The axis over the layers.
    first: Which of them comes first here.
    count: How many they are.
    leads: Whether it is the one that differs from those behind it, and is never absent.
  """

  depth: str
  first: int
  count: int
  leads: bool

  def kept(self, subnet: Subnet) -> list[tuple[int, int]]:
    """Of the layers here that a sub-network has: which it is, and which of all that are kept."""
    ids = kept_ids(subnet.chosen.get(self.depth, self.first + self.count))
    return [(i - self.first, at) for at, i in enumerate(ids) if 0 <= i - self.first < self.count]


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
    self.places = _places(supernet.axes["params"], supernet.shapes["params"])
    self.depths = tuple(dict.fromkeys(place.depth for place in self.places.values()))
    self.lengths = {depth: max(p.first + p.count for p in self.places.values() if p.depth == depth)
                    for depth in self.depths}
    owners = _owners(supernet.axes["params"], self.places)
    self.inner = tuple(a for a in space.axes if self._is_inner(a, owners))
    self.outer = tuple(a for a in space.axes if a not in self.inner and a not in self.depths)
    self.widths = space.combinations(self.outer)

  def _is_inner(self, axis, owners):
    if axis in INPUTS or is_depth(axis) or depth_of(axis) not in self.depths:
      return False
    # Choices may round to the same lengths, and decide nothing.
    names = self._decided(axis)
    inside = all(owners.get(name, set()) <= {depth_of(axis)} for name in names)
    return inside if names else axis in self.supernet.space.per_layer

  def _decided(self, axis: str) -> set[str]:
    """The names of parameter axes whose lengths follow from an axis of the space."""
    model, space = self.supernet.model, self.supernet.space
    if not hasattr(model, "sizes"):
      return {axis}
    largest = space.largest.of_model.chosen
    sizes = [model.sizes(Subnet(**{**largest, axis: size})) for size in space.sizes(axis)]
    return {name for name in sizes[0] if len({s.chosen[name] for s in sizes}) > 1}

  @property
  def possible(self) -> bool:
    """Whether there are stacks of layers, and few enough choices beside those of their layers."""
    return bool(self.places) and len(self.widths) <= BRANCHES

  @property
  def worth(self) -> float:
    """About how many members' own programs take as long to compile: branches for each layer of theirs."""
    branches = (math.prod(len(self.choices(axis, width)) for axis in self.listed(place.depth))
                for width in self.widths for place in self.places.values())
    return sum(branches) / max(1, len(self.places))

  def check(self) -> None:
    """Raises `ValueError` where the model does not leave its layers' sizes to the stack, or the choices
    that are not made layer by layer are too many."""
    if not self.places:
      raise UserError(f"{type(self.supernet.model).__name__} has no stack of layers, so its sub-networks "
                      "cannot be data; allowed: train.execution=slice")
    if len(self.widths) > BRANCHES:
      raise UserError(f"one program holds a network for each combination of {', '.join(self.outer)}, here "
                      f"{len(self.widths)}, of at most {BRANCHES}; allowed: fewer of them, as where "
                      "space.couple ties widths, or train.execution=slice")
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
    for place in self.places.values():
      kept = place.kept(subnet)
      if place.leads and not kept:
        raise UserError(f"sub-network {subnet}: {place.depth} leaves out layer 0, which the others stand on")
      here, of_all = [i for i, _ in kept], [at for _, at in kept]
      present = np.zeros(place.count, np.int32)
      present[here] = 1
      numbers.append(present)
      for axis in self.listed(place.depth):
        choices, position = self.choices(axis, width), np.zeros(place.count, np.int32)
        sizes = subnet.chosen[axis]
        position[here] = [choices.index(sizes[at] if isinstance(sizes, tuple) else sizes) for at in of_all]
        numbers.append(position)
    return np.concatenate(numbers).astype(np.int32)

  def kept(self, subnet: Subnet, depth: str) -> int:
    """How many layers along a depth axis a member has."""
    return kept_count(subnet.chosen.get(depth, self.lengths[depth]))

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
    module = self._module(width, inner, self.lengths)
    subnet = Subnet(**width)
    return Runnable(subnet, functools.partial(self._cut, subnet=subnet), module, choice)

  def only(self, subnet: Subnet) -> Runnable:
    """One member as a program of its own, its layers cut one by one."""
    subnet = self.supernet.space.subnet(subnet)
    width = {axis: subnet.chosen[axis] for axis in self.outer}
    depths = {depth: subnet.chosen[depth] for depth in self.depths if depth in subnet}
    inner = {axis: OneOf(axis, tuple(sorted(set(np.atleast_1d(subnet.chosen[axis]).tolist()))))
             for axis in self.inner}
    numbers = []
    for path, place in self.places.items():
      of_all, positions = [at for _, at in place.kept(subnet)], {}
      for axis in self.listed(place.depth):
        sizes = subnet.chosen[axis]
        positions[axis] = jnp.asarray([inner[axis].sizes.index(
          sizes[at] if isinstance(sizes, tuple) else sizes) for at in of_all], jnp.int32)
      numbers.append((path, positions))
    cut = functools.partial(self._cut, subnet=Subnet(**width, **depths))
    module = self._module(width, inner, {depth: self.kept(subnet, depth) for depth in self.depths})
    return Runnable(subnet, cut, module, _nested(numbers))

  def moments(self, vector: jax.Array, variables: Any, images: jax.Array) -> Any:
    """The batch's moments in each normalisation of a member, as `batch_stats` of the largest's shapes.

    Zero for what the member lacks; `Supernet.cut` takes its own from them. Its vector is data, so that
    `jax.lax.map` goes over an array of members.

    Args:
      vector: The member.
      variables: Of the supernet.
      images: `[batch, rows, columns, channels]`.
    """
    params = {"params": variables["params"]}

    def of(module, own, images):
      return module.apply(own, images, mutable=[STATISTICS])[1][STATISTICS]

    full = jax.eval_shape(functools.partial(of, self.supernet.module(self.supernet.space.largest)),
                          self.supernet.cut(params, self.supernet.space.largest), images)
    names = statistics_axes(self.supernet.axes["params"], full)

    def run(runnable, params, images):
      found = of(runnable.module, {**runnable.cut(params), CHOICE: runnable.choice},
                 resized(images, runnable.subnet))
      return scatter(found, names, sizes_of(self.supernet.model, runnable.subnet), full,
                     self.supernet.space.groups)

    return self.switch(run, vector, params, images)

  def used(self, vector: jax.Array, params: Any) -> Any:
    """Which of the supernet's parameters a vector uses: a tree of booleans."""
    choice = dict(self._entries(vector[1:]))
    branches = [functools.partial(self._used, width) for width in self.widths]
    if len(branches) == 1:
      return branches[0](choice, params)
    return jax.lax.switch(vector[0], branches, choice, params)

  def _used(self, width, choice, params):
    subnet = Subnet(**width)
    marks = used(lambda p: self._cut({"params": p}, subnet)["params"], params)
    for path, place in self.places.items():
      site = self._site(path, place, width)
      own = {axis: self.choices(axis, width) for axis in self.listed(place.depth)}
      columns = [dict(zip(own, row)) for row in itertools.product(*own.values())]
      layers = _at(params, path)
      one = layers if place.leads else jax.tree.map(lambda x: x[0], layers)
      cuts = [functools.partial(lambda c, p: site.cut(None, {"params": p}, c)["params"], c) for c in columns]
      kinds = [functools.partial(used, cut, one) for cut in cuts]
      index = 0
      for axis, sizes in own.items():
        index = index * len(sizes) + choice[path][axis]
      found = jax.lax.map(lambda i: jax.lax.switch(i, kinds), jnp.broadcast_to(index, (place.count,)))
      if place.leads:
        found = jax.tree.map(lambda x: x[0], found)
      else:
        present = choice[path][place.depth] > 0
        found = jax.tree.map(lambda x: x & present.reshape(-1, *(1,) * (x.ndim - 1)), found)
      marks = _put(marks, path, found)
    return marks

  def _cut(self, variables, subnet):
    """What is cut alike in all layers, and all that stands outside of them."""
    params, sizes = self.supernet.axes["params"], sizes_of(self.supernet.model, subnet)
    cut = {}
    for name, tree in variables.items():
      axes = self.supernet.axes[name] if name in self.supernet.axes else statistics_axes(params, tree)
      cut[name] = take(tree, self._outside(axes, ()), sizes, self.supernet.space.groups, strict=False)
    return cut

  def _outside(self, axes, path):
    """Names as they are cut outside of the layers, which cut themselves."""
    if path not in self.places:
      return axes if is_axes(axes) else {k: self._outside(v, (*path, k)) for k, v in axes.items()}

    def inside(names):
      # What layers cut alike costs less out here, but where a leaf lies in shares.
      alike = self._whole or not names.stack
      kept = names.names if alike else (names.names[0], *("1" for _ in names.names[1:]))
      # A rule runs once, inside the layer, where all sizes are known.
      return dataclasses.replace(names, names=kept, rule=None)

    return jax.tree.map(inside, axes, is_leaf=is_axes)

  def listed(self, depth: str) -> list[str]:
    """The axes that have a size in each layer of a stack."""
    return [axis for axis in self.inner if depth_of(axis) == depth]

  def choices(self, axis: str, width: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes that an inner axis may have beside outer ones, in rising order."""
    return _sizes(self.supernet.space, axis, tuple(width.items()))

  def _module(self, width, inner, counts):
    sites = {path: self._site(path, place, width) for path, place in self.places.items()}
    layers = {depth: Layers(counts[depth], sites) for depth in self.depths}
    return module_of(self.supernet.model, {**Subnet(**width).of_model, **inner, **layers})

  def _site(self, path, place, width):
    axes = {}
    for name, tree in self.supernet.axes.items():
      if (tree := _at(tree, path)) is not None:
        axes[name] = jax.tree.map(lambda a: a.without(place.depth), tree, is_leaf=is_axes)
    model, width = self.supernet.model, Subnet(**width).of_model.chosen

    def keep(choice):
      if not hasattr(model, "sizes"):
        return Subnet(**width, **choice)
      # Layers behind a first one that differs are alike: the next one stands for them.
      sizes = model.sizes(Subnet(**width, **choice, **{place.depth: place.first + 1}))
      sizes = sizes.layer(place.depth, place.first).chosen
      return Subnet(**{axis: s for axis, s in sizes.items() if isinstance(s, int) and not is_depth(axis)})

    return Site(axes, keep, self.supernet.space.groups, not place.leads, self._gather(path, place))

  def _gather(self, path, place):
    """Makes the parameters of a layer whole."""
    if self._whole or place.leads:
      return lambda params: params
    axes, shapes = (_at(tree["params"], path) for tree in (self.supernet.axes, self.supernet.shapes))
    axes = jax.tree.map(lambda a: a.without(place.depth), axes, is_leaf=is_axes)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return gatherer({"params": axes}, {"params": shapes}, self.mesh)

  def _entries(self, numbers):
    """`(path, choice)` of each place, from the numbers of a vector behind the first."""
    start = 0
    for path, place in self.places.items():
      tree = {}
      for axis in (place.depth, *self.listed(place.depth)):
        tree[axis] = numbers[start:start + place.count]
        start += place.count
      if place.leads:
        del tree[place.depth]
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


def _places(axes: Any, shapes: Any) -> dict[tuple[str, ...], Place]:
  """Where layers that are called by `stack` are in a tree of axis names."""
  leads, places = dict(_leads(axes, ())), {}
  for path, depth in leads.items():
    places[path] = Place(depth, 0, 1, True)
  for path, depth in _stacks(axes, ()):
    led = path[-1] == REST and any(lead[:-1] == path[:-1] for lead in leads)
    count = jax.tree.leaves(_at(shapes, path))[0].shape[0]
    places[path] = Place(depth, int(led), count, False)
  return places


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


def _leads(axes: Any, path: tuple[str, ...]):
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


def _owners(axes: Any, places: Mapping[tuple[str, ...], Place]) -> dict[str, set[str | None]]:
  """For each name, the depth axes of the layers that it occurs in, and None where it does outside."""
  owners: dict[str, set[str | None]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes):
    keys, leaf = tuple(entry.key for entry in path), Axes.of(leaf)
    depth = next((p.depth for where, p in places.items() if keys[:len(where)] == where), None)
    for name in (*flat(leaf.names), *getattr(leaf.rule, "axes", ())):
      owners.setdefault(name, set()).add(depth)
  return owners


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  """The node at a path; None where there is none."""
  for key in path:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def _put(tree: Any, path: tuple[str, ...], node: Any) -> Any:
  """The tree with another node at a path."""
  return {**tree, path[0]: _put(tree[path[0]], path[1:], node)} if path else node
