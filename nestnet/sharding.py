"""Meshes, and where arrays lie on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nestnet.errors import UserError


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with the named axes; -1 stands for the devices that the other axes leave.

  Args:
    sizes: Of each axis.
    devices: To lay it over; those of this run by default.

  Raises:
    ValueError: The sizes do not fit the devices at hand.

  Example:
    >>> make_mesh({"data": 1}).axis_names
    ('data',)
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(sizes)
  rest = int(np.prod([s for s in sizes.values() if s != -1]))
  sizes = {name: len(devices) // rest if size == -1 else size for name, size in sizes.items()}
  count = int(np.prod(list(sizes.values())))
  if min(sizes.values()) < 1 or count > len(devices):
    raise UserError(f"mesh {sizes} needs {max(count, rest)} devices, {len(devices)} are here")
  # Library layers are written for automatic propagation; JAX's default axis type is Explicit.
  auto = (AxisType.Auto,) * len(sizes)
  # A TPU's physical axes may have to be split, such as 4 x 4 chips for 8 x 2; `jax.make_mesh` refuses.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices[:count], allow_split_physical_axes=True)
  return Mesh(grid, tuple(sizes), axis_types=auto)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process's share of a batch, laid over the mesh's `data` axis.

  Raises:
    ValueError: The batch does not divide over the devices.
  """
  share = mesh.shape["data"] // jax.process_count()
  for name, value in batch.items():
    if len(value) % share:
      raise UserError(f"batch entry {name!r}: {len(value)} examples in a process do not divide over "
                      f"{share} devices")
  return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), value)
          for name, value in batch.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch lies on a mesh."""
  return NamedSharding(mesh, PartitionSpec("data"))
