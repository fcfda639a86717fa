"""A table of measured times: each distinct piece of a family once, summed for any member.

As the look-up tables of Once-for-All (1908.09791, section 4), with the builder that makes them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError
from nestnet.execution import Supernet, resized
from nestnet.files import atomic_write
from nestnet.models.convolution import STATISTICS
from nestnet.pieces import Piece, Pieces
from nestnet.subnet import Subnet

# How often each of the programs that are timed together has its turn, within so many seconds if it can.
_ROUNDS = (10, 60)
_SECONDS = 60.0
# A turn: one call that is not counted, then so many.
_CALLS = 8

# A name, a function that JAX can trace, and the shapes of its arguments.
Timed = tuple[str, Callable[..., Any], tuple[Any, ...]]


class LatencyTable:
  """Times of pieces and of whole networks on the present device, in a file that grows.

  A time is found again by what was timed: the program itself (types and batch included), the kind of
  device and the version of JAX. A table of another device or version may stand in the same file.

  Args:
    path: A JSON file; it need not exist.

  Raises:
    ValueError: The file is damaged.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self.device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    try:
      self.entries = json.loads(self.path.read_text()) if self.path.exists() else {}
      for entry in self.entries.values():
        float(entry["ms"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{path} is damaged: {error}; remove it, and it is measured anew") from error

  def ms(self, programs: Sequence[Timed]) -> list[float]:
    """The time of a call of each program, in milliseconds.

    Those that are not known are measured together, so that their times may be compared; the names are
    what a reader of the file sees, and values are made up.
    """
    keys = [self._key(run, args) for _, run, args in programs]
    unknown = {key: program for key, program in zip(keys, programs, strict=True) if key not in self.entries}
    if unknown:
      found = interleaved_ms([(run, jax.tree.map(_filled, args)) for _, run, args in unknown.values()])
      for (key, (name, _, _)), ms in zip(unknown.items(), found, strict=True):
        self.entries[key] = {"ms": ms, "name": name, "device": self.device}
      atomic_write(self.path, json.dumps(self.entries, indent=1) + "\n")
    return [self.entries[key]["ms"] for key in keys]

  def _key(self, run: Callable[..., Any], args: tuple[Any, ...]) -> str:
    program = jax.jit(run).lower(*args).as_text()
    return hashlib.sha256(f"{self.device} {program}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LatencyError:
  """How far sums of pieces are from whole networks, as shares of the measured time.

  Attributes:
    median: Of the members.
    largest: Of the members.
    within: Share of the members that are at most 15% off.
    rows: For each member `subnet`, `composed_ms`, `measured_ms`.
  """

  median: float
  largest: float
  within: float
  rows: tuple[dict[str, Any], ...]


class Latency:
  """The latency of any member as `offset + factor * (sum of its pieces)`.

  `fit` sets the two from a few whole networks: each piece is timed as a call of its own, and a call
  costs something before it computes anything.

  Machines change their speed from one second to the next. What is timed in one go is comparable, so
  call `measure` first with members that show every piece.

  Args:
    supernet: The family.
    table: Where times are kept.
    batch: Images in a call.
  """

  def __init__(self, supernet: Supernet, table: LatencyTable, batch: int = 1):
    self.supernet, self.table = supernet, table
    inputs = tuple(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in supernet.inputs)
    self.pieces, self.inputs = Pieces(supernet, inputs), inputs
    self.offset, self.factor = 0.0, 1.0
    self._known: dict[Piece | Subnet, float] = {}

  def __call__(self, subnet: Subnet) -> float:
    """The composed latency of a member, in milliseconds."""
    return self.offset + self.factor * self.sum(subnet)

  def sum(self, subnet: Subnet) -> float:
    """The sum of the times of a member's pieces, in milliseconds."""
    self.measure([subnet])
    return sum(self._known[piece] for piece in self.pieces.of(subnet))

  def measured(self, subnet: Subnet) -> float:
    """The time of the whole network, in milliseconds; from the table if it was timed before."""
    self.measure(whole=[subnet])
    return self._known[subnet]

  def measure(self, members: Iterable[Subnet] = (), whole: Iterable[Subnet] = ()) -> None:
    """Times together what is not known yet: the pieces of `members`, and all of `whole` as they are."""
    found = [*(piece for member in members for piece in self.pieces.of(member)), *whole]
    unknown = list(dict.fromkeys(one for one in found if one not in self._known))
    programs = [self._piece(one) if isinstance(one, Piece) else self._whole(one) for one in unknown]
    self._known.update(zip(unknown, self.table.ms(programs), strict=True))

  def _piece(self, piece: Piece) -> Timed:
    return piece.name, piece.run, (calibrated(piece.run, piece.variables, *piece.inputs), *piece.inputs)

  def _whole(self, subnet: Subnet) -> Timed:
    apply, inputs = self.supernet.module(subnet).apply, [resized(x, subnet) for x in self.inputs]
    variables = {"params": {}} | jax.eval_shape(
      lambda v: self.supernet.cut(v, subnet), self.supernet.shapes)
    return str(subnet), apply, (calibrated(apply, variables, *inputs), *inputs)

  def fit(self, members: Iterable[Subnet]) -> None:
    """Sets offset and factor by least squares of relative errors, both of at least 0.

    Raises:
      ValueError: Fewer than two members.
    """
    members = list(members)
    if len(members) < 2:
      raise UserError(f"a fit of latencies needs at least 2 whole networks, got {len(members)}")
    self.measure(members, members)
    sums, whole = (np.array([f(m) for m in members]) for f in (self.sum, self.measured))
    self.offset, self.factor = _affine(sums, whole)

  def error(self, members: Sequence[Subnet]) -> LatencyError:
    """What composition misses on members, each measured whole; name others than `fit` had."""
    self.measure(members, members)
    rows = tuple({"subnet": str(m), "composed_ms": self(m), "measured_ms": self.measured(m)} for m in members)
    shares = np.array([abs(r["composed_ms"] / r["measured_ms"] - 1) for r in rows])
    return LatencyError(float(np.median(shares)), float(shares.max()), float(np.mean(shares <= 0.15)), rows)


def _affine(sums: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
  columns = np.stack([1 / whole, sums / whole], axis=1)
  (offset, factor), *_ = np.linalg.lstsq(columns, np.ones(len(whole)), rcond=None)
  if offset >= 0 and factor > 0:
    return float(offset), float(factor)
  # One of the two alone: where times hardly differ, noise would turn the line round.
  return (0.0, float((columns[:, 1] @ np.ones(len(whole))) / (columns[:, 1] @ columns[:, 1]))) if factor > 0 \
    else (float(columns[:, 0].sum() / (columns[:, 0] @ columns[:, 0])), 0.0)


def calibrated(run: Callable[..., Any], variables: dict[str, Any], *inputs: Any) -> dict[str, Any]:
  """Shapes of the variables with statistics, where the network normalises by them."""
  _, moments = jax.eval_shape(functools.partial(run, mutable=[STATISTICS]), variables, *inputs)
  return {**variables, **moments}


def interleaved_ms(programs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[float]:
  """Medians of the times of calls, in milliseconds, where the programs take turns.

  Whatever speed the machine has at a moment, all meet it alike.
  """
  calls = [functools.partial(jax.jit(run), *args) for run, args in programs]
  for call in calls:
    jax.block_until_ready(call())
  turn = lambda: [_median_seconds(call) for call in calls]
  began = time.perf_counter()
  turn()
  rounds = int(np.clip(_SECONDS / (time.perf_counter() - began), *_ROUNDS))
  return list(1e3 * np.median([turn() for _ in range(rounds)], axis=0))


def _median_seconds(call: Callable[[], Any]) -> float:
  times = []
  for _ in range(1 + _CALLS):
    began = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - began)
  return float(np.median(times[1:]))


def _filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
  # How long it takes depends on no value.
  return jnp.full(shape.shape, 0.5, shape.dtype)
