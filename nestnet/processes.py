"""Several processes that train one network: meeting, agreeing, saying who writes, parting.

Everything here works in a process alone, where it does nothing.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from nestnet.errors import Lost, UserError
from nestnet.supervision import GOES_ON, Place

# After so many seconds of silence a process counts as dead.
HEARTBEAT_SECONDS = 30
# How long a process with a message of its own waits for the others to have theirs.
PARTING_SECONDS = 15
# jaxlib has no class of its own for these errors. "coordination" is in whatever its service says.
_OF_ANOTHER = ("gloo", "nccl", "coordination", "heartbeat")


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[None]:
  """The part of a program in which its processes work together.

  Args:
    place: Which process this is; None for a process alone.

  Raises:
    nestnet.errors.Lost: Another process is gone.
    ValueError: The cluster does not say which process this is.
  """
  if place is None:
    yield
    return
  try:
    _initialize(place)
    yield
  except Exception as error:
    text = " ".join(str(error).split())
    if not isinstance(error, UserError) and any(word in text.lower() for word in _OF_ANOTHER):
      raise Lost(f"process {jax.process_index()} of {jax.process_count()}: another process of the job "
                 f"is gone ({text[:200]}). {GOES_ON}") from error
    # What all say, all have time to say: a process that leaves unparted takes the others with it.
    if _meet("parting", PARTING_SECONDS):
      # Should one be lost at this very moment, what is said is still what was wrong before.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
    raise
  jax.distributed.shutdown()


def _initialize(place: Place) -> None:
  try:
    jax.distributed.initialize(place.coordinator, place.count, place.index,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    raise UserError(f"--processes=auto: no TPU pod, GKE or Slurm says which process this is ({error}); "
                    "allowed elsewhere: --processes=N --process=I --coordinator=HOST:PORT") from error


def _meet(name: str, seconds: float) -> bool:
  """Whether all other processes come here too, within so many seconds."""
  # JAX has no public barrier with a time limit.
  client = distributed.global_state.client
  if client is None:
    return False
  try:
    client.wait_at_barrier(f"nestnet_{name}", int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def gather(text: str) -> list[str]:
  """The texts of all processes, in the order of the processes.

  Example:
    >>> gather("here")
    ['here']
  """
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(max(lengths.max(), 1), np.uint8)
  padded[:len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes().decode() for row, length in zip(rows, lengths)]


def agree(facts: Callable[[], Mapping[str, Any]], rule: str, tries: int = 1) -> None:
  """Checks that every process holds the same facts.

  Args:
    facts: Gives JSON-able values by name; a process alone does not ask for them.
    rule: What is allowed, for the message.
    tries: How often to ask for facts that may yet become equal, a second apart.

  Raises:
    ValueError: In every process, with each fact that differs.
  """
  if jax.process_count() == 1:
    return
  for left in reversed(range(tries)):
    if not (lines := _differing(facts())):
      return
    if left:
      time.sleep(1)
  raise UserError("the processes of this job differ; " + rule + ":\n" + "\n".join(lines))


def _differing(facts: Mapping[str, Any]) -> list[str]:
  """A line for each fact of a process that is another one in process 0."""
  texts = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
  zero, *others = [json.loads(text) for text in gather(json.dumps(texts))]
  return [f"  {name}: {other.get(name)} in process {index}, {zero.get(name)} in process 0"
          for index, other in enumerate(others, 1) for name in sorted(zero | other)
          if other.get(name) != zero.get(name)]


def led(work: Callable[[], Any]) -> Any:
  """What process 0 gets from `work`, JSON-able, in every process; the others do nothing.

  Raises:
    ValueError: In every process, where `work` raised it in process 0.
  """
  message, value = None, None
  if first():
    try:
      value = work()
    except UserError as error:
      if jax.process_count() == 1:
        raise
      message = str(error)
  message, value = json.loads(gather(json.dumps([message, value]))[0])
  if message is not None:
    raise UserError(message)
  return value


class Stop:
  """Notes SIGTERM (pre-emption) in any process, so that all can save the same step and leave."""

  def __enter__(self) -> Stop:
    self._noted = False
    # JAX handles the signal itself where processes are joined. Elsewhere only the main thread may
    # handle signals; in another one the caller's own handling stands.
    self._handles = (not jax.distributed.is_initialized()
                     and threading.current_thread() is threading.main_thread())
    if self._handles:
      self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def requested(self, step: int) -> bool:
    """Whether to leave after this step; to be asked once a step, by every process."""
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noted

  def _note(self, *_):
    self._noted = True

  def __exit__(self, *_):
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous)
