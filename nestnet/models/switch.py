"""Layers whose sizes are data: one program in which every sub-network costs its own FLOPs.

Each part of a layer is a `lax.switch` over the sizes that it may take, absent being one more
branch, scanned over the stacked layers. Differentiating the switch itself would keep the residuals
of every branch; the rule here keeps a part's input alone and switches over the branches' own
derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import subtract_filters

from nestnet.axes import statistics_axes
from nestnet.slicing import scatter, take
from nestnet.subnet import OneOf, Subnet

CHOICE = "choice"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
  """Where layers stand in the tree of the variables, and how one of them is cut.

  Attributes:
    axes: Axis names of each collection of a layer.
    keep: What `take` keeps of a layer, from the sizes that were chosen for it.
    fits: Whether the supernet has so much of everything as some sizes take.
    groups: As in `Space.groups`.
    stacked: Whether the arrays have a dimension over layers; else it is one layer.
    gather: Applied to a layer's parameters before they are cut: makes those whole that lie in shares
      on a mesh.
  """

  axes: Mapping[str, Any]
  keep: Callable[[Mapping[str, int]], Subnet]
  fits: Callable[[Mapping[str, int]], bool]
  groups: Mapping[str, int]
  stacked: bool = True
  gather: Callable[[Any], Any] = lambda params: params

  def cut(self, part: Part | None, collections: Mapping[str, Any], choice: Mapping[str, int]
          ) -> dict[str, Any]:
    """A part's variables in one of its choices; without a part, those of the layer."""
    subnet = self.keep(choice)
    return {name: take(tree, self.names(part, name, tree), subnet, self.groups, strict=False)
            for name, tree in collections.items()}

  def names(self, part: Part | None, collection: str, tree: Any) -> Any:
    """Axis names of a collection of a part; statistics that came later have those of their scales."""
    axes = part.of(self.axes) if part else self.axes
    return axes[collection] if collection in axes else statistics_axes(axes["params"], tree)


class Layers(int):
  """A number of layers that are cut inside the scan over them; otherwise an ordinary int.

  Attributes:
    sites: The sites by their paths.
  """

  def __new__(cls, count: int, sites: Mapping[tuple[str, ...], Site]):
    self = super().__new__(cls, count)
    self.sites = sites
    return self

  def of(self, count: int) -> Layers:
    """Another number of them."""
    return Layers(count, self.sites)


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the modules that a layer applies in turn.

  Attributes:
    name: Its key in the layer's parameter tree; None where the layer is this part alone.
    make: `make(name=..., **sizes)` makes it.
    sizes: Its fields that have sizes: a size, or several of which a layer has one.
    reads: The last dimension of what it reads, where that is `OneOf` several. What it is given has the
      largest of them, with zeros behind its own.
    writes: The same of what it gives.
  """

  name: str | None
  make: Callable[..., nn.Module]
  sizes: Mapping[str, Any]
  reads: Any = None
  writes: Any = None

  @property
  def several(self) -> list[OneOf]:
    """What data chooses of it."""
    return [s for s in (self.reads, self.writes, *self.sizes.values()) if isinstance(s, OneOf)]

  @property
  def axes(self) -> dict[str, tuple[int, ...]]:
    """The axes that it has several sizes along, and these."""
    return dict(pair for size in self.several for pair in size.axes)

  def choices(self, site: Site) -> list[dict[str, int]]:
    """The combinations of a size along each axis that fit and differ, in the order of `index`."""
    return list(self._places(site)[0].values())

  def index(self, site: Site, choice: Mapping[str, jax.Array]) -> Any:
    """Which combination each layer uses, `[layers]`, from the positions of its sizes."""
    place = 0
    for axis, sizes in self.axes.items():
      place = place * len(sizes) + choice[axis]
    order = self._places(site)[1]
    return place if order == [*range(len(order))] else jnp.asarray(order, jnp.int32)[place]

  def _places(self, site: Site) -> tuple[dict[tuple[int, ...], dict[str, int]], list[int]]:
    """What fits, by the sizes that it comes to; and the place of every combination there, else 0."""
    distinct: dict[tuple[int, ...], dict[str, int]] = {}
    rows = [dict(zip(self.axes, row)) for row in itertools.product(*self.axes.values())]
    sizes = [tuple(size.value(row) for size in self.several) for row in rows]
    for row, own in zip(rows, sizes):
      if site.fits(row):
        distinct.setdefault(own, row)
    order = list(distinct)
    return distinct, [order.index(own) if own in distinct else 0 for own in sizes]

  def module(self, choice: Mapping[str, int]) -> nn.Module:
    """The module of a combination of sizes, on its own."""
    sizes = {field: size.value(choice) if isinstance(size, OneOf) else size
             for field, size in self.sizes.items()}
    return self.make(name=None, **sizes).clone(parent=None, name=None)

  def read(self, x: Any, choice: Mapping[str, int]) -> Any:
    """Of what it is given, what it reads in a combination of sizes."""
    if not isinstance(self.reads, OneOf):
      return x
    return jax.tree.map(lambda leaf: leaf[..., :self.reads.value(choice)], x)

  def written(self, x: Any) -> Any:
    """What it gives, alike in all combinations of sizes."""
    if not isinstance(self.writes, OneOf):
      return x
    full = max(self.writes.values)
    return jax.tree.map(
      lambda leaf: jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, full - leaf.shape[-1])]), x)

  def of(self, collections: Mapping[str, Any]) -> dict[str, Any]:
    """This part's own in collections of the layer."""
    if self.name is None:
      return dict(collections)
    return {c: tree[self.name] for c, tree in collections.items() if self.name in tree}

  def under(self, collections: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `of`."""
    return {c: tree if self.name is None else {self.name: tree} for c, tree in collections.items()}


class Switched(nn.Module):
  """A stack of layers that reads from the `choice` collection what each layer is; or a single module.

  The collection holds, under the name of the stack, int32 arrays `[layers]`: under the depth axis 1
  for a layer that is there and 0 for one that is not (without it, all are), and under each axis with
  several sizes the position of the layer's size among them.

  Attributes:
    parts: What a layer applies in turn.
    layers: How many there are.
    depth: The axis over them; None for what is no layer, and is called without constants.
  """

  parts: tuple[Part, ...]
  layers: Layers
  depth: str | None

  @nn.compact
  def __call__(self, x, constants, taps, unroll, kwargs):
    site = self.layers.sites[self.path]
    variables = dict(self.variables)
    choice = variables.pop(CHOICE, {})
    if not site.stacked:
      variables = jax.tree.map(lambda leaf: leaf[None], variables)
    params = {"params": variables.pop("params", {})}
    skips = self.depth in choice
    index = tuple(jnp.broadcast_to(
      choice[self.depth] * (1 + part.index(site, choice)) if skips else part.index(site, choice),
      (int(self.layers),))
      for part in self.parts)
    keys = {name: jax.random.split(self.make_rng(name), int(self.layers))
            for name in self.scope.rngs if name != "params"}
    mutable = subtract_filters(self.scope.mutable, ["params", CHOICE])
    shared, whole, join = _split(kwargs)

    def functions(part):
      example = jax.tree.map(lambda leaf: leaf[0], (part.of(params), part.of(variables), constants, keys))
      absent, *present = _functions(part, site, x, example, kwargs, join, mutable)
      return [absent, *present] if skips else present

    scan = functools.partial(jax.lax.scan, unroll=unroll) if site.stacked else _once
    run = _run([functions(part) for part in self.parts], self.parts, site.gather, taps, scan)
    x, outputs, updates = run(params, x, shared, ((index, variables, constants, keys), whole))
    for collections in (part.under(u) for part, u in zip(self.parts, updates)):
      for collection, tree in collections.items():
        for key, value in tree.items():
          self.put_variable(collection, key, value if site.stacked else jax.tree.map(lambda v: v[0], value))
    return x, outputs


def _once(layer, carry, entries, reverse=False):
  """As a scan over one entry, but that what is carried may change its shape."""
  del reverse
  carry, output = layer(carry, jax.tree.map(lambda leaf: leaf[0], entries))
  return carry, jax.tree.map(lambda leaf: leaf[None], output)


def _split(kwargs):
  """Arguments as (arrays with a derivative, other arrays, a function that joins them again)."""
  leaves, structure = jax.tree.flatten(kwargs)
  kinds = ["static" if not isinstance(leaf, jax.Array) else
           "shared" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "whole" for leaf in leaves]
  static = [leaf if kind == "static" else None for leaf, kind in zip(leaves, kinds)]

  def join(shared, whole):
    sources = {"shared": iter(shared), "whole": iter(whole), "static": None}
    return jax.tree.unflatten(structure, [
      leaf if kind == "static" else next(sources[kind]) for leaf, kind in zip(static, kinds)])

  pick = lambda wanted: [leaf for leaf, kind in zip(leaves, kinds) if kind == wanted]
  return pick("shared"), pick("whole"), join


def _functions(part, site, x, example, kwargs, join, mutable):
  """What the part does in each of its choices, absent first, all with results of the same shapes.

  Each is `f(params, x, shared, fixed) -> (x, updates)`, where `fixed` is `((variables, constants,
  keys), whole)`.
  """
  params, variables, constants, keys = example
  choices = part.choices(site)
  modules = [part.module(choice) for choice in choices]

  def small(i, params, x, shared, fixed):
    """The part in one of its choices, with updates of those sizes."""
    (variables, constants, keys), whole = fixed
    cut = site.cut(part, {**params, **variables}, choices[i])
    inputs = (part.read(x, choices[i]), *(() if constants is None else (constants,)))
    y, updates = modules[i].apply(cut, *inputs, rngs=keys, mutable=mutable, **join(shared, whole))
    return part.written(y), updates

  def present(i, params, x, shared, fixed):
    y, updates = small(i, params, x, shared, fixed)
    variables = fixed[0][0]
    return y, {c: _laid(tree, variables.get(c), part, site, c, choices[i], shapes[c])
               for c, tree in updates.items()}

  def absent(params, x, shared, fixed):
    variables = fixed[0][0]
    return x, {c: variables[c] if c in variables else jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), tree) for c, tree in shapes.items()}

  shared, whole, _ = _split(kwargs)
  _, shapes = jax.eval_shape(functools.partial(small, -1), params, x, shared,
                             ((variables, constants, keys), whole))
  return [absent, *(functools.partial(present, i) for i in range(len(choices)))]


def _laid(small, old, part, site, collection, choice, shapes):
  """Updated variables in the shapes of the full size; what the sub-network lacks stays as it was."""
  if old is None and jax.tree.structure(small) != jax.tree.structure(shapes):
    return scatter(small, site.names(part, collection, shapes), site.keep(choice), shapes, site.groups)
  if old is None:
    return jax.tree.map(lambda leaf, s: jnp.pad(
      leaf, [(0, full - size) for full, size in zip(s.shape, leaf.shape)]), small, shapes)
  ones = jax.tree.map(jnp.ones_like, small)
  names, subnet = site.names(part, collection, old), site.keep(choice)
  spread, mask = (scatter(tree, names, subnet, old, site.groups) for tree in (small, ones))
  return jax.tree.map(lambda new, m, kept: jnp.where(m > 0, new, kept), spread, mask, old)


def _switch(index, branches, *operands):
  return jax.lax.switch(index, branches, *operands) if len(branches) > 1 else branches[0](*operands)


def _run(functions, parts, gather, taps, scan):
  """`run(params, x, shared, (fixed of each layer, whole)) -> (x, taps, updates of each part)`."""

  def pullback(function):
    def pull(params, x, shared, fixed, cotangents):
      return jax.vjp(lambda *args: function(*args, fixed), params, x, shared)[1](cotangents)
    return pull

  pullbacks = [[pullback(f) for f in branches] for branches in functions]

  def of(entry, part, whole):
    index, variables, constants, keys = entry
    return (part.of(variables), constants, keys), whole

  @jax.custom_vjp
  def run(params, x, shared, fixed):
    return forward(params, x, shared, fixed)[0]

  def forward(params, x, shared, fixed):
    each, whole = fixed

    def layer(x, entry):
      params, each = gather(entry[0]), entry[1]
      inputs, updates = [], []
      for part, branches, index in zip(parts, functions, each[0]):
        inputs.append(x)
        x, updated = _switch(index, branches, part.of(params), x, shared, of(each, part, whole))
        updates.append(updated)
      return x, (inputs, updates, x if taps else None)

    x, (inputs, updates, outputs) = scan(layer, x, (params, each))
    return (x, outputs, updates), (params, shared, fixed, inputs)

  def backward(saved, cotangents):
    params, shared, (each, whole), inputs = saved
    last, of_outputs, of_updates = cotangents

    def layer(carry, entry):
      of_x, of_shared = carry
      params, each, inputs, of_updates, of_output = entry
      params, pull = jax.vjp(gather, params)
      if taps:
        of_x = jax.tree.map(jnp.add, of_x, of_output)
      grads = {}
      for i in reversed(range(len(parts))):
        grad, of_x, more = _switch(
          each[0][i], pullbacks[i], parts[i].of(params), inputs[i], shared, of(each, parts[i], whole),
          (of_x, of_updates[i]))
        of_shared = jax.tree.map(jnp.add, of_shared, more)
        grads |= grad["params"] if parts[i].name is None else {parts[i].name: grad["params"]}
      return (of_x, of_shared), pull({"params": grads})[0]

    start = last, jax.tree.map(jnp.zeros_like, shared)
    (of_x, of_shared), grads = scan(
      layer, start, (params, each, inputs, of_updates, of_outputs), reverse=True)
    return grads, of_x, of_shared, None

  run.defvjp(forward, backward)
  return run
