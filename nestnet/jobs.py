"""The runs of a comparison, in turn or in several processes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any

import jax

from nestnet import build, evaluation, memory, report, runs
from nestnet.errors import Failure, UserError
from nestnet.files import atomic_write

BASELINE = "separate"


class _Stopped(Exception):
  """SIGTERM ended a run before its time."""


@dataclasses.dataclass(frozen=True)
class Task:
  """One run of a comparison.

  Attributes:
    recipe: Name of its recipe.
    budgets: Under which budgets it counts; one run serves both where they name equal steps.
    seed: Its seed.
    family: All sizes that its family compares, as text.
    sizes: Those of them that this run is evaluated on.
    config: Of the run, plain.
    workdir: Of the run.
    train_flops: What its training takes.
  """

  recipe: str
  budgets: tuple[str, ...]
  seed: int
  family: tuple[str, ...]
  sizes: tuple[str, ...]
  config: dict[str, Any]
  workdir: pathlib.Path
  train_flops: float

  @property
  def done(self) -> bool:
    """Whether it has trained, and was evaluated on all that the comparison shows."""
    return (self.workdir / "done").exists() and {*self.sizes} <= {
      row["subnet"] for row in report.read_rows(self.workdir / "subnets.json")}

  @property
  def steps(self) -> int:
    return self.config["train"]["steps"]


def run_task(task: Task) -> bool:
  """Trains and evaluates one run; False after SIGTERM."""
  began = time.monotonic()
  run = build.build(task.config)
  runs.begun(run, task.workdir)
  state = runs.trained(run, task.workdir, show_progress=False)
  if state is None:
    return False
  space = run.supernet.space
  members = [space.largest] if task.recipe == BASELINE else list(map(space.subnet, task.sizes))
  rows = evaluation.evaluate(run, state, members)
  seconds, path = time.monotonic() - began, task.workdir / "subnets.json"
  if (task.workdir / "done").exists():
    # It was trained for a table with fewer sizes.
    seconds += report.read_rows(path)[0]["seconds"]
  report.write_rows(path, [
    row | {"subnet": size, "seconds": round(seconds, 1)} for size, row in zip(task.sizes, rows)])
  atomic_write(task.workdir / "done", "")
  return True


def train_all(tasks: Sequence[Task], jobs: int = 1) -> bool:
  """Does the runs that are not done; one that fails lets the others go on.

  Returns:
    Whether all are done; False after SIGTERM, which every run that trains meets with a checkpoint.

  Raises:
    ValueError: `jobs` is out of range, or each run that failed did so by a mistake of the user's.
    Failure: Runs failed, each with its message.
  """
  if not 1 <= jobs <= len(cores()):
    raise UserError(f"jobs: got {jobs}, allowed is 1 to the number of cores here, {len(cores())}")
  todo = [task for task in tasks if not task.done]
  began, failures = time.monotonic(), []
  with contextlib.closing((_spread if jobs > 1 else _in_turn)(todo, jobs)) as outcomes:
    for count, (task, error) in enumerate(outcomes, 1):
      if isinstance(error, _Stopped):
        return False
      if error:
        failures.append((task, error))
      spent, left = (sum(t.train_flops for t in some) for some in (todo[:count], todo[count:]))
      seconds = (time.monotonic() - began) * left / spent
      print(f"run {len(tasks) - len(todo) + count}/{len(tasks)}  {task.recipe}  {task.steps} steps  "
            f"seed {task.seed}  {task.workdir.parent.name}  {'failed' if error else 'done'}; about "
            f"{seconds / 60:.1f} min left", file=sys.stderr, flush=True)
  if failures:
    kind = UserError if all(isinstance(error, UserError) for _, error in failures) else Failure
    raise kind("\n".join([f"{len(failures)} of {len(tasks)} runs failed; the others are kept:",
                          *(f"  {task.workdir}: {error}" for task, error in failures)]))
  # Runs that SIGTERM kept from starting have no outcome.
  return all(task.done for task in tasks)


def _outcome(task: Task) -> Exception | None:
  """Does a run; what hinders it, or None."""
  try:
    return None if run_task(task) else _Stopped()
  except (UserError, Failure) as error:
    return error


def _in_turn(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Exception | None]]:
  return ((task, _outcome(task)) for task in tasks)


def _spread(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Exception | None]]:
  """Deals runs to processes, each as soon as it is free; none is left when this ends."""
  context, todo, busy = multiprocessing.get_context("spawn"), collections.deque(tasks), {}
  workers, stopping = {}, threading.Event()

  def stop(*_):
    """Passes SIGTERM on: a run that trains saves and leaves, any other process ends at once."""
    # Once only: a second signal would end a process that is still saving.
    if not stopping.is_set():
      stopping.set()
      for worker in workers.values():
        worker.terminate()

  def deal(pipe):
    if todo and not stopping.is_set():
      busy[pipe] = todo.popleft()
      # A process that is gone shows when its answer is read.
      with contextlib.suppress(OSError):
        pipe.send(busy[pipe])

  # Only the main thread may handle signals.
  handles = threading.current_thread() is threading.main_thread()
  previous = signal.signal(signal.SIGTERM, stop) if handles else None
  try:
    for share in range(jobs):
      pipe, end = context.Pipe()
      worker = context.Process(target=_serve, daemon=True, args=(
        end, cores()[share::jobs], jax.config.jax_compilation_cache_dir))
      worker.start()
      end.close()
      workers[pipe] = worker
      deal(pipe)
    while busy:
      for pipe in connection.wait(list(busy)):
        task = busy.pop(pipe)
        try:
          error = pipe.recv()
        except (EOFError, OSError):
          if not stopping.is_set():
            workers[pipe].join()
            raise Failure(f"the process of {task.workdir} ended with exit code "
                          f"{workers[pipe].exitcode}; what it said stands above. The same command "
                          "goes on") from None
          error = _Stopped()
        deal(pipe)
        yield task, error
  finally:
    stop()
    for pipe, worker in workers.items():
      pipe.close()
      worker.join()
    if handles:
      signal.signal(signal.SIGTERM, previous)


def _serve(pipe: connection.Connection, cores: Sequence[int], programs: str | None) -> None:
  """A worker: does the runs that come through the pipe, on some cores only."""
  # The number of threads is read from this when JAX starts.
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  memory.keep_freed()
  # A run without its parent would meet the same run of the next command.
  threading.Thread(target=_leave_with_parent, daemon=True).start()
  if programs:
    keep_programs(programs)
  while True:
    try:
      task = pipe.recv()
    except (EOFError, OSError):
      return
    outcome = _outcome(task)
    # The parent may have stopped listening; its next command finds what was done.
    with contextlib.suppress(OSError):
      pipe.send(outcome)


def _leave_with_parent() -> None:
  connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def cores() -> list[int]:
  """The cores that this process may use."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(
    range(os.cpu_count() or 1))


def keep_programs(folder: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in a folder, so that runs that share them compile them once."""
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
