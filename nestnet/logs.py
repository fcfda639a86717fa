"""What a run writes while it trains: `metrics.jsonl`, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping

import tensorboardX
import tqdm

from nestnet.files import atomic_write


class Logs:
  """Writes the scalars of each step to `metrics.jsonl` and TensorBoard.

  Rows past `step`, of a run that was killed after it, are dropped.

  Args:
    workdir: The run's folder.
    step: The step from which the run goes on.
  """

  def __init__(self, workdir: str | os.PathLike[str], step: int = 0):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
    atomic_write(self._path, "".join(line + "\n" for line in kept))
    self._file = open(self._path, "a")
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1 if step else None)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends one row."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._events.close()


def _lines(path: pathlib.Path) -> list[str]:
  """The whole lines of a file; a killed process may have left half of one at its end."""
  if not path.exists():
    return []
  return [line for line in path.read_text().split("\n")[:-1] if line]


class Progress:
  """A bar with rate and time left on a terminal; elsewhere a line now and then."""

  def __init__(self, total: int, start: int = 0, label: str = "train", every_seconds: float = 10.0):
    self._total, self._start, self._label = total, start, label
    self._interactive = sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True,
                          disable=not self._interactive)
    self._began = self._said = time.monotonic()
    self._every = every_seconds

  def update(self, step: int, scalars: Mapping[str, float]) -> None:
    """Shows that `step` is done."""
    text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()
                     if name in ("loss", "accuracy") and math.isfinite(value))
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(step - self._bar.n)
    clock = time.monotonic()
    if self._interactive or (clock - self._said < self._every and step < self._total):
      return
    self._said = clock
    rate = (step - self._start) / max(clock - self._began, 1e-9)
    left = (self._total - step) / max(rate, 1e-9)
    print(f"{self._label} {step}/{self._total}  {rate:.1f} steps/s  {left:.0f} s left  {text}",
          file=sys.stderr, flush=True)

  def close(self) -> None:
    self._bar.close()
