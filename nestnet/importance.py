"""The order of units by importance, given to a whole train state: the same function, other prefixes.

A smaller member keeps leading units, so that the important ones should lead. Once-for-All sorts the
channels of the trained network before the first widths open (1908.09791, section 3.3).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestnet import execution
from nestnet.axes import flat
from nestnet.errors import UserError, one_of
from nestnet.execution import Supernet, sizes_of
from nestnet.permuting import Order, named_leaves, permutation, permute
from nestnet.sharding import put_batch
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet, depth_of, is_depth, kept_ids
from nestnet.training import Border

BY = ("l1", "l2", "activation")
KEEP = ("supported", "nothing")
# Below it kernels weigh units that others carry on: they tell of a unit only where nothing else reads it.
GATE = "squeeze"
SEEN = "importance"
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Sort:
  """A transition that sorts units by importance: `enter={"name": "nestnet.importance:Sort", "by": "l2"}`.

  Axes inside a stack have an order in each layer; others, such as the residual stream, one for all that
  read and write them. The largest network computes the same before and after, which is checked.

  Attributes:
    by: What is summed for a unit, over all that read it: `"l1"`: absolute weights (Once-for-All's
      choice); `"l2"`: squared weights; `"activation"`: the unit's mean absolute value on training
      batches.
    axes: Which axes; by default all along which members of the family are cut.
    keep: `"supported"`: units move only between the sizes that the phase before trained, so that its
      members compute the same too (Once-for-All's second phase of expansion); `"nothing"`: freely.
    batches: How many batches, for `"activation"`.
  """

  by: str = "l1"
  axes: Sequence[str] = ()
  keep: str = "supported"
  batches: int = 1

  def __post_init__(self):
    for option, allowed in (("by", BY), ("keep", KEEP)):
      if getattr(self, option) not in allowed:
        raise one_of(f"{option} of the order", getattr(self, option), allowed)
    if self.batches < 1:
      raise UserError(f"batches={self.batches} of the order; allowed is at least 1")

  def __call__(self, state: TrainState, border: Border) -> TrainState:
    """The state in the new order; a pure function of the state.

    Raises:
      ValueError: An unknown axis, one that no kernel reads, or an order that changes what the largest
        network computes: the model then has a name for two spaces, or two names for one (see `tied_axes`).
    """
    # The state is still that of the phase before.
    step = border.before or border.after
    trained = sizes_trained(border.before) if border.before and self.keep == "supported" else {}
    axes = self.axes or _cut(step.supernet, sizes_trained(border.after))
    seen = _activations(step, state, border.batches, self.batches) if self.by == "activation" else None
    make = lambda weights, seen: orders(step.supernet, step.axes, weights, axes, self.by, trained, seen)
    found = jax.jit(make)(state.trained, seen)
    sorted_ = permuted(step, state, found)
    before, after = (np.asarray(_outputs(step, s), np.float32) for s in (state, sorted_))
    if not np.abs(before - after).max() <= TOLERANCE * np.ptp(before):
      raise UserError(f"the units of {', '.join(found)} in another order change what the largest network "
                      f"computes by {np.abs(before - after).max():.3g}; allowed are axes whose units stand "
                      "for themselves (option `axes`)")
    return sorted_


def permuted(step: Step, state: TrainState, orders: Mapping[str, Order]) -> TrainState:
  """A train state with the units of some axes in another order: weights, optimizer, teacher, constants.

  The objective's untrained state has no names and stays.

  Args:
    step: Whose state it is.
    state: The state.
    orders: As in `permute`.

  Raises:
    ValueError: As `permute`, or the optimizer keeps something of another shape than its weight.
  """
  moves = permutation(step.axes, orders)

  def moved(x, weight, move):
    if x.shape != weight.shape and x.size > 1:
      raise UserError(f"an optimizer's {list(x.shape)} for a weight of {list(weight.shape)} has no names to "
                      "be reordered by; allowed are optimizers whose state has the shapes of the weights")
    return move(x) if x.shape == weight.shape else x

  def of(state):
    trained = permute(state.trained, step.axes, orders)
    opt_state = optax.tree_map_params(step.tx, moved, state.opt_state, state.trained, moves)
    teacher = state.teacher and permute(state.teacher, step.axes, orders)
    names = step.supernet.axes
    fixed = {c: jax.tree.map(lambda move, x: move(x), permutation(names[c], orders), tree)
             for c, tree in state.fixed.items()}
    return state.replace(trained=trained, opt_state=opt_state, teacher=teacher, fixed=fixed)

  return jax.jit(of)(state)


def orders(supernet: Supernet, axes: Any, weights: Any, wanted: Iterable[str], by: str = "l1",
           trained: Mapping[str, Any] | None = None, seen: Any = None) -> dict[str, Order]:
  """The orders of axes, most important units first, dealt round-robin into the groups of the space.

  Args:
    supernet: The family. `tied_axes` of its model names axes whose units are the same, a tuple for each
      space, the longest first; shorter ones are leading parts of it. `together` of it says how many
      units side by side move as one, as those do that GroupNorm normalises as one.
    axes: Axis names of `weights`.
    weights: What kernels are read from.
    wanted: Which axes, with those tied to them.
    by: As in `Sort`.
    trained: As from `sizes_trained`: sizes between which units stay.
    seen: As recorded for `"activation"`.

  Raises:
    ValueError: An unknown axis, or one that no kernel reads.
  """
  full, inside, read = _lengths(axes, weights), _inside(axes), set()
  for _, names, _ in named_leaves(axes):
    read |= names.contracted
  spaces = {axis: space for space in getattr(supernet.model, "tied_axes", ()) for axis in space}
  found: dict[str, Order] = {}
  for axis in wanted:
    if axis not in full:
      raise one_of("axis to sort", axis, full)
    space = spaces.get(axis, (axis,))
    if space[0] in found:
      continue
    lengths = full[space[0]]
    edges = [{size for tied in space for size in _at((trained or {}).get(tied, ()), layer)} | {
      length for tied in space[1:] for length in full[tied]} for layer in range(len(lengths))]
    parts = [scores(axes, weights, tied, by, len(lengths), seen)
             for tied in space if tied in read or tied == axis]
    score = [sum(jnp.pad(s, (0, n - len(s))) for s in layer) for n, layer in zip(lengths, zip(*parts))]
    made = [ranked(s, e, supernet.space.groups.get(axis, 1), getattr(supernet.model, "together", 1))
            for s, e in zip(score, edges)]
    for tied in space:
      cut = [order[:n] for order, n in zip(made, full[tied])]
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
    seen: For `"activation"`, the mean absolute inputs of kernels by their place.

  Returns:
    `[units]` for each layer.

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
  depth, inside = depth_of(axis), axis in _inside(axes)
  for path, names, first, leaf in readers:
    stacked = inside and depth in names.names
    if by == "activation":
      value = functools.reduce(lambda node, key: node[key], path[:-1], seen)[axis]
      kept = range(value.ndim - 1 - stacked, value.ndim)
    else:
      value = jnp.abs(leaf.astype(jnp.float32)) if by == "l1" else jnp.square(leaf.astype(jnp.float32))
      kept = [names.names.index(a) for a in ([depth] if stacked else []) + [axis]]
    value = value.sum([d for d in range(value.ndim) if d not in kept])
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


def sizes_trained(step: Step) -> dict[str, Any]:
  """How long members that a step trains have the axes: a set of sizes, or one for each layer.

  A sampler with a fixed list trains that; of any other all combinations of sizes count, coupled or not.
  """
  supernet, sampler = step.supernet, step.recipe.sampler
  model, space = supernet.model, supernet.space
  full, found = space.largest, {}

  def add(member, only=None):
    for axis, size in sizes_of(model, member).chosen.items():
      if is_depth(axis) or (only and axis not in only):
        continue
      if isinstance(size, int):
        found.setdefault(axis, {}).setdefault(None, set()).add(size)
      for layer, own in zip(kept_ids(member.chosen.get(depth_of(axis), len(size))), size) if isinstance(
          size, tuple) else ():
        found.setdefault(axis, {}).setdefault(layer, set()).add(own)

  if sampler.fixed:
    for term in sampler.terms(0):
      for member in term.candidates:
        for one in member if isinstance(member, tuple) else (member,):
          add(one)
    return found
  add(full)
  choices = {a: sorted({n for s in space.choices(a) for n in (s if isinstance(s, tuple) else (s,))})
             for a in space.axes if not is_depth(a)}
  other = lambda changed: Subnet(**{**full.chosen, **changed})
  whole, moved = sizes_of(model, full).chosen, {}
  for axis, sizes in choices.items():
    for size in sizes:
      changed = sizes_of(model, other({axis: size})).chosen
      for target in changed:
        if changed[target] != whole[target]:
          moved.setdefault(target, {})[axis] = sizes
  for target, by in moved.items():
    for sizes in itertools.product(*by.values()):
      add(other(dict(zip(by, sizes))), (target,))
  return found


def _at(sizes: Any, layer: int) -> set[int]:
  return set().union(sizes.get(None, ()), sizes.get(layer, ())) if sizes else set()


def _cut(supernet: Supernet, sizes: Mapping[str, Any]) -> list[str]:
  """Axes of the parameters that some member has shorter than the largest."""
  full = _lengths(supernet.axes["params"], supernet.shapes["params"])
  return [axis for axis in sizes if axis in full and any(
    min(_at(sizes[axis], layer), default=length) < length for layer, length in enumerate(full[axis]))]


def _inside(axes: Any) -> set[str]:
  """Axes that are inside the layers of their stack alone, so that each layer has units of its own."""
  inside, outside = set(), set()
  for _, names, first in named_leaves(axes):
    for axis in flat(names.names):
      depth = depth_of(axis)
      (inside if depth in names.names or depth in first else outside).add(axis)
  return {axis for axis in inside - outside if not is_depth(axis)}


def _lengths(axes: Any, weights: Any) -> dict[str, list[int]]:
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


def _activations(step: Step, state: TrainState, batches: Any, count: int) -> Any:
  """Mean absolute inputs of every kernel, by the place of its module, then by axis."""
  kernels = {path[:-1]: [n for n in names.names if n in names.contracted]
             for path, names, _ in named_leaves(step.supernet.axes["params"]) if path[-1] == "kernel"}

  def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    names = kernels.get(context.module.path, ())
    if context.method_name == "__call__":
      for i, name in enumerate(names):
        # The contracted dimensions of a kernel are the trailing ones of its input.
        kept = args[0].ndim - len(names) + i
        value = jnp.abs(args[0].astype(jnp.float32)).mean([d for d in range(args[0].ndim) if d != kept])
        context.module.sow(SEEN, name, value, init_fn=lambda: 0.0, reduce_fn=lambda _, new: new)
    return call(*args, **kwargs)

  @jax.jit
  def run(trained, fixed, batch):
    variables = {"params": trained["model"], **fixed}
    with nn.intercept_methods(record):
      apply = lambda inputs: step.supernet.model.apply(variables, inputs, mutable=[SEEN])[1][SEEN]
      return step.recipe.objective.forward(apply, batch)

  start = int(state.step)
  seen = [run(state.trained, state.fixed, put_batch(batches[start + i], step.mesh)) for i in range(count)]
  return {"model": jax.tree.map(lambda *x: sum(x) / len(x), *seen)}


def _outputs(step: Step, state: TrainState) -> jax.Array:
  """What the largest network computes of noise."""
  supernet, key = step.supernet, jax.random.key(0)
  module = supernet.module(supernet.space.largest)
  module = module.clone(dtype=jnp.float32) if hasattr(module, "dtype") else module
  draw = lambda i, x: (jax.random.normal(jax.random.fold_in(key, i), (8, *x.shape[1:]), x.dtype)
                       if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.ones((8, *x.shape[1:]), x.dtype))

  @jax.jit
  def run(trained, fixed):
    inputs = [draw(i, x) for i, x in enumerate(supernet.inputs)]
    variables = execution.member(supernet, step.recipe.objective, step.axes["objective"], trained, fixed,
                                 supernet.space.largest)
    outputs = module.apply(variables, *inputs)
    return outputs["logits"] if "logits" in outputs else outputs["features"]

  # Sums in another order differ by rounding alone.
  with jax.default_matmul_precision("float32"):
    return run(state.trained, state.fixed)
