"""The runs of a comparison, in turn or in several processes."""

from __future__ import annotations

import collections
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
from nestnet.errors import UserError
from nestnet.files import atomic_write
from nestnet.training import NonFinite

BASELINE = "separate"
_STOPPED = "stopped by SIGTERM"


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
    return (self.workdir / "done").exists()

  @property
  def steps(self) -> int:
    return self.config["train"]["steps"]


def run_task(task: Task) -> bool:
  """Trains and evaluates one run; False after SIGTERM."""
  began = time.monotonic()
  run = build.build(task.config)
  runs.settle(run.config, task.workdir)
  state = runs.trained(run, task.workdir, show_progress=False)
  if state is None:
    return False
  space = run.supernet.space
  members = [space.largest] if task.recipe == BASELINE else list(map(space.subnet, task.sizes))
  rows = evaluation.evaluate(run, state, members)
  seconds = time.monotonic() - began
  report.write_rows(task.workdir / "subnets.json", [
    row | {"subnet": size, "seconds": round(seconds, 1)} for size, row in zip(task.sizes, rows)])
  atomic_write(task.workdir / "done", "")
  return True


def train_all(tasks: Sequence[Task], jobs: int = 1) -> bool:
  """Does the runs that are not done; one that fails lets the others go on.

  Returns:
    Whether all are done; False after SIGTERM.

  Raises:
    ValueError: Runs failed, each with its message; or `jobs` is out of range.
  """
  if not 1 <= jobs <= len(cores()):
    raise UserError(f"jobs: got {jobs}, allowed is 1 to the number of cores here, {len(cores())}")
  todo = [task for task in tasks if not task.done]
  began, failures = time.monotonic(), []
  for count, (task, error) in enumerate((_spread if jobs > 1 else _in_turn)(todo, jobs), 1):
    if error == _STOPPED:
      return False
    if error:
      failures.append(f"  {task.workdir}: {error}")
    spent, left = (sum(t.train_flops for t in some) for some in (todo[:count], todo[count:]))
    seconds = (time.monotonic() - began) * left / spent
    print(f"run {len(tasks) - len(todo) + count}/{len(tasks)}  {task.recipe}  {task.steps} steps  seed "
          f"{task.seed}  {task.workdir.parent.name}  {'failed' if error else 'done'}; about "
          f"{seconds / 60:.1f} min left", file=sys.stderr, flush=True)
  if failures:
    raise UserError("\n".join([f"{len(failures)} of {len(tasks)} runs failed; the others are kept:",
                               *failures]))
  return True


def _outcome(task: Task) -> str:
  """Does a run; what hinders it, or nothing."""
  try:
    return "" if run_task(task) else _STOPPED
  except (UserError, NonFinite) as error:
    return str(error)


def _in_turn(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, str]]:
  return ((task, _outcome(task)) for task in tasks)


def _spread(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, str]]:
  """Deals runs to processes, each as soon as it is free."""
  context, todo, busy = multiprocessing.get_context("spawn"), collections.deque(tasks), {}

  def deal(pipe):
    if todo:
      busy[pipe] = todo.popleft()
      pipe.send(busy[pipe])

  for share in range(jobs):
    pipe, end = context.Pipe()
    # A daemon gets SIGTERM when this process ends: it saves its run and leaves.
    context.Process(target=_serve, daemon=True, args=(
      end, cores()[share::jobs], jax.config.jax_compilation_cache_dir)).start()
    end.close()
    deal(pipe)
  while busy:
    for pipe in connection.wait(list(busy)):
      task = busy.pop(pipe)
      try:
        error = pipe.recv()
      except EOFError:
        raise UserError(f"the process of {task.workdir} ended; its message stands above. The same "
                        "command goes on") from None
      deal(pipe)
      yield task, error


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
    except EOFError:
      return
    pipe.send(_outcome(task))


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
