"""The gradient of one term of a step: what is compiled for it, and how often.

A sub-network is a program of its own (a slice), or data to one program that serves them all. With
sub-networks of their own on the shards of the batch, each device group runs another one in the same
program, and one reduction adds up their gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec as P

from nestnet import execution
from nestnet.axes import is_axes
from nestnet.errors import UserError, one_of
from nestnet.execution import Runnable, Supernet
from nestnet.objectives.base import Objective, Targets
from nestnet.one_program import OneProgram
from nestnet.sampling import FIXED_LIMIT, Member, Sampler, Term
from nestnet.sharding import gatherer
from nestnet.slicing import used
from nestnet.subnet import Subnet

EXECUTIONS = ("auto", "slice", "one_program")


@dataclasses.dataclass(frozen=True)
class Program:
  """One of the compiled programs that make a step.

  Attributes:
    kind: `"split"` of a batch, `"teacher"`, `"loss"` of a candidate, `"gradient"`, `"update"`, or
      `"step"` for all in one.
    members: The sub-networks that it runs.
    call: The jitted function.
    computes: The same, to be traced: what it computes for these sub-networks.
    taught: Whether they learn from a teacher's outputs.
  """

  kind: str
  members: tuple[Subnet, ...]
  call: Callable[..., Any]
  computes: Callable[..., Any]
  taught: bool = False

  def lower(self, *arguments: Any) -> jax.stages.Lowered:
    """What `call` would compile for these arguments; abstract ones are enough."""
    call, own = self.call, ()
    if isinstance(call, functools.partial):
      call, own = call.func, call.args
    return call.lower(*own, *arguments)


class Gradients:
  """Compiled gradients and losses of the members of a supernet.

  Args:
    supernet: The family.
    objective: What each member minimises.
    axes: Axis names of `{"model": ..., "objective": ...}`.
    mesh: The device mesh.
    as_data: Whether one program serves all members, instead of one for each.
    sums: Where the sums lie, a tree of shardings.
  """

  def __init__(self, supernet: Supernet, objective: Objective, axes: Any, mesh: jax.sharding.Mesh,
               as_data: bool, sums: Any):
    self.supernet, self.objective, self.axes, self.mesh = supernet, objective, axes, mesh
    self._layered = OneProgram(supernet, mesh)
    self.one = self._layered if as_data else None
    self._loss = functools.lru_cache(maxsize=None)(
      lambda regularised, *subnet: jax.jit(functools.partial(self._losses, regularised, *subnet)))
    self._added = functools.lru_cache(maxsize=None)(
      lambda regularised, gives, *subnet: jax.jit(
        functools.partial(self._add, regularised, gives, *subnet), donate_argnames="sums",
        out_shardings=(sums, None, None)))

  @functools.cached_property
  def teacher(self) -> Program:
    """`f(trained, fixed, state, batch, step) -> targets`: what students see of the largest."""
    def teach(trained, fixed, state, batch, step):
      whole, largest = self._whole(trained), self._runnable(self.supernet.space.largest)
      variables = largest.cut({"params": whole["model"], **fixed})
      outputs = execution.forward(self.objective, largest, variables, batch, teaches=True)
      return self.objective.teach(whole["objective"], state, outputs, batch, step)
    return Program("teacher", (self.supernet.space.largest,), jax.jit(teach), teach)

  def loss(self, member: Member, term: Term) -> Program:
    """`f(trained, fixed, state, batch, seen, step, key, index) -> loss`."""
    def losses(who, *operands):
      return self._losses(term.regularised, who, *operands)

    return self._program("loss", member, term.taught, self._loss, losses, term.regularised)

  def gradient(self, member: Member, term: Term, gives: str | None) -> Program:
    """`f(trained, fixed, state, batch, seen, step, key, index, weight, sums) -> (sums, given,
    metrics)`; `sums` is donated."""
    def add(who, *operands):
      return self._add(term.regularised, gives, who, *operands)

    return self._program("gradient", member, term.taught, self._added, add, term.regularised, gives)

  def _program(self, kind, member, taught, compiled, function, *options):
    """The program for a member: `compiled(*options, member)`, or that of all, given its vector."""
    members = member if isinstance(member, tuple) else (member,)
    # What gives is the largest: a program of its own runs it at the cost of the network alone.
    given = len(options) > 1 and options[1] and member == self.supernet.space.largest
    if given or (self.one is None and isinstance(member, Subnet)):
      return Program(kind, members, compiled(*options, member), functools.partial(function, member), taught)

    def computes(*operands):
      """Each member on its share of the batch, cut as one program cuts it."""
      *before, batch, seen = operands[:5]
      count = jax.tree.leaves(batch)[0].shape[0] // len(members)
      share = lambda tree: jax.tree.map(lambda x: x[:count] if x.ndim else x, tree)
      return [function(self._layered.only(m), *before, share(batch), share(seen), *operands[5:])
              for m in members]

    call = functools.partial(compiled(*options), self._vectors(member))
    return Program(kind, members, call, computes, taught)

  def _vectors(self, member):
    if isinstance(member, Subnet):
      return self.one.vector(member)
    first, place = self.one.vector(member[0]), NamedSharding(self.mesh, P("data"))
    shape = len(member), len(first)
    if self.mesh.devices.flat[0] not in jax.devices():
      # A step that is planned for devices that are not here.
      return jax.ShapeDtypeStruct(shape, first.dtype, sharding=place)
    # Asked for the rows of this process's own shards alone.
    rows = lambda index: np.stack([self.one.vector(m) for m in member[index[0]]])[:, index[1]]
    return jax.make_array_from_callback(shape, place, rows)

  def _add(self, regularised: bool, gives: str | None, who: Subnet | Runnable | jax.Array, trained, fixed,
           state, batch, seen, step, key, index, weight, sums):
    """Adds one term's weighted gradient and loss to `sums`; not compiled.

    Args:
      regularised: Whether dropout and drop path are on.
      gives: `"teach"` or `"share"`: the outputs are kept, as that function of the objective leaves them.
      who: A sub-network, or what runs it; or its vector; or `[shards, entries]` vectors, one for each
        data shard.
      trained: `{"model": params, "objective": params}`.
      fixed: The model's other collections.
      state: The objective's untrained state.
      batch: The batch.
      seen: What the teacher gives, or None, and what the first term does.
      step: Number of the step.
      key: The run's key.
      index: Position of the term in the step.
      weight: Of the term.
      sums: `{"loss": ..., "grads": ...}`, and `"touched"` where that is asked for.

    Returns:
      The sums, what is given or None, and the objective's metrics.
    """
    operands = trained, fixed, state, batch, seen, step, key, index

    def gradient(runnable, trained, *rest):
      loss = lambda trained: self._term(runnable, regularised, trained, *rest)
      (value, (outputs, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
      given = self._given(gives, who, outputs, trained, *rest) if gives else None
      return (value, metrics, grads), given

    (loss, metrics, grads), given = self._over(who, gradient, *operands)
    total = {"loss": sums["loss"] + weight * loss, "grads": jax.tree.map(
      lambda s, g: s + weight * g, sums["grads"], grads)}
    if "touched" in sums:
      total["touched"] = jax.tree.map(jnp.logical_or, sums["touched"], self.touched(trained, who))
    return total, given, metrics

  def touched(self, trained: Any, who: Subnet | Runnable | jax.Array) -> Any:
    """Which weights a term uses, a tree of booleans."""
    own = lambda subnet, tree: used(lambda t: execution.objective_part(
      self.supernet, self.axes["objective"], t, subnet), tree)
    who = who.subnet if isinstance(who, Runnable) else who
    if isinstance(who, Subnet):
      of_model = used(lambda t: self.supernet.cut({"params": t}, who)["params"], trained["model"])
      return {"model": of_model, "objective": own(who, trained["objective"])}

    def or_used(marks, vector):
      found = {"model": self.one.used(vector, trained["model"]), "objective": self.one.switch(
        lambda runnable, tree: own(runnable.subnet, tree), vector, trained["objective"])}
      return jax.tree.map(jnp.logical_or, marks, found), None

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), trained)
    return jax.lax.scan(or_used, none, jnp.atleast_2d(who))[0]

  def _losses(self, regularised, who, *operands):
    def loss(runnable, *operands):
      return self._term(runnable, regularised, *operands)[0], None
    return self._over(who, loss, *operands)[0]

  def _over(self, who, run, *operands):
    """`run(runnable, *operands) -> (means over the batch, arrays [batch, ...])` for whom it is asked."""
    if isinstance(who, (Subnet, Runnable)):
      return run(who if isinstance(who, Runnable) else self._runnable(who), *operands)
    if who.ndim == 1:
      return self.one.switch(run, who, *operands)
    return self._per_shard(who, run, *operands)

  def _per_shard(self, vectors, run, trained, fixed, state, batch, seen, step, key, index):
    """Each data shard runs the member of its own vector; no collective stands inside a branch."""
    size = len(jax.tree.leaves(batch)[0])
    laid = lambda tree: jax.tree.map(lambda x: P("data") if x.ndim and len(x) == size else P(), tree)

    def local(vectors, shard, key, trained, fixed, state, batch, seen, step, index):
      key = jax.random.fold_in(key, shard[0])
      means, given = self.one.switch(run, vectors[0], trained, fixed, state, batch, seen, step, key, index)
      return jax.lax.pmean(means, "data"), given

    shards = jnp.arange(len(vectors))
    return jax.shard_map(
      local, mesh=self.mesh, axis_names={"data"}, check_vma=False,
      in_specs=(P("data"), P("data"), P(), P(), P(), P(), laid(batch), laid(seen), P(), P()),
      out_specs=(P(), P("data")),
    )(vectors, shards, key, trained, fixed, state, batch, seen, step, index)

  def _term(self, runnable, regularised, trained, fixed, state, batch, seen, step, key, index):
    rng = jax.random.fold_in(jax.random.fold_in(key, 1 + step), index)
    return execution.term_loss(
      self.supernet, self.objective, self.axes["objective"], runnable, regularised, self._whole(trained),
      fixed, state, Targets(batch, *seen), step, rng)

  def _runnable(self, subnet: Subnet) -> Runnable:
    # Of weights that lie in shares, a layer's are gathered whole, then cut.
    return self.supernet.runnable(subnet) if self.mesh.shape["fsdp"] == 1 else self._layered.only(subnet)

  def _whole(self, trained):
    """What lies in shares, made whole; stacked layers are when their turn comes."""
    if self.mesh.shape["fsdp"] == 1:
      return trained
    leaves, structure = jax.tree.flatten(trained)
    names = jax.tree.leaves(self.axes, is_leaf=is_axes)
    alone = [i for i, a in enumerate(names) if not a.stack]
    gather = gatherer([names[i] for i in alone], [leaves[i] for i in alone], self.mesh)
    for i, leaf in zip(alone, gather([leaves[i] for i in alone])):
      leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)

  def _given(self, gives, who, outputs, trained, fixed, state, batch, seen, step, *rest):
    """What is kept of a sub-network's outputs; in the shapes of the largest's where it is data."""
    own, made = self._whole(trained)["objective"], getattr(self.objective, gives)

    def keep(outputs):
      return made(own, state, jax.lax.stop_gradient(outputs), batch, step)

    given = keep(outputs)
    if isinstance(who, (Subnet, Runnable)):
      return given
    largest = self._runnable(self.supernet.space.largest)

    def whole(*operands):
      every = self._term(largest, False, *operands)[1][0]
      # A member gives no features where data says how many there are.
      return keep({name: every[name] for name in outputs} if isinstance(outputs, Mapping) else every)

    full = jax.eval_shape(whole, trained, fixed, state, batch, seen, step, *rest)
    return jax.tree.map(lambda x, like: jnp.pad(
      x, [(0, n - m) for m, n in zip(x.shape, like.shape)]), given, full)


def as_data(execution: str, supernet: Supernet, sampler: Sampler) -> bool:
  """Whether one program serves all members of a supernet.

  Args:
    execution: `"slice"`, `"one_program"`, or `"auto"`: slices where a recipe trains a fixed list, or
      the members are few and the data shards do not draw for themselves.
    supernet: The family.
    sampler: Which of them train.

  Raises:
    ValueError: An unknown `execution`, or one that the model or the sampler rules out.
  """
  if execution not in EXECUTIONS:
    raise one_of("train.execution", execution, EXECUTIONS)
  one = OneProgram(supernet)
  if execution == "slice" and sampler.shards > 1:
    raise UserError("sub-networks of their own on the data shards must be data to one program: "
                    "train.per_shard_subnets needs train.execution=one_program, or auto")
  if execution == "one_program" or sampler.shards > 1:
    one.check()
    return True
  few = sampler.fixed or (supernet.space.pool and not sampler.whole) or supernet.space.size <= FIXED_LIMIT
  if execution == "slice" or few:
    return False
  if not one.possible:
    logging.warning("One program cannot hold these sub-networks (%s): each new one that is drawn is compiled.",
                    f"{len(one.widths)} combinations of {', '.join(one.outer)}" if one.places else "no stacks")
    return False
  one.check()
  return True
