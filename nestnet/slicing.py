"""From the supernet's parameters to a sub-network's: `take`, and its dual.

A sub-network is an ordinary, smaller module run on a slice of the supernet's tree:

    model.clone(**small).apply({"params": take(params, axes, small)}, images)

The derivative of a slice is the zero-padded scatter, so gradients, optimizers, checkpoints and
sharding need nothing more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from nestnet.axes import REST, Axes, flat, is_axes
from nestnet.errors import UserError, one_of
from nestnet.subnet import INPUTS, Size, Subnet, depth_of, is_depth, kept_ids, reach

Groups = Mapping[str, int]


def take(tree: Any, axes: Any, subnet: Subnet | Mapping[str, Size], groups: Groups | None = None,
         strict: bool = True) -> Any:
  """The slice of `tree` that belongs to `subnet`.

  Works on parameters, element-wise optimizer state, averages and statistics; on jax and numpy
  arrays and on `jax.ShapeDtypeStruct`s; on linen dicts, NNX states and plain dicts.

  Args:
    tree: The supernet's tree.
    axes: The tree of axis names, as from `axis_names`: `Axes`, or their text (`"embed -> mlp"`).
    subnet: What to keep. Axes that it does not mention stay whole.
    groups: Number of equal groups of an axis, as in `Space.groups`: the subnet keeps the leading
      part of each.
    strict: Whether an axis of the subnet that no leaf has is an error. Trees beside the parameters
      (constants, an objective's own weights) may lack some.

  Returns:
    The smaller tree. A stack of layers (`layers: ...` leaves below one key) stays stacked, unless
    the subnet has its own sizes in each layer: then the key holds `layers_0`, `layers_1`, ...

  Raises:
    ValueError: An axis of the subnet is in no leaf, a size is larger than the dimension or does
      not divide into the groups, a layer id does not exist, or the trees differ.

  Example:
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> axes = {"up": "embed -> mlp", "down": "mlp -> embed"}
    >>> jax.tree.map(jnp.shape, take(params, axes, Subnet(mlp=2)))
    {'down': (2, 4), 'up': (4, 2)}
  """
  if not isinstance(subnet, Subnet):
    subnet = Subnet(**subnet)
  known = axes_in(axes)
  for axis in subnet:
    if strict and axis not in known and axis not in INPUTS:
      raise one_of("axis", axis, sorted(known))
  return _take(meta.unbox(tree), axes, subnet, dict(groups or {}), ())


def axes_in(axes: Any) -> set[str]:
  """Every axis that a tree of names can be cut along."""
  leaves = [Axes.of(leaf) for leaf in jax.tree.leaves(axes, is_leaf=is_axes)]
  names = {n for leaf in leaves for n in (*flat(leaf.names), *getattr(leaf.rule, "axes", ()))}
  return {n for n in names | _unrolled_axes(axes) if not n.isdigit()}


def unstacked(tree: Any, axes: Any) -> Any:
  """The tree with the layers of a stack apart, as `take` gives it where each has sizes of its own.

  Args:
    tree: As of `take`; arrays or their shapes.
    axes: Its axis names.

  Example:
    >>> params = {"blocks": {"bias": jnp.ones((2, 4))}, "last": jnp.ones(3)}
    >>> names = {"blocks": {"bias": "layers: -> mlp"}, "last": "-> embed"}
    >>> jax.tree.map(jnp.shape, unstacked(params, names))
    {'blocks': {'layers_0': {'bias': (4,)}, 'layers_1': {'bias': (4,)}}, 'last': (3,)}
  """
  if is_axes(axes) or not isinstance(axes, Mapping):
    return tree
  tree = meta.unbox(tree)
  if depth := _stacked_over(axes):
    count = jax.tree.leaves(tree)[0].shape[0]
    return {f"{depth}_{i}": _entry(tree, i) for i in range(count)}
  return {key: unstacked(child, axes[key]) for key, child in tree.items()}


def scatter(small: Any, axes: Any, subnet: Subnet, like: Any, groups: Groups | None = None) -> Any:
  """The dual of `take`: `small` laid into zeros of the supernet's shapes.

  Args:
    small: A tree as `take` returns it.
    axes: The supernet's axis names.
    subnet: The subnet whose slice `small` is.
    like: A tree of the supernet's shapes and dtypes; abstract is enough.
    groups: As in `take`.

  Example:
    >>> small = {"bias": jnp.ones(2)}
    >>> scatter(small, {"bias": "-> mlp"}, Subnet(mlp=2), {"bias": jnp.zeros(4)})["bias"].tolist()
    [1.0, 1.0, 0.0, 0.0]
  """
  plain = jax.tree.map(
    lambda a: dataclasses.replace(Axes.of(a), rule=None), axes, is_leaf=is_axes)
  leaves, structure = jax.tree.flatten(like)
  small = jax.tree.leaves(small)
  # JAX transposes functions of floating or of integer arrays, not of both.
  for floating in {_floating(leaf) for leaf in leaves}:
    places = [i for i, leaf in enumerate(leaves) if _floating(leaf) == floating]

    def cut(chosen):
      chosen = iter(chosen)
      full = [next(chosen) if i in places else jnp.zeros(x.shape, x.dtype) for i, x in enumerate(leaves)]
      kept = take(jax.tree.unflatten(structure, full), plain, subnet, groups, strict=False)
      return [leaf for leaf in jax.tree.leaves(kept) if _floating(leaf) == floating]

    wanted = [leaf for leaf in small if _floating(leaf) == floating]
    (spread,) = jax.linear_transpose(cut, [leaves[i] for i in places])(wanted)
    for i, leaf in zip(places, spread):
      leaves[i] = leaf
  return jax.tree.unflatten(structure, leaves)


def _floating(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def used(cut: Callable[[Any], Any], tree: Any) -> Any:
  """Which numbers of a tree a cut reads, rules included: booleans of the tree's shapes.

  Args:
    cut: A function of the tree, such as `take` of a sub-network.
    tree: Floating arrays, or their shapes.

  Example:
    >>> params = {"bias": jnp.zeros(4)}
    >>> used(lambda tree: take(tree, {"bias": "-> mlp"}, Subnet(mlp=2)), params)["bias"].tolist()
    [True, True, False, False]
  """
  # Derivatives at ones: of sums of products of positive numbers, so that none is zero by chance.
  ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tree)
  small, pull = jax.vjp(cut, ones)
  (found,) = pull(jax.tree.map(jnp.ones_like, small))
  return jax.tree.map(lambda x: x > 0, found)


def _take(tree, axes, subnet, groups, path):
  if is_axes(axes):
    return _cut_leaf(tree, Axes.of(axes), subnet, groups, path)
  if not isinstance(axes, Mapping) or not isinstance(tree, Mapping):
    return _one_level(lambda t, a, k: _take(t, a, subnet, groups, path + (k,)), tree, axes, path)
  depth = _stacked_over(axes)
  if depth and subnet.per_layer(depth):
    return _unstack(tree, axes, depth, subnet, groups, path)
  depth = unrolled_over(axes)
  if depth:
    return _select_layers(tree, axes, depth, subnet, groups, path)
  node = _one_level(lambda t, a, k: _take(t, a, subnet, groups, path + (k,)), tree, axes, path)
  rule = next((a.rule for a in axes.values() if isinstance(a, Axes) and _of_node(a.rule)), None)
  if rule is None:
    return node
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(node)):
    return jax.eval_shape(lambda n: rule(n, subnet), node)
  return rule(node, subnet)


def _of_node(rule) -> bool:
  return getattr(rule, "node", False)


def _one_level(fn, tree, axes, path):
  """Maps `fn(child, axes of the child, key)` over the children of one node."""
  children, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda t: t is not tree)
  named, _ = jax.tree_util.tree_flatten_with_path(
    axes, is_leaf=lambda a: a is not axes or is_axes(a))
  keys, names = ([_key(p) for p, _ in nodes] for nodes in (children, named))
  if isinstance(axes, Mapping):
    named = {_key(p): a for p, a in named}
    if set(keys) != set(named):
      raise UserError(f"the axes tree does not match the tree at {'/'.join(path) or 'its root'}: "
                      f"got {sorted(named)}, the tree has {sorted(keys)}")
    pairs = [(child, named[key], key) for key, (_, child) in zip(keys, children)]
  elif len(keys) == len(names):
    pairs = [(child, a, key) for key, (_, child), (_, a) in zip(keys, children, named)]
  else:
    raise UserError(f"the axes tree does not match the tree at {'/'.join(path) or 'its root'}: "
                    f"{len(names)} entries for {len(keys)}")
  return jax.tree.unflatten(structure, [fn(*pair) for pair in pairs])


def _key(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _cut_leaf(leaf, names, subnet, groups, path):
  if not jax.tree_util.all_leaves([leaf]):
    # An optimizer's pair of moments, or an NNX variable around its array.
    return jax.tree.map(lambda array: _cut_leaf(array, names, subnet, groups, path), leaf)
  cut = lambda array: _cut(array, names, subnet, groups, path)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.eval_shape(lambda array: _ruled(cut(array), names, subnet), leaf)
  return _ruled(cut(leaf), names, subnet)


def _ruled(leaf, names, subnet):
  return names.rule(leaf, subnet) if names.rule and not _of_node(names.rule) else leaf


def _cut(array, names: Axes, subnet, groups, path):
  where = "/".join(path)
  if len(names.names) != np.ndim(array):
    raise UserError(f"{where}: {str(names)!r} has {len(names.names)} names, the array has shape "
                    f"{list(np.shape(array))}")
  for dimension, name in enumerate(names.names):
    if isinstance(name, str):
      if name in subnet.chosen:
        array = _keep(array, dimension, name, subnet.chosen[name], groups.get(name, 1), where)
    elif any(factor in subnet.chosen for factor, _ in name):
      array = _keep_product(array, dimension, name, subnet, groups, where)
  return array


def _keep_product(array, dimension, factors, subnet, groups, where):
  shape = np.shape(array)
  known = math.prod(size for _, size in factors if size)
  sizes = tuple(size or shape[dimension] // known for _, size in factors)
  if math.prod(sizes) != shape[dimension]:
    raise UserError(f"{where}: a dimension of {shape[dimension]} is not the product {factors}")
  array = array.reshape(shape[:dimension] + sizes + shape[dimension + 1:])
  for offset, (factor, _) in enumerate(factors):
    if factor in subnet.chosen:
      array = _keep(array, dimension + offset, factor, subnet.chosen[factor],
                    groups.get(factor, 1), where)
  return array.reshape(shape[:dimension] + (-1,) + shape[dimension + 1:])


def _keep(array, dimension, axis, size, groups, where):
  """The chosen entries of one dimension: leading ones, leading ones of each group, or ids."""
  full = array.shape[dimension]
  if reach(axis, size) > full:
    raise UserError(f"{where}: {axis}={size} is outside the axis, which has {full}")
  if isinstance(size, tuple):
    if not is_depth(axis):
      raise UserError(f"{where}: {axis}={size} has one size a layer, but this array has no "
                      f"{depth_of(axis)} axis")
    pieces = [_slice(array, dimension, i, i + 1) for i in size]
    return (jnp if isinstance(array, jax.Array) else np).concatenate(pieces, axis=dimension)
  if size == full:
    return array
  if groups == 1:
    return _slice(array, dimension, 0, size)
  if full % groups or size % groups:
    raise UserError(f"{where}: {axis}={size} of {full} does not divide into {groups} groups")
  shape = array.shape
  array = array.reshape(shape[:dimension] + (groups, full // groups) + shape[dimension + 1:])
  array = _slice(array, dimension + 1, 0, size // groups)
  return array.reshape(shape[:dimension] + (size,) + shape[dimension + 1:])


def _slice(array, dimension, start, stop):
  if isinstance(array, jax.Array):
    return jax.lax.slice_in_dim(array, start, stop, axis=dimension)
  return array[(slice(None),) * dimension + (slice(start, stop),)]


def _stacked_over(axes: Mapping) -> str | None:
  """The depth axis over which every leaf below this node is stacked, if this node is the stack."""
  leaves = [Axes.of(leaf) for leaf in jax.tree.leaves(axes, is_leaf=is_axes)]
  first = leaves[0].names[0] if leaves and leaves[0].names else None
  together = isinstance(first, str) and is_depth(first) and all(
    leaf.names and leaf.names[0] == first for leaf in leaves)
  stack = next((leaf.stack for leaf in leaves if leaf.stack), None)
  return first if together and not _has_key(axes, stack) else None


def _has_key(axes: Any, key: str | None) -> bool:
  return isinstance(axes, Mapping) and (
    key in axes or any(_has_key(child, key) for child in axes.values()))


def unrolled_over(axes: Mapping) -> str | None:
  """The depth axis whose layers are this node's children: `layers_0`, `layers_1`, ...

  Behind the first ones, which differ, the others may stand together, a stack called `rest`.
  """
  own = [str(key) for key in axes if key != REST]
  if not own:
    return None
  depth = own[0].rpartition("_")[0]
  keys = {f"{depth}_{i}" for i in range(len(own))}
  return depth if is_depth(depth) and set(own) == keys else None


def _unrolled_axes(axes: Any) -> set[str]:
  if is_axes(axes) or not isinstance(axes, Mapping):
    return set()
  here = unrolled_over(axes)
  return {here} - {None} | {d for child in axes.values() for d in _unrolled_axes(child)}


def _unstack(tree, axes, depth, subnet, groups, path):
  full = jax.tree.leaves(tree)[0].shape[0]
  ids = _ids(subnet.chosen.get(depth, full), full, depth, "/".join(path))
  _check_lists(subnet, depth, len(ids))
  flat_axes = jax.tree.map(lambda a: Axes.of(a).without(depth), axes, is_leaf=is_axes)
  return {
    f"{depth}_{position}": _take(_entry(tree, i), flat_axes, subnet.layer(depth, position), groups,
                                 path + (f"{depth}_{position}",))
    for position, i in enumerate(ids)}


def _entry(tree, i):
  if isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct):
    return jax.eval_shape(lambda t: jax.tree.map(lambda leaf: leaf[i], t), tree)
  return jax.tree.map(lambda leaf: leaf[i], tree)


def _select_layers(tree, axes, depth, subnet, groups, path):
  own = len(axes) - (REST in axes)
  full = own + (_length(tree[REST], axes[REST], depth) if REST in axes else 0)
  ids = _ids(subnet.chosen.get(depth, full), full, depth, "/".join(path))
  _check_lists(subnet, depth, len(ids))
  first = [i for i in ids if i < own]
  kept = {
    f"{depth}_{position}": _take(tree[f"{depth}_{i}"], axes[f"{depth}_{i}"],
                                 subnet.layer(depth, position), groups, path + (f"{depth}_{i}",))
    for position, i in enumerate(first)}
  if REST not in axes or len(first) == len(ids):
    return kept
  if len(first) < own:
    raise UserError(f"{'/'.join(path)}: {depth}={'+'.join(map(str, ids))} leaves out one of the "
                    f"first {own}, which the others stand on")
  rest = subnet.behind(depth, own, [i - own for i in ids[own:]])
  return kept | {REST: _take(tree[REST], axes[REST], rest, groups, path + (REST,))}


def _length(tree, axes, depth) -> int:
  """The number of layers in a stack."""
  return len(axes) if unrolled_over(axes) == depth else jax.tree.leaves(tree)[0].shape[0]


def _ids(size: Size, full: int, depth: str, where: str) -> tuple[int, ...]:
  ids = kept_ids(size)
  if ids and ids[-1] >= full:
    raise UserError(f"{where}: {depth}={size} is outside the axis, which has {full}")
  return ids


def _check_lists(subnet, depth, count):
  for axis, value in subnet.chosen.items():
    if isinstance(value, tuple) and not is_depth(axis) and depth_of(axis) == depth \
        and len(value) != count:
      raise UserError(f"{axis}={value} lists {len(value)} layers, but {depth} keeps {count}")
