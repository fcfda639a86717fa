"""Meshes, and where arrays lie on them, by the names of their axes.

A mesh has three axes. `data` and `fsdp` share out the batch. `fsdp` also shares out the storage of
weights: a layer's are gathered whole before they are used. `model` shares out heads and hidden units
themselves (tensor parallelism): with groups of units that it divides, a sub-network is a part of what
each device holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from nestnet.axes import Axes, is_axes
from nestnet.errors import UserError
from nestnet.space import Space
from nestnet.subnet import is_depth

MESH_AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))
# Axes of parameters that lie over `model`; of several in one array, the first.
MODEL_AXES = ("heads", "kv_heads", "mlp", "vocab")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with the axes `data`, `fsdp` and `model`.

  Args:
    sizes: Of each axis, 1 where there is none; -1 stands for the devices that the others leave.
    devices: What to lay it over; by default those of this run.

  Raises:
    ValueError: The sizes do not fit the devices.

  Example:
    >>> dict(make_mesh({"data": 1}).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {name: 1 for name in MESH_AXES} | dict(sizes)
  rest = math.prod(s for s in sizes.values() if s != -1)
  sizes = {name: len(devices) // rest if size == -1 else size for name, size in sizes.items()}
  count = math.prod(sizes.values())
  if min(sizes.values()) < 1 or count > len(devices):
    raise UserError(f"mesh {sizes} needs {max(count, rest)} devices, {len(devices)} are here{_among()}")
  if count < len(devices) and jax.process_count() > 1:
    raise UserError(f"mesh {sizes} leaves out devices: it needs {count}, {len(devices)} are here{_among()}; "
                    "allowed with several processes is all of them, such as mesh.data=-1")
  # Library layers are written for automatic propagation; JAX's default axis type is Explicit.
  auto = (AxisType.Auto,) * len(sizes)
  # A TPU's physical axes may have to be split, such as 4 x 4 chips for 8 x 2; `jax.make_mesh` refuses.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices[:count], allow_split_physical_axes=True)
  return Mesh(grid, tuple(sizes), axis_types=auto)


def check_mesh(mesh: Mesh, axes: Any, shapes: Any, space: Space) -> None:
  """Raises `ValueError` where weights, or what a sub-network keeps of them, do not divide over a mesh.

  Args:
    mesh: The mesh.
    axes: Axis names of the parameters.
    shapes: The parameters, abstract.
    space: The family.
  """
  model, fsdp = mesh.shape["model"], mesh.shape["fsdp"]
  leaves = [(Axes.of(a), x.shape) for a, x in zip(
    jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True)]
  over = {names.names[d]: shape[d] for names, shape in leaves
          if (d := _model_dimension(names)) is not None}
  if model > 1 and not over:
    raise UserError(f"mesh.model={model}: no parameter has an axis that lies over model: "
                    f"{', '.join(MODEL_AXES)}; allowed is mesh.model=1")
  for axis, size in over.items() if model > 1 else ():
    sizes = space.sizes(axis) if axis in space.axes else (size,)
    common, groups = math.gcd(*sizes), space.groups.get(axis, 1)
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    if axis not in space.axes:
      if size % model:
        raise UserError(f"mesh.model={model} does not divide {axis}={size}; allowed are {fitting}")
    elif groups % model:
      allowed = [g for g in fitting if g % model == 0]
      raise UserError(
        f"mesh.model={model} does not divide the groups of {axis}, {groups}: a sub-network must keep an "
        f"equal part on each device. Its sizes {sizes} allow " + (
          f"space.groups.{axis} of {allowed}" if allowed else f"mesh.model of {fitting}"))
  if fsdp > 1 and all(_fsdp_dimension(names, shape, fsdp) is None for names, shape in leaves):
    raise UserError(f"mesh.fsdp={fsdp} divides no axis of the parameters, whose sizes are "
                    f"{sorted({n for _, shape in leaves for n in shape})}")


def place(axes: Any, shapes: Any, mesh: Mesh) -> Any:
  """Where the arrays of a tree lie: a tree of `NamedSharding`.

  Args:
    axes: The tree's axis names.
    shapes: The tree, abstract; of the largest network.
    mesh: The mesh.
  """
  return _map(lambda names, x: NamedSharding(mesh, _spec(names, x.shape, mesh)), axes, shapes)


def gatherer(axes: Any, shapes: Any, mesh: Mesh) -> Callable[[Any], Any]:
  """The function that makes arrays whole which `fsdp` shares out; derivatives go back to their shares.

  Args:
    axes: Axis names of the tree that it is for.
    shapes: That tree, abstract; of the largest network.
    mesh: The mesh.
  """
  shares = _map(lambda names, x: _spec(names, x.shape, mesh), axes, shapes)
  wholes = jax.tree.map(lambda spec: P(*(None if place == "fsdp" else place for place in spec)), shares,
                        is_leaf=_is_spec)

  def lay(tree, specs):
    # Inside `shard_map` the mesh of the context says which axes are the partitioner's.
    context = jax.sharding.get_abstract_mesh()
    on = mesh if context.empty else context
    return jax.tree.map(lambda spec, x: jax.lax.with_sharding_constraint(x, NamedSharding(on, spec)),
                        specs, tree, is_leaf=_is_spec)

  gather = jax.custom_vjp(lambda tree: lay(tree, wholes))
  # Whole first: else the partitioner would lay out a cut's derivative in shares before it pads it.
  gather.defvjp(lambda tree: (lay(tree, wholes), None),
                lambda _, cotangents: (lay(lay(cotangents, wholes), shares),))
  return gather


def _among() -> str:
  return f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""


def local(tree: Any) -> Any:
  """The arrays of a tree whole and on one device of this process, as a network on its own has them.

  Every process must call it: arrays that are sharded are gathered.
  """
  def whole(x: jax.Array) -> jax.Array:
    if not x.is_fully_replicated:
      x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return x.addressable_data(0)

  return jax.tree.map(whole, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch lies on a mesh."""
  return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
  """Over how many devices a batch is shared out."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """Which part of a batch this process's devices hold, and of how many parts.

  Processes whose devices stand in one row of the `model` axis hold the same part.

  Raises:
    ValueError: A part of one process overlaps that of another.
  """
  held: dict[int, set[int]] = {}
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch_shards(mesh),)).items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted(set(map(frozenset, held.values())), key=min)
  if sum(map(len, parts)) > batch_shards(mesh):
    raise UserError(f"mesh {dict(mesh.shape)}: {batch_shards(mesh)} shares of a batch do not divide over "
                    f"{jax.process_count()} processes of {len(mesh.local_devices)} devices")
  return parts.index(frozenset(held[jax.process_index()])), len(parts)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process's share of a batch, laid over the mesh.

  Raises:
    ValueError: The batch does not divide over the devices.
  """
  share = batch_shards(mesh) // batch_part(mesh)[1]
  for name, value in batch.items():
    if len(value) % share:
      raise UserError(f"batch entry {name!r}: {len(value)} examples in a process do not divide over "
                      f"{share} devices")
  return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), value)
          for name, value in batch.items()}


def _spec(names: Axes, shape: Sequence[int], mesh: Mesh) -> P:
  places: list[str | None] = [None] * len(shape)
  model, fsdp = _model_dimension(names), _fsdp_dimension(names, shape, mesh.shape["fsdp"])
  if mesh.shape["model"] > 1 and model is not None:
    places[model] = "model"
  if mesh.shape["fsdp"] > 1 and fsdp is not None:
    places[fsdp] = "fsdp"
  return P(*places)


def _model_dimension(names: Axes) -> int | None:
  return next((d for d, name in enumerate(names.names) if name in MODEL_AXES), None)


def _fsdp_dimension(names: Axes, shape: Sequence[int], fsdp: int) -> int | None:
  """The largest dimension that divides; vectors are too small to be worth a collective."""
  model = _model_dimension(names)
  inside = [d for d, name in enumerate(names.names) if not (isinstance(name, str) and is_depth(name))]
  free = [d for d in inside if d != model and shape[d] % fsdp == 0]
  return max(free, key=lambda d: shape[d], default=None) if len(inside) > 1 else None


def _map(function, axes, tree):
  return jax.tree.map(lambda names, x: function(Axes.of(names), x), axes, tree, is_leaf=is_axes)


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)
