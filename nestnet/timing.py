"""How long things take: calls in interleaved pairs, compilation, a large matrix product.

Contenders of a pair run one after the other, and which goes first alternates, so that what else
the machine does meets both alike; ratios are taken pair by pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError
from nestnet.jobs import cores

_WARM_UP = 3
_REPEATS = 7

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Two contenders, measured in interleaved pairs.

  Attributes:
    base_ms: Median time of the second, in milliseconds.
    own_ms: Median time of the first.
    median: Median over pairs of first / second.
    lower: First quartile of that ratio.
    upper: Third quartile.
  """

  base_ms: float
  own_ms: float
  median: float
  lower: float
  upper: float


def ratio(own: Call, base: Call | Sequence[Call], pairs: int, clock: Callable[[], float] =
          time.perf_counter) -> Ratio:
  """Measures `own` against `base` (the sum of several calls), pair by pair.

  Args:
    own: A call that returns only when its work is done.
    base: The same, one or several.
    pairs: How many pairs; the first of each pair alternates.
    clock: Seconds.

  Example:
    >>> ratio(lambda: None, lambda: time.sleep(0.001), pairs=3).median < 1
    True
  """
  bases = [base] if callable(base) else list(base)
  for call in (own, *bases) * _WARM_UP:
    call()
  owns, others = paired_ms(own, bases, pairs, clock).T
  lower, median, upper = np.percentile(owns / others, (25, 50, 75)).tolist()
  return Ratio(float(np.median(others)), float(np.median(owns)), median, lower, upper)


def paired_ms(own: Call, bases: Sequence[Call], pairs: int, clock: Callable[[], float] =
              time.perf_counter) -> np.ndarray:
  """Times of `own` and of all `bases` together, `[pairs, 2]` in milliseconds; nothing is warmed up.

  Args:
    own: As in `ratio`.
    bases: The calls that it is measured against.
    pairs: As there.
    clock: As there.
  """
  if pairs < 1:
    raise UserError(f"pairs: got {pairs}, allowed is at least 1")

  def timed(calls):
    began = clock()
    for call in calls:
      call()
    return 1e3 * (clock() - began)

  times = []
  for pair in range(pairs):
    both = {name: timed(calls) for name, calls in itertools.islice(
      itertools.cycle((("own", [own]), ("base", bases))), pair % 2, pair % 2 + 2)}
    times.append((both["own"], both["base"]))
  return np.array(times)


def median_ms(call: Call) -> float:
  """Median time of a call that returns only when its work is done, in milliseconds."""
  for _ in range(_WARM_UP):
    call()
  times = []
  for _ in range(_REPEATS):
    began = time.perf_counter()
    call()
    times.append(1e3 * (time.perf_counter() - began))
  return float(np.median(times))


@dataclasses.dataclass
class Compilations:
  """What was compiled.

  Attributes:
    programs: The name of each program, such as `"jit(add)"`, in order.
    seconds: Tracing, lowering and compiling them all.
  """

  programs: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
  """Fills a record from JAX's own log of what it compiles; nothing of that log is printed.

  A persistent compilation cache (`JAX_COMPILATION_CACHE_DIR`) shortens the seconds, not the list.

  Example:
    >>> with compilations() as found:
    ...   _ = jax.jit(lambda x: x + 1).lower(1.0).compile()
    >>> found.programs
    ['jit(<lambda>)']
  """
  found, handler, logger = Compilations(), logging.Handler(), logging.getLogger("jax")
  traced = 0.0

  def emit(record):
    nonlocal traced
    message = record.getMessage()
    # Tracing a program ends after that of those inside it, which it includes.
    if match := re.match(r"Finished tracing.* in ([\d.e+-]+) sec", message):
      traced = float(match[1])
    elif match := re.match(r"Compiling (\S+)", message):
      found.programs.append(match[1])
      found.seconds += traced
      traced = 0.0
    elif match := re.match(r"Finished (?:jaxpr to MLIR|XLA compilation).* in ([\d.e+-]+) sec", message):
      found.seconds += float(match[1])

  handler.emit = emit
  handlers, propagate = logger.handlers, logger.propagate
  logger.handlers, logger.propagate = [handler], False
  try:
    with jax.log_compiles():
      yield found
  finally:
    logger.handlers, logger.propagate = handlers, propagate


def matmul_peak(dtype: Any) -> float:
  """FLOPs a second that one device reaches in products of large square matrices of a type.

  2,048 rows on CPU, 8,192 on accelerators; the best of several runs.

  Example:
    >>> matmul_peak("float32") > 1e6
    True
  """
  size, count = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
  # Orthogonal on average, so that repeated products neither grow nor vanish.
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32) / size ** 0.5
  a, b = a.astype(dtype), b.astype(dtype)
  multiply = jax.jit(lambda a, b: jax.lax.fori_loop(0, count, lambda _, x: x @ b, a))
  times = []
  for _ in range(5):
    began = time.perf_counter()
    jax.block_until_ready(multiply(a, b))
    times.append(time.perf_counter() - began)
  return 2 * size ** 3 * count / min(times)


def hardware() -> str:
  """One line about where numbers were measured: processor, cores, versions."""
  info = pathlib.Path("/proc/cpuinfo")
  models = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
            if line.startswith("model name")] if info.exists() else []
  processor = models[0] if models else platform.processor() or platform.machine()
  devices = "" if jax.default_backend() == "cpu" else (
    f", {jax.device_count()} x {jax.devices()[0].device_kind}")
  return (f"{processor}, {len(cores())} cores{devices}; Python {'.'.join(map(str, sys.version_info[:3]))}, "
          f"jax {jax.__version__}, flax {flax.__version__}")
