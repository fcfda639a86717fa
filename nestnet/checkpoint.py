"""Checkpoints that are verified; the only file that knows Orbax.

Orbax brings the asynchronous, atomic and sharded write. This file adds what it lacks: a checksum
of every leaf and of every file, so that a flipped byte is noticed; a record of what was saved, so
that another model's checkpoint is refused instead of being cut or padded with zeros; and the way
back to an older checkpoint when the newest is damaged.

A step holds two items: `state` (the arrays by name, their checksums, `files.json`) and `record`
(what every leaf is, and Python scalars).
"""

from __future__ import annotations

import json
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from nestnet import errors, processes

PyTree = Any
_SCALARS = (bool, int, float, str)
_FILES = "files.json"


class _Damaged(Exception):
  """A checkpoint that cannot be restored exactly."""


def checksum(x: jax.Array) -> jax.Array:
  """Sums the bits of an array, each word times an odd constant of its own position, modulo 2**32.

  The sum depends on the order of the elements, not on how they are sharded. Odd constants are
  invertible modulo 2**32, so any change within one word, and thus any flipped bit, changes it.

  Args:
    x: an array of any shape and data type.

  Returns:
    A uint32 scalar, computed on the devices of `x`.

  Example:
    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> int(checksum(x)) == int(checksum(x.at[1, 2].set(5.0000005)))
    False
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  # Positions are counted dimension by dimension: flattening would gather a sharded array.
  position = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = jnp.uint32(math.prod(words.shape[axis + 1:]) % 2**32)
    position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
  factor = position * jnp.uint32(0x9E3779B1)
  factor = (factor ^ (factor >> 15)) * jnp.uint32(0x85EBCA6B)
  return jnp.sum(words * (factor ^ (factor >> 13) | 1), dtype=jnp.uint32)


@jax.jit
def _checksums(arrays: Mapping[str, jax.Array]) -> jax.Array:
  """The checksums of arrays, in the order of their names."""
  return jnp.stack([checksum(arrays[name]) for name in sorted(arrays)])


def _file_crc32(path: pathlib.Path) -> int:
  crc32 = 0
  with path.open("rb") as file:
    while block := file.read(2**22):
      crc32 = zlib.crc32(block, crc32)
  return crc32


class _StateHandler(ocp.StandardCheckpointHandler):
  """Writes the checksums of the files beside them, before the checkpoint gets its final name."""

  def finalize(self, directory: Any) -> None:
    super().finalize(directory)
    if jax.process_index() == 0:
      directory = pathlib.Path(directory)
      files = {str(path.relative_to(directory)): _file_crc32(path)
               for path in sorted(directory.rglob("*")) if path.is_file()}
      (directory / _FILES).write_text(json.dumps(files))


def _check_files(directory: pathlib.Path) -> None:
  """Raises where a file is not what was written; one process reads for all.

  Done before Orbax reads: on damaged files it raises bare Exceptions, and its tasks that fail
  later leave tracebacks on the terminal.
  """
  try:
    files = json.loads((directory / _FILES).read_bytes())
  except (OSError, ValueError) as error:
    raise _Damaged(f"file {_FILES}: {error}") from error
  for name, crc32 in files.items():
    path = directory / name
    if not path.is_file():
      raise _Damaged(f"file {name} is missing")
    if _file_crc32(path) != crc32:
      raise _Damaged(f"file {name}: the checksum differs")


class Checkpoints:
  """The checkpoints of one run: `<directory>/<step>`, the newest `keep` of them.

  Opening and restoring write nothing, so a running training may be read. The first save removes
  what killed saves left behind and moves checkpoints found damaged to `<directory>/damaged-<step>`.

  Example:
    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpoints(directory) as checkpoints:
    ...   checkpoints.save(7, {"w": jnp.arange(3.0)})
    >>> with Checkpoints(directory) as checkpoints:
    ...   step, state = checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    >>> step, state["w"]
    (7, Array([0., 1., 2.], dtype=float32))
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 2):
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._damaged: dict[int, str] = {}
    self._writing = False
    self._manager = self._open()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the last save, then releases its threads."""
    self.wait()
    self._manager.close()

  @property
  def steps(self) -> list[int]:
    """The saved steps in ascending order, without those found damaged."""
    return sorted(step for step in self._manager.all_steps() if step not in self._damaged)

  def wait(self) -> None:
    """Waits until the last save is on disk; raises what made it fail."""
    self._manager.wait_until_finished()

  def save(self, step: int, state: PyTree) -> None:
    """Starts to save a state and returns; waits first where the previous save is still running.

    The state's buffers may be donated as soon as this returns. A checkpoint of the same step is
    replaced. A failure to write is raised by the next call of `save`, `wait` or `close`.

    Args:
      step: the step that the state has completed.
      state: a pytree of arrays, sharded in any way, random keys and Python scalars.

    Raises:
      ValueError: two leaves have the same path, or a NumPy leaf's data type is none of JAX's.
    """
    leaves = _leaves(state)
    scalars = {name: x for name, x in leaves.items() if isinstance(x, _SCALARS)}
    arrays = {name: _to_jax(name, x) for name, x in leaves.items() if name not in scalars}
    keys = {name: str(jax.random.key_impl(x)) for name, x in arrays.items() if _is_key(x)}
    arrays.update({name: jax.random.key_data(arrays[name]) for name in keys})
    record = {
        "leaves": {name: _spec(x) for name, x in leaves.items()},
        "scalars": scalars,
        "keys": keys,
    }
    record = json.loads(json.dumps(record))
    self.wait()
    if self._damaged or not self._writing:
      self._start_writing()
    if step in self._manager.all_steps():
      self._manager.delete(step)
    # Orbax refuses arrays without elements; their record says all there is to know.
    arrays = {name: x for name, x in arrays.items() if x.size}
    self._manager.save(step, force=True, args=ocp.args.Composite(
        state=ocp.args.StandardSave({"arrays": arrays, "checksums": _checksums(arrays)}),
        record=ocp.args.JsonSave({**record, "crc32": _crc32(record)})))

  def restore(self, abstract_state: PyTree | Callable[[int], PyTree]) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that is intact.

    Args:
      abstract_state: the structure to fill: a `jax.ShapeDtypeStruct` with its sharding (the first
        device where it has none) or an array for each array, a Python scalar for each scalar. Or
        a function from the step to it, where a run's states change shape.

    Returns:
      The step and its state, or None where nothing was ever saved.

    Raises:
      ValueError: a checkpoint holds leaves of other names, shapes or types, which are listed; or
        checkpoints are there, and all are damaged.
    """
    self.wait()
    for step in reversed(self.steps):
      wanted = abstract_state(step) if callable(abstract_state) else abstract_state
      try:
        record = self._verified(step)
        self._check_same(step, record["leaves"], wanted)
        return step, self._read(step, record, wanted)
      except _Damaged as damage:
        self._damaged[step] = str(damage)
        if processes.first():
          logging.warning("checkpoint %d in %s is damaged and skipped: %s", step, self._directory,
                          damage)
    if self._damaged:
      raise errors.UserError(
          f"every checkpoint in {self._directory} is damaged; nothing was changed there. "
          + "; ".join(f"step {step}: {damage}" for step, damage in self._damaged.items()))
    return None

  def _open(self) -> ocp.CheckpointManager:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = _StateHandler()
    registry.add("state", ocp.args.StandardSave, handler)
    registry.add("state", ocp.args.StandardRestore, handler)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep, create=self._writing, save_root_metadata=False,
        cleanup_tmp_directories=self._writing)
    return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)

  def _start_writing(self) -> None:
    """Brings the directory in order and opens it for writing."""
    self._manager.close()
    if jax.process_index() == 0:
      for step in self._damaged:
        aside = self._directory / f"damaged-{step}"
        while aside.exists():
          aside = aside.with_name(aside.name + "+")
        (self._directory / str(step)).rename(aside)
    ocp.multihost.sync_global_processes("nestnet_checkpoints_in_order")
    self._damaged = {}
    self._writing = True
    self._manager = self._open()

  def _verified(self, step: int) -> dict[str, Any]:
    """The record of a step whose files are whole in the eyes of every process."""
    record, damage = {}, ""
    try:
      record = self._record(step)
      if processes.first():
        _check_files(self._directory / str(step) / "state")
    except _Damaged as found:
      damage = str(found)
    # Arrays are read by all processes together, or by none.
    if damage := next(filter(None, processes.gather(damage)), ""):
      raise _Damaged(damage)
    return record

  def _record(self, step: int) -> dict[str, Any]:
    """Reads what was saved at a step, verified."""
    try:
      record = dict(self._manager.restore(
          step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"])
      crc32 = record.pop("crc32")
    except (OSError, KeyError, ValueError) as error:
      raise _Damaged(f"record: {' '.join(str(error).split())}") from error
    if crc32 != _crc32(record):
      raise _Damaged("record: the checksum differs")
    return record

  def _check_same(self, step: int, stored: Mapping[str, str], abstract_state: PyTree) -> None:
    """Raises where the stored leaves are not those of `abstract_state`."""
    expected = {name: _spec(x) for name, x in _leaves(abstract_state).items()}
    different = [
        f"{name}: stored {stored.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)]
    if different:
      raise errors.UserError(
          f"checkpoint {step} in {self._directory} is of another state; {len(different)} of "
          f"{len(stored.keys() | expected.keys())} leaves differ:\n  " + "\n  ".join(different))

  def _read(self, step: int, record: Mapping[str, Any], abstract_state: PyTree) -> PyTree:
    """Restores the leaves of a step whose record fits `abstract_state`, and verifies them."""
    state = {**_leaves(abstract_state), **record["scalars"]}
    wanted = {name: _abstract_data(x) for name, x in state.items()
              if name not in record["scalars"]}
    arrays = {name: x for name, x in wanted.items() if x.size}
    sums = np.zeros(len(arrays), np.uint32)
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore({"arrays": arrays, "checksums": sums})))["state"]
    found = np.asarray(_checksums(restored["arrays"]))
    if (wrong := np.flatnonzero(found != restored["checksums"])).size:
      raise _Damaged(f"the checksum of leaf {sorted(arrays)[wrong[0]]} differs")
    for name, x in wanted.items():
      data = restored["arrays"][name] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding)
      impl = record["keys"].get(name)
      state[name] = jax.random.wrap_key_data(data, impl=impl) if impl else data
    return jax.tree.unflatten(jax.tree.structure(abstract_state), state.values())


def _leaves(tree: PyTree) -> dict[str, Any]:
  """Names the leaves of a tree by their paths, in the tree's order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
  if len(leaves) != len(flat):
    raise errors.UserError("two leaves of the state have the same path: " + ", ".join(leaves))
  return leaves


def _spec(x: Any) -> str:
  """Says what a leaf is: `float32[3,4]`, or the name of a scalar's type."""
  if isinstance(x, _SCALARS):
    return type(x).__name__
  return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_jax(name: str, x: Any) -> jax.Array:
  array = jnp.asarray(x)
  if array.dtype != x.dtype:
    raise errors.UserError(f"leaf {name} is {x.dtype}, which JAX would store as {array.dtype}")
  return array


def _abstract_data(x: Any) -> jax.ShapeDtypeStruct:
  """The abstract array to restore for a leaf, with a sharding; for random keys, their data."""
  data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
  sharding = getattr(x, "sharding", None) or _first_device()
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _first_device() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _crc32(record: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())

