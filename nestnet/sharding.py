"""Meshes, and where arrays lie on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nestnet.errors import UserError


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
  """A mesh with the named axes; -1 stands for the devices that the other axes leave.

  Raises:
    ValueError: The sizes do not fit the devices at hand.

  Example:
    >>> make_mesh({"data": 1}).axis_names
    ('data',)
  """
  devices = jax.devices()
  sizes = dict(sizes)
  rest = int(np.prod([s for s in sizes.values() if s != -1]))
  sizes = {name: len(devices) // rest if size == -1 else size for name, size in sizes.items()}
  count = int(np.prod(list(sizes.values())))
  if min(sizes.values()) < 1 or count > len(devices):
    raise UserError(f"mesh {sizes} needs {max(count, rest)} devices, {len(devices)} are here{_among()}")
  if count < len(devices) and jax.process_count() > 1:
    raise UserError(f"mesh {sizes} leaves out devices: it needs {count}, {len(devices)} are here{_among()}; "
                    "allowed with several processes is all of them, such as mesh.data=-1")
  # Library layers are written for automatic propagation; JAX's default axis type is Explicit.
  auto = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


def _among() -> str:
  return f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""


def local(tree: Any) -> Any:
  """The arrays of a tree whole and in this process alone, for work that processes share out.

  Every process must call it: arrays that are sharded are gathered.
  """
  def whole(x: jax.Array) -> jax.Array:
    if not x.is_fully_replicated:
      x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return x.addressable_data(0)

  return tree if jax.process_count() == 1 else jax.tree.map(whole, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """Which part of a batch this process's devices hold, and of how many parts.

  Processes that share a row of the `data` axis, as along a `model` axis, hold the same part.

  Raises:
    ValueError: A part of one process overlaps that of another.
  """
  held: dict[int, set[int]] = {}
  for device, (rows,) in _over_data(mesh).devices_indices_map((mesh.shape["data"],)).items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted(set(map(frozenset, held.values())), key=min)
  if sum(map(len, parts)) > mesh.shape["data"]:
    raise UserError(f"mesh {dict(mesh.shape)}: {mesh.shape['data']} rows of `data` do not divide over "
                    f"{jax.process_count()} processes of {len(mesh.local_devices)} devices")
  return parts.index(frozenset(held[jax.process_index()])), len(parts)


def _over_data(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process's share of a batch, laid over the mesh's `data` axis.

  Raises:
    ValueError: The batch does not divide over the devices.
  """
  share = mesh.shape["data"] // batch_part(mesh)[1]
  for name, value in batch.items():
    if len(value) % share:
      raise UserError(f"batch entry {name!r}: {len(value)} examples in a process do not divide over "
                      f"{share} devices")
  return {name: jax.make_array_from_process_local_data(_over_data(mesh), value)
          for name, value in batch.items()}
