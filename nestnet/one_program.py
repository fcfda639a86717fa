"""Members that are cut layer by layer: any of them as data to one program, each at its own cost.

Axes that only occur inside stacks of layers (heads, the MLP's width, the kernels of a stage), and depth
itself, are chosen layer by layer (`nestnet.models.switch`). Others (the residual width, the resolution of
the images) are static in the branches of one outer switch, each of which holds its own derivative.

Where there would be too many of these, and the model says that it can (`carried`), each layer and each
module outside of the stacks (`singles`) chooses from the sizes that matter in it alone: what is carried
from one to the next has the full width, zeros behind the member's own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import is_axes, statistics_axes
from nestnet.errors import UserError
from nestnet.execution import Runnable, Supernet, module_of, resized, sizes_of
from nestnet.models.convolution import STATISTICS
from nestnet.models.switch import CHOICE, Layers, Site
from nestnet.places import Place, at, nested, owners, put, stacks
from nestnet.sharding import gatherer
from nestnet.slicing import axes_in, scatter, take, used
from nestnet.subnet import INPUTS, OneOf, Subnet, depth_of, is_depth, kept_count

# Each branch of the outer switch holds the whole network once more.
BRANCHES = 32


class OneProgram:
  """The members of a supernet's space as vectors, and what runs them.

  Args:
    supernet: The family.
    mesh: Where its parameters lie; None where each device has them whole.

  Attributes:
    inner: Axes that are chosen in each layer.
    carried: Axes that are chosen once, and matter in some layers and singles.
    outer: Axes that are static in each branch of the outer switch.
    widths: Their joint choices, one for each branch.
  """

  def __init__(self, supernet: Supernet, mesh: jax.sharding.Mesh | None = None):
    self.supernet, self.mesh = supernet, mesh
    self._whole = mesh is None or mesh.shape["fsdp"] == 1
    self._lay_out(())
    named = tuple(axis for axis in getattr(supernet.model, "carried", ()) if axis in self.outer)
    if named:
      outside = self._branches() if self.possible else math.inf
      self._lay_out(named)
      if self._branches() >= outside:
        self._lay_out(())

  def _lay_out(self, carried: tuple[str, ...]) -> None:
    """Where each axis is chosen: those that are carried, in each place in which they matter."""
    space, axes = self.supernet.space, self.supernet.axes["params"]
    singles = [(name,) for name in getattr(self.supernet.model, "singles", ()) if carried and name in axes]
    self.places = {path: Place(None, 0, 1, True) for path in singles}
    self.places |= {path: place for path, place in stacks(axes, self.supernet.shapes["params"]).items()
                    if path[:1] not in singles}
    self.depths = tuple(dict.fromkeys(place.depth for place in self.places.values() if place.depth))
    self.lengths = {depth: max(p.first + p.count for p in self.places.values() if p.depth == depth)
                    for depth in self.depths}
    owned = owners(axes, self.places)
    decided = {axis: self._decided(axis) for axis in carried}
    # What stands in no place would have zeros for the units that a member lacks.
    self.carried = carried = tuple(axis for axis in carried if not any(
      None in owned.get(name, ()) for name in decided[axis]))
    self.inner = tuple(a for a in space.axes if a not in carried and self._is_inner(a, owned))
    self.outer = tuple(a for a in space.axes if a not in (*self.inner, *carried, *self.depths))
    self.widths = space.combinations(self.outer)
    self._local = {
      path: (*self._listed(place.depth), *(a for a in carried if decided[a] & axes_in(at(axes, path))))
      for path, place in self.places.items()}

  def _is_inner(self, axis, owned):
    if axis in INPUTS or is_depth(axis) or depth_of(axis) not in self.depths:
      return False
    # Choices may round to the same lengths, and decide nothing.
    names = self._decided(axis)
    depths = {place and place.depth for name in names for place in owned.get(name, ())}
    inside = depths <= {depth_of(axis)}
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
    return self._branches() / max(1, len(self.places))

  def _branches(self) -> int:
    return sum(math.prod(len(self.choices(axis, width)) for axis in local)
               for width in self.widths for local in self._local.values())

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

    def apply(variables, *inputs):
      one = self._branch(self.widths[vector[0]], nested(self._entries(vector[1:])))
      return one.module.apply({**one.cut(variables), CHOICE: one.choice}, *inputs)

    try:
      jax.eval_shape(apply, supernet.shapes, *supernet.inputs)
    except (TypeError, KeyError) as error:
      raise UserError(
        f"{type(supernet.model).__name__} cannot run as one program: {error}. Its layers' sizes must "
        "reach their modules through stack(sizes=...); allowed as it is: train.execution=slice") from error

  def vector(self, subnet: Subnet) -> np.ndarray:
    """A member as int32 `[entries]`: its outer sizes, those carried, then for each layer what it is."""
    subnet = self.supernet.space.subnet(subnet)
    # Its module refuses sizes that do not go together.
    self.supernet.module(subnet)
    width = {axis: subnet.chosen[axis] for axis in self.outer}
    numbers = [[self.widths.index(width)],
               [self.choices(axis, width).index(subnet.chosen[axis]) for axis in self.carried]]
    for place in self.places.values():
      kept = place.kept(subnet)
      if place.leads and not kept:
        raise UserError(f"sub-network {subnet}: {place.depth} leaves out layer 0, which the others stand on")
      here, of_all = [i for i, _ in kept], [i for _, i in kept]
      present = np.zeros(place.count, np.int32)
      present[here] = 1
      numbers.append(present)
      for axis in self._listed(place.depth):
        choices, position = self.choices(axis, width), np.zeros(place.count, np.int32)
        sizes = subnet.chosen[axis]
        position[here] = [choices.index(sizes[i] if isinstance(sizes, tuple) else sizes) for i in of_all]
        numbers.append(position)
    return np.concatenate(numbers).astype(np.int32)

  def kept(self, subnet: Subnet, depth: str) -> int:
    """How many layers along a depth axis a member has."""
    return kept_count(subnet.chosen.get(depth, self.lengths[depth]))

  def switch(self, run: Callable[..., Any], vector: jax.Array, *operands: Any) -> Any:
    """`run(runnable, *operands)` in the branch of the vector's outer sizes.

    What runs cuts only the outer sizes from the supernet. All branches must return the same shapes.
    """
    choice = nested(self._entries(vector[1:]))

    def branch(width):
      return lambda choice, *operands: run(self._branch(width, choice), *operands)

    branches = [branch(width) for width in self.widths]
    if len(branches) == 1:
      return branches[0](choice, *operands)
    return jax.lax.switch(vector[0], branches, choice, *operands)

  def _branch(self, width, choice) -> Runnable:
    """The members of some outer sizes."""
    several = {axis: self.choices(axis, width) for axis in (*self.inner, *self.carried)}
    module = self._module(width, several, self.lengths)
    subnet = Subnet(**width)
    return Runnable(subnet, functools.partial(self._cut, subnet=subnet), module, choice)

  def only(self, subnet: Subnet) -> Runnable:
    """One member as a program of its own, its layers cut one by one."""
    subnet = self.supernet.space.subnet(subnet)
    width = {axis: subnet.chosen[axis] for axis in self.outer}
    depths = {depth: subnet.chosen[depth] for depth in self.depths if depth in subnet}
    several = {axis: tuple(sorted(set(np.atleast_1d(subnet.chosen[axis]).tolist())))
               for axis in (*self.inner, *self.carried)}
    numbers = []
    for path, place in self.places.items():
      of_all = [i for _, i in place.kept(subnet)]
      positions = {axis: jnp.zeros(len(of_all), jnp.int32) for axis in self.carried}
      for axis in self._listed(place.depth):
        sizes = subnet.chosen[axis]
        positions[axis] = jnp.asarray([several[axis].index(
          sizes[i] if isinstance(sizes, tuple) else sizes) for i in of_all], jnp.int32)
      numbers.append((path, positions))
    cut = functools.partial(self._cut, subnet=Subnet(**width, **depths))
    module = self._module(width, several, {depth: self.kept(subnet, depth) for depth in self.depths})
    return Runnable(subnet, cut, module, nested(numbers))

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
      own = {axis: self.choices(axis, width) for axis in self._local[path]}
      columns = [dict(zip(own, row)) for row in itertools.product(*own.values())]
      # What does not fit is never chosen.
      columns = [column if site.fits(column) else columns[-1] for column in columns]
      layers = at(params, path)
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
      marks = put(marks, path, found)
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

  def _listed(self, depth: str | None) -> list[str]:
    """The axes that have a size in each layer of a stack."""
    return [axis for axis in self.inner if depth_of(axis) == depth]

  def choices(self, axis: str, width: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes that an axis may have in a layer beside outer ones, in rising order."""
    return _sizes(self.supernet.space, axis, tuple(width.items()))

  def _module(self, width, several, counts):
    sites = {path: self._site(path, place, width) for path, place in self.places.items()}
    layers = {depth: Layers(counts[depth], sites) for depth in self.depths}
    chosen = {axis: OneOf.along(axis, sizes, sites) for axis, sizes in several.items()}
    return module_of(self.supernet.model, {**Subnet(**width).of_model, **chosen, **layers})

  def _site(self, path, place, width):
    axes = {}
    for name, tree in self.supernet.axes.items():
      if (tree := at(tree, path)) is not None:
        axes[name] = jax.tree.map(lambda a: a.without(place.depth), tree, is_leaf=is_axes)
    model, width = self.supernet.model, Subnet(**width).of_model.chosen

    def keep(choice):
      if not hasattr(model, "sizes"):
        return Subnet(**width, **choice)
      # Layers behind a first one that differs are alike: the next one stands for them.
      depth = {place.depth: place.first + 1} if place.depth else {}
      sizes = model.sizes(Subnet(**width, **choice, **depth))
      sizes = sizes.layer(place.depth, place.first) if depth else sizes
      return Subnet(**{axis: size for axis, size in sizes.chosen.items() if isinstance(size, int)})

    full = sizes_of(model, self.supernet.space.largest).chosen

    def fits(choice):
      return all(size <= np.max(full.get(axis, size)) for axis, size in keep(choice).chosen.items())

    return Site(axes, keep, fits, self.supernet.space.groups, not place.leads, self._gather(path, place))

  def _gather(self, path, place):
    """Makes the parameters of a layer whole."""
    if self._whole or place.leads:
      return lambda params: params
    axes, shapes = (at(tree["params"], path) for tree in (self.supernet.axes, self.supernet.shapes))
    axes = jax.tree.map(lambda a: a.without(place.depth), axes, is_leaf=is_axes)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return gatherer({"params": axes}, {"params": shapes}, self.mesh)

  def _entries(self, numbers):
    """`(path, choice)` of each place, from the numbers of a vector behind the first."""
    start = len(self.carried)
    for path, place in self.places.items():
      tree = {axis: jnp.broadcast_to(numbers[i], (place.count,)) for i, axis in enumerate(self.carried)}
      for axis in (place.depth, *self._listed(place.depth)):
        tree[axis] = numbers[start:start + place.count]
        start += place.count
      if place.leads:
        del tree[place.depth]
      yield path, tree


@functools.lru_cache(maxsize=None)
def _sizes(space, axis, width):
  return space.sizes(axis, dict(width))
