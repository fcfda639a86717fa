"""A process of a job of several, under a small parent that speaks for it when it no longer can.

JAX ends a process from C++, by abort, when another one of the job is gone, and calls nothing of
Python's before. So the process that the user starts forks the one that works, waits for it, and says
what happened in one line. Nothing here imports JAX: a process that runs JAX cannot be forked.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import IO

from nestnet import cli
from nestnet.errors import Lost, UserError

AUTO = "auto"
GOES_ON = "The same command on every host goes on from the newest checkpoint"
# <linux/prctl.h>
_SET_PARENT_DEATH_SIGNAL = 1
# What the parent waits for.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclasses.dataclass(frozen=True)
class Place:
  """Which process of how many this is; all None where TPU, GKE or Slurm say it.

  Attributes:
    count: Number of processes.
    index: Which of them this is.
    coordinator: `HOST:PORT` on which process 0 listens.
  """

  count: int | None = None
  index: int | None = None
  coordinator: str | None = None

  def __str__(self) -> str:
    return "this process" if self.count is None else f"process {self.index} of {self.count}"


def place(processes: str, process: int | None, coordinator: str | None) -> Place | None:
  """The place that the flags of a command name; None for a process alone.

  Raises:
    ValueError: The flags do not go together.

  Example:
    >>> print(place("2", 1, "localhost:7000"), place("auto", None, None), place("1", None, None))
    process 1 of 2 this process None
  """
  if processes == AUTO:
    if process is not None or coordinator is not None:
      raise UserError("--processes=auto finds --process and --coordinator by itself; leave them out")
    return Place()
  if not processes.isdigit() or int(processes) < 1:
    raise UserError(f"--processes: got {processes!r}, allowed: a whole number of at least 1, or {AUTO} "
                    "on a TPU pod, GKE or Slurm")
  count = int(processes)
  if count == 1:
    return None
  if process is None or not 0 <= process < count:
    raise UserError(f"--process: got {process}, allowed with --processes={count}: 0 to {count - 1}")
  host, _, port = (coordinator or "").rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator: got {coordinator}, allowed: HOST:PORT of process 0, the same for all")
  return Place(count, process, coordinator)


def supervised(work: Callable[[], int | None], where: Place) -> int:
  """Runs `work` in a child process and waits for it; SIGTERM is passed on to it.

  Args:
    work: Gives the exit code, None being 0. JAX must not be imported before it is called.
    where: What the message calls the process.

  Returns:
    The exit code, to end with: signals stay held back. 75 where a signal ended the child.
  """
  parent = os.getpid()
  with tempfile.TemporaryFile("w+") as loss:
    # The parent asks for them: a handler that is due just as the parent begins to wait would wait as long.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if not child:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
      _work(work, parent, loss)
    status = _wait(child)
    loss.seek(0)
    message = loss.read()
  if not message and not os.WIFSIGNALED(status):
    return os.waitstatus_to_exitcode(status)
  return cli.report(message or f"{where}: {_signalled(os.WTERMSIG(status))}. {GOES_ON}", Lost.code)


def _wait(child: int) -> int:
  """The child's status when it ends; hands it SIGTERM. Ctrl-C reaches the child as well, which says so."""
  # Were it ignored, as it is by default, the end of a child might not be told.
  signal.signal(signal.SIGCHLD, lambda *_: None)
  while True:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      return status
    if signal.sigwait(_SIGNALS) == signal.SIGTERM:
      os.kill(child, signal.SIGTERM)


def _signalled(number: int) -> str:
  if number == signal.SIGABRT:
    return "another process of the job is gone, or never came (JAX's own words stand above)"
  return f"ended by {signal.Signals(number).name}"


def _work(work: Callable[[], int | None], parent: int, loss: IO[str]) -> None:
  """The child's life; never returns."""
  code = 1
  try:
    _end_with(parent)
    with cli.reported():
      code = _unless_lost(work, loss)
  except SystemExit as end:
    code = end.code
  except BaseException:  # What no one foresaw; it must not unwind into the parent's frames.
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    # On the ordinary way out JAX would wait for processes that may be gone.
    os._exit(code)


def _unless_lost(work: Callable[[], int | None], loss: IO[str]) -> int:
  """Leaves it to the parent to say that a process is lost: JAX's threads talk until the child ends."""
  try:
    return work() or 0
  except Lost as lost:
    loss.write(str(lost))
    loss.flush()
    return lost.code


def _end_with(parent: int) -> None:
  """Lets the kernel kill this process when its parent dies, lest it trains on unseen."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(Lost.code)
