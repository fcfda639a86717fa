"""The programs of a step, compiled for devices that need not be here, and what each takes on a chip.

FLOPs are counted from the jaxpr (`nestnet.cost`) and taken to be spread evenly over the chips; bytes
of main memory and collectives are read from the optimized HLO (`nestnet.hlo`). Times are bounds from
below: the peak rates of `nestnet.tpus`, each resource busy all the time and beside the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nestnet import build, cost, evaluation, hlo, tpus
from nestnet.evaluators import TASKS
from nestnet.sampling import Term
from nestnet.gradients import Program
from nestnet.steps import Step

Say = Callable[[str], None]


def compile_config(config: Mapping[str, Any], where: tpus.Topology, devices: Sequence[Any],
                   subnets: Sequence[str] = (), say: Say = lambda line: None) -> dict[str, Any]:
  """Compiles the training of a config.

  Args:
    config: As `build.build` takes it.
    where: The slice of which `devices` are the chips.
    devices: What to compile for.
    subnets: Members to plan beside those that the first step trains.
    say: Called with a line about each program.

  Returns:
    `name`, `topology`, `chips`, `hbm` (bytes a chip), `example` (what one input is called), `mesh`,
    `batch_size`, `programs` (what `compile_step` returns for each phase) and `subnets` (`subnet`, `params`,
    `flops` of an input forward, `train_flops` of a chip for its share of a batch).
  """
  phases, batch = build.planned(config, devices)
  size, programs, members = config["train"]["batch_size"], [], {}
  for number, phase in enumerate(phases, 1):
    rows = compile_step(phase.step, batch, where, subnets, say)
    programs += [{"phase": number} | row for row in rows]
    members |= {name: phase.step.supernet for row in rows for name in row["subnets"]}
  return {
    "name": ", ".join(config[group].get("name", "") for group in ("data", "model", "recipe")),
    "topology": where.name, "chips": where.chips, "hbm": where.chip.hbm,
    # Where only crops are read, they are of images.
    "example": next((task.example for task in TASKS.values() if task.reads in batch), "image"),
    "mesh": dict(phases[0].step.mesh.shape), "batch_size": size, "programs": programs,
    "subnets": [_member(supernet, name, size / where.chips) for name, supernet in members.items()]}


def _member(supernet: Any, name: str, inputs: float) -> dict[str, Any]:
  subnet = supernet.space.subnet(name)
  train = evaluation.member_flops(supernet)(subnet, True)
  return {"subnet": name, **evaluation.costs(supernet, subnet), "train_flops": train * inputs}


def compile_step(step: Step, batch: Mapping[str, jax.ShapeDtypeStruct], where: tpus.Topology,
                 subnets: Sequence[str] = (), say: Say = lambda line: None) -> list[dict[str, Any]]:
  """Compiles the programs of a step for the devices of its mesh.

  Args:
    step: The step.
    batch: Shapes, dtypes and shardings of its batch.
    where: The slice that the mesh is laid over.
    subnets: Members whose gradient to compile beside those of the first step and the largest.
    say: Called with a line about each program.

  Returns:
    For each program: `kind`, `subnets`, `taught`, `runs` (how often the first step runs it), `memory`
    (bytes on a chip, see `_memory`), `fits`, `flops` (of a chip), `traffic` (bytes of main memory),
    `collectives`, `unknown_loops`, `seconds` (by resource), `bound` (the resource that takes longest),
    `refused` (what the compiler says of a program that does not fit, or None), `compile_seconds`.
  """
  terms, space = step.recipe.sampler.terms(0), step.supernet.space
  drawn = {candidate for term in terms for candidate in term.candidates}
  wanted = dict.fromkeys([space.largest, *map(space.subnet, subnets)])
  # In the role of the last term: members that a sampler draws come after what teaches them.
  more = tuple(Term((s,), 1.0, terms[-1].taught, terms[-1].regularised) for s in wanted if s not in drawn)
  compiler = _Compiler(len(terms), say)
  held = step.programs((*terms, *more), batch, compiler)
  return [_row(entry, held, step.mesh, where) for entry in compiler.entries.values()]


@dataclasses.dataclass
class _Entry:
  """A program, its arguments, what it was compiled to, and how often a step runs it."""

  program: Program
  arguments: tuple[Any, ...]
  compiled: jax.stages.Compiled | None
  refused: str | None
  seconds: float
  runs: int = 0


class _Compiler:
  """Compiles what a step runs, each program once; to be called as `Step.programs` calls `run`."""

  def __init__(self, terms: int, say: Say):
    self.terms, self.say, self.gradients = terms, say, 0
    self.entries: dict[Any, _Entry] = {}
    self.compiled: dict[Any, tuple[Any, ...]] = {}

  def __call__(self, program: Program, *arguments: Any) -> Any:
    call, own = program.call, ()
    if isinstance(call, functools.partial):
      call, own = call.func, call.args
    leaves, tree = jax.tree.flatten((own, arguments))
    key = call, tree, tuple((jnp.shape(x), jnp.result_type(x), getattr(x, "sharding", None)) for x in leaves)
    if key not in self.compiled:
      self.compiled[key] = self._compile(program, call, (*own, *arguments))
    outputs, compiled, refused, seconds = self.compiled[key]
    entry = self.entries.setdefault((key, program.members), _Entry(
      program, arguments, compiled, refused, seconds))
    self.gradients += program.kind == "gradient"
    entry.runs += program.kind != "gradient" or self.gradients <= self.terms
    return outputs

  def _compile(self, program: Program, call: Any, arguments: tuple[Any, ...]):
    began = time.monotonic()
    lowered, compiled, refused = call.lower(*arguments), None, None
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refused = str(error).removeprefix("RESOURCE_EXHAUSTED: ").split("\n")[0]
    seconds = time.monotonic() - began
    what = label(program.kind, program.members, program.taught)
    self.say(f"{what}: {'refused' if refused else 'compiled'} after {seconds:.1f} s")
    shardings = compiled.output_shardings if compiled else jax.tree.map(lambda x: None, lowered.out_info)
    outputs = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                           lowered.out_info, shardings)
    return outputs, compiled, refused, seconds


def label(kind: str, subnets: Sequence[Any], taught: bool = False) -> str:
  """What a program is called.

  Example:
    >>> label("gradient", ["embed=8"], taught=True), label("step", ["embed=8", "embed=16"])
    ('gradient, taught, embed=8', 'step of 2 sub-networks')
  """
  if len(subnets) > 1:
    return f"{kind} of {len(subnets)} sub-networks"
  return ", ".join([kind, *["taught"] * taught, *map(str, subnets)])


def _row(entry: _Entry, held: Any, mesh: jax.sharding.Mesh, where: tpus.Topology) -> dict[str, Any]:
  program, memory = entry.program, _memory(entry, held)
  flops = cost.count_flops(program.computes, *entry.arguments) / mesh.size
  fits = not entry.refused and memory["total"] <= where.chip.hbm
  row = {"kind": program.kind, "subnets": list(map(str, program.members)), "taught": program.taught,
         "runs": entry.runs, "memory": memory, "fits": fits, "flops": flops, "refused": entry.refused,
         "compile_seconds": entry.seconds}
  if entry.refused:
    return row
  work = hlo.work(entry.compiled.as_text())
  # Devices that are not chips of a TPU stand in a row.
  places = [tuple(getattr(device, "coords", (device.id,))) for device in mesh.devices.flat]
  seconds = {
    "compute": flops / where.chip.flops, "memory": work.traffic / where.chip.bandwidth,
    "network": sum(c.count * network_seconds(c, places, where) for c in work.collectives)}
  return row | {
    "traffic": work.traffic, "unknown_loops": work.unknown_loops, "seconds": seconds,
    "bound": max(seconds, key=seconds.get), "collectives": [
      {"kind": c.kind, "count": c.count, "bytes": c.bytes, "devices": len(c.groups[0])}
      for c in work.collectives]}


def _memory(entry: _Entry, held: Any) -> dict[str, int]:
  """Bytes on a chip while a program runs.

  `arguments`, `outputs` and what of these is `aliased`, that is, shares its place; `temporaries` at the
  peak; the `program` itself; what the step holds `beside` it; and the `total`. Of a program that
  the compiler refused only what it is given and what stands beside it is known.
  """
  given = {id(leaf) for leaf in jax.tree.leaves(entry.arguments)}
  beside = _laid_out([leaf for leaf in jax.tree.leaves(held) if id(leaf) not in given])
  if entry.refused:
    arguments = _laid_out([x for x in jax.tree.leaves(entry.arguments) if hasattr(x, "sharding")])
    return {"arguments": arguments, "beside": beside, "total": arguments + beside}
  stats = entry.compiled.memory_analysis()
  arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
  aliased, program = stats.alias_size_in_bytes, stats.generated_code_size_in_bytes
  # XLA's own `temp_size` adds memories other than HBM; its peak does not.
  peak = max(stats.peak_memory_in_bytes, arguments + outputs - aliased)
  return {"arguments": arguments, "outputs": outputs, "aliased": aliased,
          "temporaries": peak - (arguments + outputs - aliased), "program": program, "beside": beside,
          "total": peak + program + beside}


def _laid_out(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
  """Bytes that arrays take on a chip, in the layout that it gives them, padding included."""
  if not leaves:
    return 0
  nothing = jax.jit(lambda *arrays: 0, keep_unused=True)
  return nothing.lower(*leaves).compile().memory_analysis().argument_size_in_bytes


def network_seconds(collective: hlo.Collective, places: Sequence[Sequence[int]], where: tpus.Topology
                    ) -> float:
  """How long one run of a collective takes at least: what a chip must send, at the rate of its links.

  Of an array of `b` bytes over `n` chips that is `b (n - 1) / n` to gather, to scatter and for
  all-to-all, twice that for an all-reduce (a scatter, then a gather), and `b` for a permute.

  Args:
    collective: What runs.
    places: Where the mesh's devices stand in the slice, in the mesh's order.
    where: The slice.

  Example:
    >>> collective = hlo.Collective("all-gather", 10**9, ((0, 1),))
    >>> network_seconds(collective, [(0, 0), (0, 1)], tpus.topology("v5e:4x4"))
    0.011...
  """
  rates = (where.bandwidth([places[i] for i in group]) for group in collective.groups)
  rate = min(filter(None, rates), default=math.inf)
  n = len(collective.groups[0])
  share = 1.0 if collective.kind.startswith("collective") else (n - 1) / n
  return (1 + (collective.kind == "all-reduce")) * share * collective.bytes / rate
