"""What training takes on a TPU slice that is not here: memory, collectives, time at best.

The step's own programs are compiled by the real TPU compiler, in a process of their own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nestnet import build, report, tpus
from nestnet.dryrun import Say, compile_config, label
from nestnet.errors import Failure, UserError
from nestnet.files import atomic_write

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
_MEMORY = ("arguments", "outputs", "aliased", "temporaries", "program", "beside", "total")
_TIMES = ("compute", "memory", "network")


def plan(config: Mapping[str, Any], topology: str, mesh: str = "", subnets: Sequence[str] = (),
         say: Say = lambda line: None) -> dict[str, Any]:
  """Plans the training of a config on a TPU slice.

  Args:
    config: As `build.build` takes it. Its data set is not read where it states `data.shape` and
      `data.classes`.
    topology: The slice, such as `v5e:4x4`.
    mesh: Sizes of the mesh's axes, such as `data:8,model:2`; the config's by default.
    subnets: Members to plan beside those that the first step trains.
    say: Called with a line about each program that was compiled.

  Returns:
    What `dryrun.compile_config` finds, and `versions`.

  Raises:
    ValueError: An unknown topology, a mesh that is not of its size, a config that does not go together,
      or the TPU compiler is not installed.
    Failure: The compiling process ended.
  """
  where = tpus.topology(topology)
  config = build.plain(config)
  config["mesh"] = mesh_sizes(mesh, where) if mesh else config.get("mesh", {})
  check_mesh(config["mesh"], where)
  tpus.check_compiler()
  return _compiled_elsewhere({"config": config, "topology": topology, "subnets": list(subnets)}, say)


def mesh_sizes(text: str, where: tpus.Topology) -> dict[str, int]:
  """The axes of a mesh from text.

  Raises:
    ValueError: The text is not `axis:size` joined by commas.

  Example:
    >>> mesh_sizes("data:8,model:2", tpus.topology("v5e:4x4"))
    {'data': 8, 'model': 2}
  """
  sizes = {}
  for part in text.split(","):
    match = re.fullmatch(r"\s*(\w+)\s*[:=]\s*(-1|[1-9]\d*)\s*", part)
    if not match or match[1] in sizes:
      raise UserError(f"mesh: got {text!r}, allowed is axis:size joined by ',', each axis once, such as "
                      f"data:{where.chips}")
    sizes[match[1]] = int(match[2])
  return sizes


def check_mesh(sizes: Mapping[str, int], where: tpus.Topology) -> None:
  """Raises `ValueError` unless a mesh is laid over all chips of a slice."""
  given = math.prod(size for size in sizes.values() if size != -1)
  rest = list(sizes.values()).count(-1)
  if rest > 1 or (where.chips % given if rest else given != where.chips):
    shown = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
    raise UserError(
      f"mesh {shown}: {given} chips{', times what is left' * bool(rest)}; {where.name} has {where.chips}. "
      f"Allowed are sizes whose product is {where.chips}; -1 in one place stands for what is left")


def _compiled_elsewhere(request: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
  """Has a process of its own compile: JAX in this one may hold other devices."""
  with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
      [sys.executable, "-m", "nestnet.plan"], env=os.environ | _ENVIRONMENT, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=errors, text=True) as process:
    try:
      process.stdin.write(json.dumps(request))
      process.stdin.close()
      for line in process.stdout:
        ((kind, answer),) = json.loads(line).items()
        if kind == "found":
          return answer
        if kind != "said":
          raise {"mistake": UserError, "failure": Failure}[kind](answer)
        say(answer)
      process.wait()
    finally:
      process.terminate()
    errors.seek(0)
    raise Failure(f"the compiling process ended with exit code {process.returncode}; what it said last:\n"
                  f"{errors.read()[-3000:].strip()}")


def _serve() -> None:
  """Reads a request from standard input and answers it in lines of JSON."""
  # Whatever else writes to standard output must not come between.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def answer(kind: str, content: Any) -> None:
    print(json.dumps({kind: content}), file=answers, flush=True)

  request = json.load(sys.stdin)
  try:
    where = tpus.topology(request["topology"])
    found = compile_config(request["config"], where, tpus.devices(where), request["subnets"],
                           functools.partial(answer, "said"))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    answer("found", found | {"versions": versions})
  except UserError as error:
    answer("mistake", str(error))
  except Failure as error:
    answer("failure", str(error))


def fits(found: Mapping[str, Any]) -> bool:
  """Whether every program fits into a chip's memory."""
  return all(row["fits"] for row in found["programs"])


def table(found: Mapping[str, Any]) -> str:
  """What `plan` found, as text for the terminal."""
  rows = found["programs"]
  several = len({row["phase"] for row in rows}) > 1
  names = [f"phase {row['phase']}: " * several + label(row["kind"], row["subnets"], row["taught"])
           for row in rows]
  mesh = ",".join(f"{axis}:{size}" for axis, size in found["mesh"].items() if size > 1) or "data:1"
  versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
  parts = [
    f"{found['name']} on {found['topology']}: {found['chips']} chips, mesh {mesh}, batch "
    f"{found['batch_size']}; {versions}",
    _memory_table(found, names), _collective_table(rows, names), _time_table(rows, names),
    _subnet_table(found["subnets"], found.get("example", "image"))]
  return "\n\n".join(parts)


def _memory_table(found: Mapping[str, Any], names: Sequence[str]) -> str:
  """Bytes on a chip by kind, and whether they fit."""
  lines = [("memory of a chip, MiB", *_MEMORY, f"fits {found['hbm'] / 2**20:.0f}")]
  notes = []
  for name, row in zip(names, found["programs"]):
    cells = [f"{row['memory'][kind] / 2**20:.1f}" if kind in row["memory"] else "?" for kind in _MEMORY]
    if row["refused"]:
      cells[-1] = f"> {found['hbm'] / 2**20:.0f}"
      notes.append(f"{name}: {row['refused']}")
    lines.append((name, *cells, "yes" if row["fits"] else "NO"))
  notes.append("beside: what the step holds on the chip and this program is not given")
  return "\n".join([report.aligned(lines), *notes])


def _collective_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
  """Collectives that a chip takes part in, loops counted as often as they run."""
  lines, unknown = [("collectives of a run", "kind", "count", "bytes each", "bytes in all", "chips")], 0
  for name, row in zip(names, rows):
    for found in row.get("collectives", ()):
      lines.append((name, found["kind"], str(found["count"]), report.human(found["bytes"]),
                    report.human(found["count"] * found["bytes"]), str(found["devices"])))
      name = ""
    unknown += row.get("unknown_loops", 0)
  if len(lines) == 1:
    lines.append(("none", *[""] * 5))
  note = [f"{unknown} loops of unknown length: their bodies count once"] * bool(unknown)
  return "\n".join([report.aligned(lines), *note])


def _time_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
  """Bounds from below on the time of a run, by resource."""
  lines = [("time at best, ms", "FLOPs", "HBM bytes", *_TIMES, "bound by", "runs a step")]
  total, refused = 0.0, False
  for name, row in zip(names, rows):
    refused |= bool(row["refused"])
    if row["refused"]:
      lines.append((name, report.human(row["flops"]), *["?"] * 5, str(row["runs"])))
      continue
    lines.append((name, report.human(row["flops"]), report.human(row["traffic"]),
                  *(f"{1e3 * row['seconds'][kind]:.3f}" for kind in _TIMES), row["bound"],
                  str(row["runs"])))
    total += row["runs"] * max(row["seconds"].values())
  whole = "" if refused else (
    f"one step at best {1e3 * total:.3f} ms: each program at its bound, one after the other")
  return "\n".join([report.aligned(lines), *[whole] * bool(whole)])


def _subnet_table(members: Sequence[Mapping[str, Any]], example: str) -> str:
  """What the sub-networks cost."""
  article = "an" if example[0] in "aeiou" else "a"
  lines = [("sub-network", "params", f"FLOPs of {article} {example}", "training FLOPs of a chip and batch")]
  return report.aligned(lines + [(m["subnet"], report.human(m["params"]), report.human(m["flops"]),
                                  report.human(m["train_flops"])) for m in members])


def write(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
  """Replaces a JSON file of what `plan` found."""
  atomic_write(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  _serve()
