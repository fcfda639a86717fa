"""What nesting costs: steps of slices and of one program for all against stand-alone networks.

All networks learn from labels by `classification` with the config's optimizer; what a recipe's
students learn of a teacher is added in the sandwich step alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestnet import build, cost, evaluation
from nestnet.data import Batches
from nestnet.errors import UserError, one_of
from nestnet.gradients import Gradients
from nestnet.one_program import stacks
from nestnet.recipes import recipe
from nestnet.sampling import FIXED_LIMIT, Sampler, Term, sampler
from nestnet.sharding import put_batch, replicated
from nestnet.space import Space, volume
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet
from nestnet.timing import Call, compilations, hardware, matmul_peak, median_ms, ratio

LEAST_MS = 50.0
MEMBERS = 20
SANDWICHES = 3
PEERS = ("torch",)


class Bed:
  """A config's supernet and a batch, and what several measurements share.

  Args:
    config: As `build.build` takes it.
    batch_size: In images; 0: the config's, doubled until the smallest network's step takes 50 ms.
    pairs: Pairs for each ratio.

  Attributes:
    run: The supernet without its pool, trained on labels alone.
    batch: On the devices.
    listed: The pool from the smallest to the largest; without one, 8 members over the range of cost.
    spread: 20 members over the range of cost, or all where they are fewer.
  """

  def __init__(self, config: Mapping[str, Any], batch_size: int, pairs: int):
    if pairs < 1:
      raise UserError(f"pairs: got {pairs}, allowed is at least 1")
    if batch_size < 0:
      raise UserError(f"batch_size: got {batch_size}, allowed is at least 1; 0 chooses one")
    config = build.plain(config)
    pool = config["space"].pop("pool", None) or () if "space" in config else ()
    self.config = config | {"phases": [], "recipe": recipe("truncate")}
    self.pairs, self.run = pairs, build.build(self.config)
    # Kept on the host: compiling an initialisation takes as long as compiling a step.
    self._initial = jax.device_get(self.run.step.init())
    self._fastest: dict[Subnet, str] = {}
    space = self.run.supernet.space
    self.listed = sorted(map(space.subnet, pool), key=volume) or spread(space, FIXED_LIMIT)
    self.spread = spread(space, MEMBERS)
    self.batch_size = batch_size or self.config["train"]["batch_size"]
    while True:
      self.batch = put_batch(Batches(self.run.dataset, "train", self.batch_size)[0], self.run.step.mesh)
      if batch_size or median_ms(self._stepper(self.listed[0])) >= LEAST_MS:
        break
      self.batch_size *= 2

  @functools.cached_property
  def variants(self) -> tuple[str, ...]:
    """How a stand-alone network may be compiled; the model's own choice first."""
    if not hasattr(self.run.supernet.model, "remat"):
      return ("plain",)
    return ("remat", "plain") if self.run.supernet.model.remat else ("plain", "remat")

  def state(self, member: Subnet | None = None) -> TrainState:
    """A fresh state of the supernet; or of a member that stands alone and begins as it is there."""
    state = self._initial
    if member is not None:
      variables, step = self.run.step.member(state, member), self.alone(member)
      trained = {"model": variables.pop("params"), "objective": state.trained["objective"]}
      state = state.replace(trained=trained, fixed=variables, opt_state=jax.jit(step.tx.init)(trained))
    # A step's state is donated.
    return jax.device_put(state, replicated(self.run.step.mesh), may_alias=False)

  @functools.cache
  def alone(self, member: Subnet, variant: str = "") -> Step:
    """The step of a network of this size that stands alone."""
    variant = variant or self.variants[0]
    remat = {"remat": variant == "remat"} if len(self.variants) > 1 else {}
    return build.build(self.config | {"recipe": recipe("separate", subnet=str(member)),
                                      "model": self.config["model"] | remat}).step

  def base(self, member: Subnet, variant: str = "") -> Call:
    """A call that makes a step of the network alone."""
    return stepper(self.alone(member, variant), self.state(member), self.batch)

  def bases(self, member: Subnet) -> dict[str, Call]:
    """Steps of the network alone in each variant, that which takes the least time first."""
    steps = {v: self.base(member, v) for v in self.variants}
    took = {v: median_ms(step) for v, step in steps.items()}
    steps = {v: steps[v] for v in sorted(steps, key=took.get)}
    self._fastest[member] = next(iter(steps))
    return steps

  def faster(self, member: Subnet) -> Call:
    """A step of the network alone, in the variant that takes the least time."""
    if member not in self._fastest:
      return next(iter(self.bases(member).values()))
    return self.base(member, self._fastest[member])

  @functools.cache
  def trainer(self, execution: str) -> Trainer:
    """The supernet, executed in one way or the other; measurements share its compiled programs."""
    return self.fresh_trainer(execution)

  def fresh_trainer(self, execution: str) -> Trainer:
    """The same, with nothing compiled."""
    return Trainer(self.run.step, self.state(), self.batch, execution)


class Trainer:
  """A step of a supernet that is told each time what to train."""

  def __init__(self, step: Step, state: TrainState, batch: Mapping[str, jax.Array], execution: str):
    self._terms: tuple[Term, ...] = ()
    told = _with(step, Sampler(lambda number: self._terms), execution)
    self._call = stepper(told, state, batch)

  def of(self, *terms: Term) -> Call:
    """A call that makes one step on these terms and waits for its end."""
    def call():
      self._terms = terms
      self._call()
    return call


def _with(step: Step, chosen: Sampler, execution: str) -> Step:
  """A step with another sampler, executed as told."""
  told = dataclasses.replace(step.recipe, sampler=chosen)
  return Step(step.supernet, told, lambda mask: step.tx, step.mesh, execution=execution)


def bench(config: Mapping[str, Any], batch_size: int = 0, pairs: int = 20, only: Sequence[str] = (),
          peer: str = "") -> dict[str, Any]:
  """Measures what is asked for; each ratio over interleaved pairs in this process.

  A slice's step, or a member's in one program, is a gradient program and an update program, as random
  samplers run it. The stand-alone network's is one program. Its recipe does not matter, nor does
  that of the config.

  Args:
    config: As `build.build` takes it.
    batch_size: In images; by default the config's, doubled until the smallest network's step takes
      50 ms.
    pairs: Pairs for each ratio.
    only: Names of `PARTS`; all by default.
    peer: `"torch"`: also against eager PyTorch (`nestnet.peers.torch_vit`).

  Returns:
    `hardware`, `batch_size`, `pairs`, an entry for each part, and `verdicts`: a list of `what`,
    `value` and `bar`.

  Raises:
    ValueError: An unknown part or peer, a model that the peer has not, or PyTorch is missing.
  """
  for name in only:
    if name not in PARTS:
      raise one_of("part of the bench", name, PARTS)
  make_peer = _peer(peer) if peer else None
  bed = Bed(config, batch_size, pairs)
  if not stacks(bed.run.supernet.axes["params"]) and not only:
    only = ("slices", "utilisation")
  against = make_peer(bed.run.supernet, bed.config["optim"], bed.batch) if make_peer else None
  parts = dict(PARTS) | ({"peer": functools.partial(compare_peer, peer=against)} if peer else {})
  found = {"hardware": hardware(), "batch_size": bed.batch_size, "pairs": pairs} | {
    name: part(bed) for name, part in parts.items() if name in (only or PARTS) or name == "peer"}
  return found | {"verdicts": verdicts(found)}


def slices(bed: Bed) -> dict[str, Any]:
  """Each listed member as a slice, and all of them jointly, against stand-alone networks.

  The joint step is one program where the members are at most 8, else a gradient program for each.
  """
  bases = {member: bed.base(member) for member in bed.listed}
  trainer, rows = bed.trainer("slice"), []
  update = median_ms(_updater(bed.run.step, bed.state()))
  for member, base in bases.items():
    found = ratio(trainer.of(Term((member,))), base, bed.pairs)
    rows.append(_row(bed, member) | dataclasses.asdict(found) | {
      "update_ms": update, "own_update_ms": median_ms(_updater(bed.alone(member), bed.state(member)))})
  names = [str(member) for member in bed.listed]
  together = sampler("joint", bed.run.supernet.space, members=names)
  joint = stepper(_with(bed.run.step, together, "slice"), bed.state(), bed.batch)
  found = ratio(joint, list(bases.values()), bed.pairs)
  return {"members": rows, "joint": {"members": names, **dataclasses.asdict(found)}}


def one_program(bed: Bed) -> list[dict[str, Any]]:
  """Members over the range of cost, each by the one program, against the faster network alone."""
  trainer, rows = bed.trainer("one_program"), []
  for member in bed.spread:
    own = trainer.of(Term((member,)))
    (fast, base), *slower = bed.bases(member).items()
    found = ratio(own, base, bed.pairs)
    against = {fast: found.median} | {
      variant: ratio(own, slow, -(-bed.pairs // 4)).median for variant, slow in slower}
    rows.append(_row(bed, member) | dataclasses.asdict(found) | {"against": against})
  return rows


def sandwich(bed: Bed) -> list[dict[str, Any]]:
  """Largest, smallest and two random members, taught in place, in one program, against four steps."""
  trainer, rows = bed.trainer("one_program"), []
  for terms in sandwiches(bed.run.supernet.space):
    members = [term.candidates[0] for term in terms]
    found = ratio(trainer.of(*terms), [bed.faster(member) for member in members], bed.pairs)
    rows.append({"members": list(map(str, members))} | dataclasses.asdict(found))
  return rows


def sandwiches(space: Space) -> list[tuple[Term, ...]]:
  """The terms of the first few steps of the sandwich rule."""
  return [sampler("sandwich", space).terms(step) for step in range(SANDWICHES)]


def compilation(bed: Bed) -> dict[str, dict[str, Any]]:
  """What training the members takes to compile, until each has made a step, by execution."""
  found = {}
  for execution in ("slice", "one_program"):
    trainer = bed.fresh_trainer(execution)
    with compilations() as compiled:
      for member in bed.spread:
        trainer.of(Term((member,)))()
    found[execution] = {"members": len(bed.spread), "programs": len(compiled.programs),
                        "seconds": compiled.seconds}
  return found


def memory(bed: Bed) -> dict[str, Any]:
  """Bytes that the gradient program of the largest member holds at its peak, by execution.

  Arguments, results and temporary buffers, as XLA plans them for a device.
  """
  supernet, step = bed.run.supernet, bed.run.step
  laid = replicated(step.mesh)
  state, largest = step.abstract(), supernet.space.largest
  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=laid)
  operands = (state.trained, state.fixed, state.objective, bed.batch, None, state.step,
              scalar(jax.random.key(0).dtype), scalar(jnp.int32), scalar(jnp.float32),
              {"loss": scalar(jnp.float32), "grads": state.trained})
  found = {"member": str(largest)}
  for execution in ("slice", "one_program"):
    gradients = Gradients(supernet, step.recipe.objective, step.axes, step.mesh, execution == "one_program")
    add = functools.partial(gradients.add, True, False)
    who = () if gradients.one is None else (gradients.one.vector(largest),)
    add = functools.partial(add, largest) if gradients.one is None else add
    plan = jax.jit(add, donate_argnums=len(who) + len(operands) - 1).lower(
      *who, *operands).compile().memory_analysis()
    found[execution] = (plan.argument_size_in_bytes + plan.output_size_in_bytes
                        + plan.temp_size_in_bytes - plan.alias_size_in_bytes)
  return found


def utilisation(bed: Bed) -> dict[str, Any]:
  """FLOPs a second of the largest member's step, against those of a large matrix product.

  FLOPs of its forward pass and derivative; what is computed twice counts once.
  """
  supernet = bed.run.supernet
  model, largest = supernet.model, supernet.space.largest
  if hasattr(model, "remat"):
    model = model.clone(remat=False)
  flops = cost.flops(model, *supernet.inputs, train=True) * bed.batch_size
  dtype = jnp.dtype(getattr(model, "dtype", None) or jnp.float32)
  took = {"alone": median_ms(bed.faster(largest))}
  if stacks(supernet.axes["params"]):
    took["one_program"] = median_ms(bed.trainer("one_program").of(Term((largest,))))
  peak = matmul_peak(dtype) * bed.run.step.mesh.size
  return {"member": str(largest), "dtype": dtype.name, "peak_flops": peak, "step_flops": flops} | {
    name: {"ms": ms, "flops": 1e3 * flops / ms, "share": 1e3 * flops / ms / peak} for name, ms in took.items()}


def compare_peer(bed: Bed, peer: Any) -> dict[str, Any]:
  """One program against the peer's step: smallest, middle and largest member, and sandwich steps."""
  trainer, rows = bed.trainer("one_program"), []
  few = dict.fromkeys(bed.spread[i] for i in (0, len(bed.spread) // 2, -1))
  steps = [(Term((member,)),) for member in few] + sandwiches(bed.run.supernet.space)[:1]
  for terms in steps:
    found = ratio(trainer.of(*terms), functools.partial(peer.step, terms), bed.pairs)
    rows.append({"members": [str(t.candidates[0]) for t in terms]} | dataclasses.asdict(found))
  return {"name": peer.name, "steps": rows}


def _peer(name: str) -> Callable[..., Any]:
  if name not in PEERS:
    raise one_of("peer", name, PEERS)
  try:
    from nestnet.peers import torch_vit
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise UserError("--peer=torch needs PyTorch, which is not here: pip install torch==2.13.0") from None
  return torch_vit.Peer


PARTS: dict[str, Callable[[Bed], Any]] = {
  "slices": slices, "one_program": one_program, "sandwich": sandwich, "compilation": compilation,
  "memory": memory, "utilisation": utilisation}


def verdicts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What was found beside the bars that it should stay under."""
  rows: list[tuple[str, float, float]] = []
  if "slices" in found:
    rows += [("slice / stand-alone, highest median", max(r["median"] for r in found["slices"]["members"]), 1.05),
             ("joint / sum, median", found["slices"]["joint"]["median"], 1.05)]
  if "one_program" in found:
    medians = [row["median"] for row in found["one_program"]]
    rows += [(f"one program / stand-alone, median of {len(medians)}", float(np.median(medians)), 1.15),
             ("one program / stand-alone, highest", max(medians), 1.3)]
  if "sandwich" in found:
    rows.append(("sandwich / sum, highest", max(row["median"] for row in found["sandwich"]), 1.1))
  if "memory" in found:
    rows.append(("peak memory, one program / slice",
                 found["memory"]["one_program"] / found["memory"]["slice"], 1.2))
  return [dict(zip(("what", "value", "bar"), row)) for row in rows]


def spread(space: Space, count: int) -> list[Subnet]:
  """Members at even steps of the logarithm of their volume, the extremes included, in its order.

  Args:
    space: The family; of one too large to list, 2,048 members are drawn to choose from.
    count: How many; all of them, where they are no more.

  Example:
    >>> [str(member) for member in spread(Space(mlp=(1, 2, 3, 5, 6, 7, 8, 64)), 4)]
    ['mlp=1', 'mlp=5', 'mlp=8', 'mlp=64']
  """
  if space.size <= 4096:
    candidates = list(space)
  else:
    drawn = (space.sample(i, by=("members", "choices")[i % 2]) for i in range(2048))
    candidates = sorted({space.smallest, space.largest, *drawn}, key=lambda s: (volume(s), str(s)))
  if len(candidates) <= count:
    return candidates
  logs, chosen = np.log([volume(member) for member in candidates]), []
  for position in range(count):
    wanted = logs[0] + (logs[-1] - logs[0]) * position / (count - 1)
    # As many candidates are left on either side as there are members still to choose.
    low, high = chosen[-1] + 1 if chosen else 0, len(candidates) - count + position
    chosen.append(low + int(np.abs(logs[low:high + 1] - wanted).argmin()))
  return [candidates[i] for i in chosen]


def stepper(step: Step, state: TrainState, batch: Mapping[str, jax.Array]) -> Call:
  """A call that makes one training step and waits for its end; `state` is used up."""
  numbers = itertools.count()

  def call():
    nonlocal state
    state, metrics = step(state, batch, next(numbers))
    jax.block_until_ready((state, metrics))

  return call


def _updater(step: Step, state: TrainState) -> Call:
  """A call that makes the optimizer's update alone."""
  trained, opt_state = state.trained, state.opt_state
  grads = jax.tree.map(np.zeros_like, jax.device_get(trained))

  def update(trained, opt_state, grads):
    updates, opt_state = step.tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  compiled = jax.jit(update, donate_argnums=(0, 1))

  def call():
    nonlocal trained, opt_state
    trained, opt_state = jax.block_until_ready(compiled(trained, opt_state, grads))

  return call


def _row(bed: Bed, member: Subnet) -> dict[str, Any]:
  return {"subnet": str(member), **evaluation.costs(bed.run.supernet, member)}
