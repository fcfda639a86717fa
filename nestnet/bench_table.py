"""What `nestnet.bench` found, as text for the terminal and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nestnet import report
from nestnet.files import atomic_write

_RATIO = "ratio [quartiles]"


def write(path: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
  """Replaces a JSON file of what `bench` found."""
  atomic_write(path, json.dumps(found, indent=1) + "\n")


def table(found: Mapping[str, Any]) -> str:
  """A table for each part, and each bar with whether it is met."""
  tables = {"slices": _slices, "one_program": _one_program, "sandwich": _sandwich,
            "compilation": _compilation, "memory": _memory, "utilisation": _utilisation, "peer": _peer}
  blocks = [report.aligned([tuple(map(str, row)) for row in rows(found[part])])
            for part, rows in tables.items() if part in found]
  ends = [f"batch {found['batch_size']}, {found['pairs']} interleaved pairs, {found['hardware']}"]
  for verdict in found["verdicts"]:
    met = "met" if verdict["value"] <= verdict["bar"] else "NOT met"
    ends.append(f"{verdict['what']}: {verdict['value']:.3f}, bar {verdict['bar']}: {met}")
  return "\n\n".join([*blocks, "\n".join(ends)])


def _slices(part: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
  yield "slices", "params", "alone ms", "slice ms", _RATIO, "update ms: alone, slice"
  for row in part["members"]:
    yield (row["subnet"], report.human(row["params"]), *_cells(row),
           f"{row['own_update_ms']:.2f}, {row['update_ms']:.2f}")
  yield f"joint, all {len(part['joint']['members'])}", "", *_cells(part["joint"]), ""


def _one_program(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  yield "one program", "params", "alone ms", "one program ms", _RATIO, "ratio to each way alone"
  for row in rows:
    yield (row["subnet"], report.human(row["params"]), *_cells(row),
           ", ".join(f"{name} {value:.3f}" for name, value in row["against"].items()))


def _sandwich(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  yield "sandwich, besides largest and smallest", "sum alone ms", "one program ms", _RATIO
  for row in rows:
    yield "; ".join(row["members"][1:-1]), *_cells(row)


def _compilation(part: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  yield "compiled for training", "members", "programs", "seconds"
  for name, row in part.items():
    yield _words(name), row["members"], row["programs"], f"{row['seconds']:.1f}"


def _memory(part: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
  yield f"peak memory of a gradient of {part['member']}", "MiB"
  for name in ("slice", "one_program"):
    yield _words(name), f"{part[name] / 2 ** 20:.1f}"


def _utilisation(part: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
  yield f"step of {part['member']}", "ms", "GFLOP/s", f"of a large {part['dtype']} product's"
  for name in ("alone", "one_program"):
    if name in part:
      row = part[name]
      yield _words(name), f"{row['ms']:.1f}", f"{row['flops'] / 1e9:.1f}", f"{100 * row['share']:.0f}%"
  yield "large matrix product", "", f"{part['peak_flops'] / 1e9:.1f}", ""


def _peer(part: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
  yield f"against {part['name']}", "its ms", "one program ms", _RATIO
  for row in part["steps"]:
    members = row["members"]
    yield members[0] if len(members) == 1 else f"sandwich, {len(members)} members", *_cells(row)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  return (f"{row['base_ms']:.1f}", f"{row['own_ms']:.1f}",
          f"{row['median']:.3f} [{row['lower']:.3f}, {row['upper']:.3f}]")


def _words(name: str) -> str:
  return name.replace("_", " ")
