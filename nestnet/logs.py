"""What a run writes while it trains: `metrics.jsonl`, TensorBoard events, a progress bar."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping

import tensorboardX
import tqdm
from absl import logging

from nestnet import metrics
from nestnet.errors import UserError
from nestnet.files import atomic_write


class Logs:
  """Writes the scalars of each step to `metrics.jsonl` and TensorBoard.

  Rows past `step`, of a run that was killed after it, are dropped.

  Args:
    workdir: The run's folder.
    step: The step from which the run goes on.

  Raises:
    ValueError: A row that stands there is damaged.
  """

  def __init__(self, workdir: str | os.PathLike[str], step: int = 0):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    atomic_write(self._path, b"".join(line + b"\n" for at, line in _rows(self._path) if at <= step))
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


class NoLogs:
  """Logs of a process that leaves the writing to another."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    del step, scalars

  def close(self) -> None:
    pass


def _rows(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """The step and the text of each whole line; a kill may have left half of one at the end."""
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    try:
      yield int(json.loads(line)["step"]), line
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{path}, line {number} is damaged: {error}; remove that line to go on") from error


class Warnings:
  """Says what is wrong when it begins to be so, not at every step."""

  def __init__(self):
    self._held = False

  def look(self, step: int, text: str) -> None:
    """Logs `text` unless there was one at the last look; "" is none."""
    if text and not self._held:
      logging.warning("step %d: %s", step, text)
    self._held = bool(text)


class Progress:
  """A bar with rate and time left on a terminal; elsewhere a line now and then."""

  def __init__(self, total: int, start: int = 0, label: str = "train", every_seconds: float = 10.0):
    self._total, self._label = total, label
    self._step = start
    self._first: tuple[int, float] | None = None
    self._interactive = sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True,
                          disable=not self._interactive)
    self._said = time.monotonic()
    self._every = every_seconds

  def say(self, text: str, label: str | None = None) -> None:
    """Writes a line; `label` then stands before the numbers."""
    tqdm.tqdm.write(text, file=sys.stderr)
    if label:
      self._label = label
      self._bar.set_description(label, refresh=False)

  def update(self, step: int, scalars: Mapping[str, float]) -> None:
    """Shows that `step` is done."""
    self._step = step
    text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()
                     if name in metrics.PROGRESS and math.isfinite(value))
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(step - self._bar.n)
    clock = time.monotonic()
    # What stands before the first step's end, compilation above all, says nothing of the steps to come.
    self._first = self._first or (step, clock)
    if self._interactive or (clock - self._said < self._every and step < self._total):
      return
    self._said = clock
    since, began = self._first
    rate = (step - since) / max(clock - began, 1e-9)
    pace = f"{rate:.1f} steps/s  {(self._total - step) / rate:.0f} s left  " if step > since else ""
    print(f"{self._label} {step}/{self._total}  {pace}{text}", file=sys.stderr, flush=True)

  def advance(self, scalars: Mapping[str, float]) -> None:
    """Shows that one more is done."""
    self.update(self._step + 1, scalars)

  def extend(self, count: int) -> None:
    """So many more are to come."""
    self._total += count
    self._bar.total = self._total

  def close(self) -> None:
    self._bar.close()
