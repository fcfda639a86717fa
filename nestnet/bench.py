"""What nesting costs: steps of slices and of one program for all against stand-alone networks.

All networks learn from the data alone (labels by `classification`, text by `language_modelling`) with the
config's optimizer; what a recipe's students learn of a teacher is added in the sandwich step alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestnet import cost, evaluation
from nestnet.bench_bed import Bed, stepper, with_sampler
from nestnet.errors import UserError, one_of
from nestnet.one_program import OneProgram
from nestnet.sampling import Sampler, Term, sampler
from nestnet.space import Space
from nestnet.steps import Step, TrainState
from nestnet.subnet import Subnet
from nestnet.timing import Call, compilations, hardware, matmul_peak, median_ms, ratio

SANDWICHES = 3
PEERS = ("torch",)


def bench(config: Mapping[str, Any], batch_size: int = 0, pairs: int = 20, only: Sequence[str] = (),
          peer: str = "", say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
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
    peer: `"torch"`: also against eager PyTorch (`nestnet.peers.torch_peer`).
    say: Called with a line about what is measured next.

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
  bed = Bed(config, batch_size, pairs, say)
  if not OneProgram(bed.run.supernet).possible and not only:
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
    bed.say(f"slice: {member}")
    found = ratio(trainer.of(Term((member,))), base, bed.pairs)
    rows.append(_row(bed, member) | dataclasses.asdict(found) | {
      "update_ms": update, "own_update_ms": median_ms(_updater(bed.alone(member), bed.state(member)))})
  names = [str(member) for member in bed.listed]
  together = sampler("joint", bed.run.supernet.space, members=names)
  joint = stepper(with_sampler(bed.run.step, together, "slice"), bed.state(), bed.batch)
  found = ratio(joint, list(bases.values()), bed.pairs)
  return {"members": rows, "joint": {"members": names, **dataclasses.asdict(found)}}


def one_program(bed: Bed) -> list[dict[str, Any]]:
  """Members over the range of cost, each by the one program, against the faster network alone."""
  trainer, rows = bed.trainer("one_program"), []
  for member in bed.spread:
    bed.say(f"one program: {member}")
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
  for number, terms in enumerate(sandwiches(bed.run.supernet.space), 1):
    bed.say(f"sandwich: draw {number} of {SANDWICHES}")
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
    bed.say(f"compilation: {execution}")
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
  bed.say("memory")
  largest, found = bed.run.supernet.space.largest, {}
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), bed.batch)
  for execution in ("slice", "one_program"):
    def measure(program, *arguments, execution=execution):
      lowered = program.lower(*arguments)
      if program.kind == "gradient":
        plan = lowered.compile().memory_analysis()
        found[execution] = (plan.argument_size_in_bytes + plan.output_size_in_bytes
                            + plan.temp_size_in_bytes - plan.alias_size_in_bytes)
      return lowered.out_info

    step = with_sampler(bed.run.step, Sampler(lambda number: ()), execution)
    step.programs((Term((largest,)),), batch, measure)
  return {"member": str(largest)} | found


def utilisation(bed: Bed) -> dict[str, Any]:
  """FLOPs a second of the largest member's step, against those of a large matrix product.

  FLOPs of its forward pass and derivative; what is computed twice counts once.
  """
  bed.say("utilisation")
  supernet = bed.run.supernet
  model, largest = supernet.model, supernet.space.largest
  if hasattr(model, "remat"):
    model = model.clone(remat=False)
  flops = cost.flops(model, *supernet.inputs_of(largest), train=True) * bed.batch_size
  dtype = jnp.dtype(getattr(model, "dtype", None) or jnp.float32)
  took = {"alone": median_ms(bed.faster(largest))}
  if OneProgram(supernet).possible:
    took["one_program"] = median_ms(bed.trainer("one_program").of(Term((largest,))))
  peak = matmul_peak(dtype) * bed.run.step.mesh.size
  return {"member": str(largest), "dtype": dtype.name, "peak_flops": peak, "step_flops": flops} | {
    name: {"ms": ms, "flops": 1e3 * flops / ms, "share": 1e3 * flops / ms / peak}
    for name, ms in took.items()}


def compare_peer(bed: Bed, peer: Any) -> dict[str, Any]:
  """One program against the peer's step: smallest, middle and largest member, and sandwich steps."""
  trainer, rows = bed.trainer("one_program"), []
  peer.choose_threads()
  few = dict.fromkeys(bed.spread[i] for i in (0, len(bed.spread) // 2, -1))
  steps = [(Term((member,)),) for member in few] + sandwiches(bed.run.supernet.space)[:1]
  for number, terms in enumerate(steps, 1):
    bed.say(f"peer: step {number} of {len(steps)}")
    found = ratio(trainer.of(*terms), functools.partial(peer.step, terms), bed.pairs)
    rows.append({"members": [str(t.candidates[0]) for t in terms]} | dataclasses.asdict(found))
  return {"name": peer.name, "steps": rows}


def _peer(name: str) -> Callable[..., Any]:
  if name not in PEERS:
    raise one_of("peer", name, PEERS)
  try:
    from nestnet.peers.torch_peer import Peer
  except ModuleNotFoundError as error:
    if error.name != "torch":
      raise
    raise UserError("--peer=torch needs PyTorch, which is not here: pip install torch==2.13.0") from None
  return Peer


PARTS: dict[str, Callable[[Bed], Any]] = {
  "slices": slices, "one_program": one_program, "sandwich": sandwich, "compilation": compilation,
  "memory": memory, "utilisation": utilisation}


def verdicts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What was found beside the bars that it should stay under."""
  rows: list[tuple[str, float, float]] = []
  if "slices" in found:
    part = found["slices"]
    rows += [("slice / stand-alone, highest median", max(row["median"] for row in part["members"]), 1.05),
             ("joint / sum, median", part["joint"]["median"], 1.05)]
  if "one_program" in found:
    # Which way to train alone is the faster, the pairs say best.
    medians = [max(row["against"].values()) for row in found["one_program"]]
    rows += [(f"one program / stand-alone, median of {len(medians)}", float(np.median(medians)), 1.15),
             ("one program / stand-alone, highest", max(medians), 1.3)]
  if "sandwich" in found:
    rows.append(("sandwich / sum, highest", max(row["median"] for row in found["sandwich"]), 1.1))
  if "memory" in found:
    rows.append(("peak memory, one program / slice",
                 found["memory"]["one_program"] / found["memory"]["slice"], 1.2))
  return [dict(zip(("what", "value", "bar"), row)) for row in rows]


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
