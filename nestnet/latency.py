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

_REPEATS = 20
_SECONDS = 0.002
_MOST = 1000


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

  def ms(self, name: str, run: Callable[..., Any], *args: Any,
         measure: Callable[..., float] | None = None) -> float:
    """The time of `run(*args)` in milliseconds, measured if it is not known.

    Args:
      name: What a reader of the file sees.
      run: A function that JAX can trace.
      *args: Trees of shapes; values are made up.
      measure: `measure(run, *args)`, of arrays; `inner_ms` by default.
    """
    measure = measure or inner_ms
    program = jax.jit(run).lower(*args).as_text()
    key = hashlib.sha256(f"{self.device} {measure.__name__} {program}".encode()).hexdigest()[:16]
    if key not in self.entries:
      self.entries[key] = {"ms": measure(run, *jax.tree.map(_filled, args)), "name": name,
                           "how": measure.__name__, "device": self.device}
      atomic_write(self.path, json.dumps(self.entries, indent=1) + "\n")
    return self.entries[key]["ms"]


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

  `fit` sets the two from a few whole networks: pieces that are timed one by one know neither the
  cost of a call nor what a larger program gains or loses by its size.

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
    self._known: dict[Piece, float] = {}

  def __call__(self, subnet: Subnet) -> float:
    """The composed latency of a member, in milliseconds."""
    return self.offset + self.factor * self.sum(subnet)

  def sum(self, subnet: Subnet) -> float:
    """The sum of the times of a member's pieces, in milliseconds."""
    return sum(map(self._piece, self.pieces.of(subnet)))

  def _piece(self, piece: Piece) -> float:
    if piece not in self._known:
      self._known[piece] = self.table.ms(
        piece.name, piece.run, calibrated(piece.run, piece.variables, *piece.inputs), *piece.inputs)
    return self._known[piece]

  def measured(self, subnet: Subnet) -> float:
    """The time of the whole network, in milliseconds; from the table if it was timed before."""
    apply, inputs = self.supernet.module(subnet).apply, [resized(x, subnet) for x in self.inputs]
    variables = {"params": {}} | jax.eval_shape(
      lambda v: self.supernet.cut(v, subnet), self.supernet.shapes)
    return self.table.ms(str(subnet), apply, calibrated(apply, variables, *inputs), *inputs,
                         measure=whole_ms)

  def fit(self, members: Iterable[Subnet]) -> None:
    """Sets offset and factor by least squares of relative errors, both of at least 0.

    Raises:
      ValueError: Fewer than two members.
    """
    members = list(members)
    if len(members) < 2:
      raise UserError(f"a fit of latencies needs at least 2 whole networks, got {len(members)}")
    sums, whole = (np.array([f(m) for m in members]) for f in (self.sum, self.measured))
    self.offset, self.factor = _affine(sums, whole)

  def error(self, members: Sequence[Subnet]) -> LatencyError:
    """What composition misses on members, each measured whole; name others than `fit` had."""
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


def inner_ms(run: Callable[..., Any], variables: Any, *inputs: Any) -> float:
  """Time of one of many runs inside one program, so that calling it costs nothing.

  Each run reads what the one before gave, so none is left out. The least of several is taken: what
  else the machine does only adds.
  """
  def again(x, y):
    if jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, y):
      return y
    total = sum(leaf.mean() for leaf in jax.tree.leaves(y))
    return jax.tree.map(lambda leaf: leaf + (1e-30 * total).astype(leaf.dtype), x)

  @jax.jit
  def program(count, variables, first, *rest):
    return jax.lax.fori_loop(0, count, lambda _, x: again(x, run(variables, x, *rest)), first)

  def seconds(count):
    began = time.perf_counter()
    jax.block_until_ready(program(count, variables, *inputs))
    return time.perf_counter() - began

  seconds(1)
  count = int(np.clip(_SECONDS / max(min(seconds(4) for _ in range(4)) / 4, 1e-9), 1, _MOST))
  return 1e3 * min(seconds(count) for _ in range(_REPEATS)) / count


def whole_ms(run: Callable[..., Any], *args: Any) -> float:
  """Time of a call, the least of several."""
  call = jax.jit(run)
  for _ in range(3):
    jax.block_until_ready(call(*args))
  times = []
  for _ in range(5 * _REPEATS):
    began = time.perf_counter()
    jax.block_until_ready(call(*args))
    times.append(time.perf_counter() - began)
  return 1e3 * min(times)


def _filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
  # How long it takes depends on no value.
  return jnp.full(shape.shape, 0.5, shape.dtype)
