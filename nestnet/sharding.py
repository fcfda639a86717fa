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
    raise UserError(f"mesh {sizes} needs {max(count, rest)} devices, {len(devices)} are here")
  # Library layers are written for automatic propagation; JAX's default axis type is Explicit.
  auto = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


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
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  return {name: jax.make_array_from_process_local_data(sharding, value)
          for name, value in batch.items()}
