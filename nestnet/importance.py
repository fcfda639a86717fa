"""The order of units by importance, given to a network or a train state: the same function, other prefixes.

A smaller member keeps leading units, so that the important ones should lead. Once-for-All sorts the
channels of the trained network before the first widths open (1908.09791, section 3.3), Minitron what it
cuts from a language model (2407.14679, section 2.2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from nestnet import execution
from nestnet.activations import activations, influence
from nestnet.axes import statistics_axes, variable_axes
from nestnet.errors import UserError, one_of
from nestnet.execution import Supernet, sizes_of
from nestnet.ordering import lengths_of, orders, sizes_at
from nestnet.permuting import Order, permutation, permute
from nestnet.sharding import put_batch
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet, depth_of, is_depth, kept_ids
from nestnet.training import Border

BY = ("l1", "l2", "activation")
KEEP = ("supported", "nothing")
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Sort:
  """A transition that sorts units by importance: `enter={"name": "nestnet.importance:Sort", "by": "l2"}`.

  Axes inside a stack have an order in each layer; others, such as the residual stream, one for all that
  read and write them. The largest network computes the same before and after, which is checked.

  Attributes:
    by: What is summed for a unit, over all that read it: `"l1"`: absolute weights (Once-for-All's
      choice); `"l2"`: squared weights; `"activation"`: the unit's mean size on training batches (Minitron's;
      `nestnet.activations.activations`).
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
        network computes: the model then has a name for two spaces, or two names for one (see `orders`).
    """
    # The state is still that of the phase before.
    step = border.before or border.after
    trained = sizes_trained(border.before) if border.before and self.keep == "supported" else {}
    axes = self.axes or _cut(step.supernet, sizes_trained(border.after))
    seen = _activations(step, state, border.batches, self.batches) if self.by == "activation" else None
    model, groups = step.supernet.model, step.supernet.space.groups
    make = lambda weights, seen: orders(model, step.axes, weights, axes, self.by, trained, seen, groups)
    found = jax.jit(make)(step.weights(state), seen)
    sorted_ = permuted(step, state, found)
    _check_same(_outputs(step, state), _outputs(step, sorted_), found)
    return sorted_


def sorted_variables(model: nn.Module, variables: Mapping[str, Any], axes: Iterable[str],
                     batches: Sequence[Any], by: str = "activation",
                     groups: Mapping[str, int] | None = None) -> dict[str, Any]:
  """The variables of a network with the most important units of some axes first; it computes the same.

  What is imported can be cut then: `take` keeps leading units.

  Args:
    model: The network.
    variables: Its variables.
    axes: Axes of its parameters. Of a `Decoder`: `kv_heads`, groups of heads; `queries`, the heads of each
      group by themselves; `mlp`, `embed`.
    batches: Arguments of the network, at least one: arrays of images or tokens.
    by: As in `Sort`.
    groups: As in `Space.groups`.

  Raises:
    ValueError: As `Sort`.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16)
    >>> tokens = jnp.ones((1, 4), int)
    >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
    >>> same = sorted_variables(model, variables, ("mlp", "queries"), [tokens])
    >>> jax.tree.structure(same) == jax.tree.structure(nn.unbox(variables))
    True
  """
  if by not in BY:
    raise one_of("by of the order", by, BY)
  if not len(batches):
    raise UserError("no batches to sort by; allowed is at least one")
  variables, names = meta.unbox(dict(variables)), variable_axes(model, batches[0])
  seen = activations(model, names["params"], variables, batches) if by == "activation" else None
  axes = tuple(axes)

  @jax.jit
  def moved(variables, seen):
    found = orders(model, names["params"], variables["params"], axes, by, None, seen, groups)
    named = {c: names[c] if c in names else statistics_axes(names["params"], tree)
             for c, tree in variables.items()}
    return {c: jax.tree.map(lambda move, x: move(x), permutation(named[c], found), tree)
            for c, tree in variables.items()}

  other = moved(variables, seen)
  run = jax.jit(lambda variables: _scores_of(_exact(model).apply(variables, batches[0])))
  with jax.default_matmul_precision("float32"):
    _check_same(run(variables), run(other), axes)
  return other


def rank_layers(influence: Sequence[float], layers: int) -> tuple[int, ...]:
  """The ids of the layers to keep, those that change most of what they are given.

  Layers stand in the order in which they were trained, so that importance gives a member explicit ids and
  not another order. The members that it gives for several depths are nested.

  Args:
    influence: Of each layer, as from `nestnet.activations.influence`.
    layers: How many to keep.

  Raises:
    ValueError: There are not so many.

  Example:
    >>> Subnet(layers=rank_layers([0.5, 0.1, 0.2, 0.3], 3))
    Subnet('layers=0+2+3')
  """
  if not 1 <= layers <= len(influence):
    raise UserError(f"layers={layers} to keep; allowed are 1 to {len(influence)}")
  order = np.argsort(-np.asarray(influence, np.float64), kind="stable")
  return tuple(sorted(order[:layers].tolist()))


def with_ranked_layers(step: Step, state: TrainState, subnets: Iterable[Subnet], batches: Any, count: int = 8
                       ) -> list[Subnet]:
  """Members of a family that keep, instead of so many leading layers, as many that change most.

  Args:
    step: Whose state it is.
    state: The state.
    subnets: Members; those whose layers are not the first ones stay as they are.
    batches: The run's batches, by the number of a step.
    count: How many batches the layers are watched on.

  Raises:
    ValueError: The network has no axis `layers`, or as `influence`.
  """
  subnets, whole = list(subnets), step.supernet.space.largest.chosen.get("layers")
  if whole is None:
    raise UserError(f"{type(step.supernet.model).__name__}: its members differ along "
                    f"{', '.join(step.supernet.space.axes)}; allowed for layers to be ranked is an axis layers")
  cut = [isinstance(layers := m.chosen.get("layers"), int) and layers != whole for m in subnets]
  if not any(cut):
    return subnets
  variables, seen = _watched(step, state, batches, count)
  found = influence(step.supernet.model, variables, seen, step.recipe.objective.forward)
  return [Subnet(**m.chosen | {"layers": rank_layers(found, m.chosen["layers"])}) if is_cut else m
          for m, is_cut in zip(subnets, cut)]


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


def sorted_for(step: Step, state: TrainState, subnets: Iterable[Subnet], batches: Any, by: str = "activation",
               count: int = 8) -> TrainState:
  """A train state whose most important units lead, along all axes that some of the members are cut along.

  Slices of a network that was trained as a whole are better so. Members that were trained by themselves are
  others then.

  Args:
    step: Whose state it is.
    state: The state.
    subnets: Members of the family.
    batches: The run's batches, by the number of a step.
    by: As in `Sort`.
    count: How many batches, for `"activation"`.

  Raises:
    ValueError: As `Sort`, or some of the axes cannot be sorted.
  """
  axes = _cut(step.supernet, sizes_among(step.supernet, subnets))
  sort = Sort(by, axes, "nothing", count)
  # Without axes `Sort` would take those that training cuts.
  return sort(state, Border(None, step, batches)) if axes else state


def sizes_among(supernet: Supernet, subnets: Iterable[Subnet]) -> dict[str, Any]:
  """How long some members of a family have the axes: as from `sizes_trained`."""
  found: dict[str, Any] = {}
  for subnet in subnets:
    _add(found, supernet.model, subnet)
  return found


def sizes_trained(step: Step) -> dict[str, Any]:
  """How long members that a step trains have the axes: a set of sizes, or one for each layer.

  A sampler with a fixed list trains that; of any other all combinations of sizes count, coupled or not.
  """
  supernet, sampler = step.supernet, step.recipe.sampler
  model, space = supernet.model, supernet.space
  if sampler.fixed:
    candidates = [member for term in sampler.terms(0) for member in term.candidates]
    return sizes_among(supernet, itertools.chain(*(m if isinstance(m, tuple) else (m,) for m in candidates)))
  full = space.largest
  found = sizes_among(supernet, [full])
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
      _add(found, model, other(dict(zip(by, sizes))), (target,))
  return found


def _add(found: dict[str, Any], model: nn.Module, member: Subnet, only: Iterable[str] = ()) -> None:
  """Adds how long a member has the axes, or some of them."""
  for axis, size in sizes_of(model, member).chosen.items():
    if is_depth(axis) or (only and axis not in only):
      continue
    if isinstance(size, int):
      found.setdefault(axis, {}).setdefault(None, set()).add(size)
    for layer, own in zip(kept_ids(member.chosen.get(depth_of(axis), len(size))), size) if isinstance(
        size, tuple) else ():
      found.setdefault(axis, {}).setdefault(layer, set()).add(own)


def _cut(supernet: Supernet, sizes: Mapping[str, Any]) -> list[str]:
  """Axes of the parameters that some member has shorter than the largest."""
  full = lengths_of(supernet.axes["params"], supernet.shapes["params"])
  return [axis for axis in sizes if axis in full and any(
    min(sizes_at(sizes[axis], layer), default=length) < length for layer, length in enumerate(full[axis]))]


def _activations(step: Step, state: TrainState, batches: Any, count: int) -> Any:
  """How large the inputs of every kernel are on the next batches of training."""
  supernet, (variables, seen) = step.supernet, _watched(step, state, batches, count)
  return {"model": activations(supernet.model, supernet.axes["params"], variables, seen,
                               step.recipe.objective.forward)}


def _watched(step: Step, state: TrainState, batches: Any, count: int) -> tuple[dict[str, Any], Iterable[Any]]:
  """The variables of the whole network, and the next batches of its training."""
  start = int(state.step)
  return ({"params": step.weights(state)["model"], **state.fixed},
          (put_batch(batches[start + i], step.mesh) for i in range(count)))


def _check_same(before: jax.Array, after: jax.Array, axes: Iterable[str]) -> None:
  before, after = (np.asarray(x, np.float32) for x in (before, after))
  if not np.abs(before - after).max() <= TOLERANCE * np.ptp(before):
    raise UserError(f"the units of {', '.join(axes)} in another order change what the largest network "
                    f"computes by {np.abs(before - after).max():.3g}; allowed are axes whose units stand "
                    "for themselves (option `axes`)")


def _exact(module: nn.Module) -> nn.Module:
  """The same in float32: sums in another order differ by rounding alone."""
  return module.clone(dtype=jnp.float32) if hasattr(module, "dtype") else module


def _scores_of(outputs: Mapping[str, jax.Array]) -> jax.Array:
  return outputs["logits"] if "logits" in outputs else outputs["features"]


def _outputs(step: Step, state: TrainState) -> jax.Array:
  """What the largest network computes of noise."""
  supernet, key = step.supernet, jax.random.key(0)
  module = _exact(supernet.module(supernet.space.largest))
  # Of tokens that are all the same, attention would make the same in any order.
  tokens = getattr(module, "vocab", 2)

  def draw(i, x):
    own, shape = jax.random.fold_in(key, i), (8, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jnp.inexact):
      return jax.random.normal(own, shape, x.dtype)
    return jax.random.randint(own, shape, 0, tokens, x.dtype)

  @jax.jit
  def run(trained, fixed):
    inputs = [draw(i, x) for i, x in enumerate(supernet.inputs)]
    variables = execution.member(supernet, step.recipe.objective, step.axes["objective"], trained, fixed,
                                 supernet.space.largest)
    return _scores_of(module.apply(variables, *inputs))

  with jax.default_matmul_precision("float32"):
    return run(step.weights(state), state.fixed)
