"""TPU slices by name: what a chip can do, and the devices of a slice that is not here.

Figures of chips: Google Cloud's documentation, cloud.google.com/tpu/docs/ v4, v5e, v5p and v6e (peak
bf16 compute, HBM bandwidth, shapes of slices); Austin et al., How to Scale Your Model,
jax-ml.github.io/scaling-book, "TPU specs" (bandwidth of a link, where links close to a ring). Memory
is what libtpu 0.0.42 leaves to programs, as its own out-of-memory messages state it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from nestnet.errors import Failure, UserError, one_of

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
         "16x16x16")


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do at best.

  Attributes:
    hbm: Bytes of main memory that programs may use.
    flops: bf16 FLOPs in a second.
    bandwidth: Bytes that main memory moves in a second.
    link: Bytes that one link between neighbours carries in a second, one way.
    ring: Links close to a ring along an axis of this length or a multiple of it.
    slices: Shapes of slices, in chips.
  """

  hbm: int
  flops: float
  bandwidth: float
  link: float
  ring: int
  slices: tuple[str, ...]


CHIPS = {
  "v4": Chip(int(30.75 * 2**30), 275e12, 1200e9, 45e9, 4, _DEEP),
  "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 45e9, 16, _FLAT),
  "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 90e9, 4, (*_DEEP, "16x16x24")),
  "v6e": Chip(int(31.25 * 2**30), 918e12, 1638e9, 90e9, 16, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of a pod.

  Attributes:
    name: Such as `v5e:4x4`.
    chip: What one of its chips can do.
    shape: Chips along each physical axis.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  def bandwidth(self, places: Sequence[Sequence[int]]) -> float:
    """Bytes a second that one chip can send to chips of its group, which stand at these places.

    Every physical axis along which the group reaches carries its part: over two links where the
    group fills an axis whose links close to a ring, over one where it is a line.

    Example:
      >>> topology("v5e:16x16").bandwidth([(0, y) for y in range(16)])
      90000000000.0
    """
    total = 0.0
    for axis, size in enumerate(self.shape):
      reach = len({place[axis] for place in places})
      ring = reach == size and size % self.chip.ring == 0
      total += (reach > 1) * (1 + ring) * self.chip.link
    return total


def topology(name: str) -> Topology:
  """A slice by its name, chip and shape.

  Raises:
    ValueError: There is no such slice; lists those that are.

  Example:
    >>> topology("v5e:4x4").chips
    16
  """
  chip, _, shape = name.partition(":")
  if chip not in CHIPS or shape not in CHIPS[chip].slices:
    known = CHIPS if chip not in CHIPS else (chip,)
    raise one_of("topology", name, [f"{c}:{s}" for c in known for s in CHIPS[c].slices])
  return Topology(name, CHIPS[chip], tuple(map(int, shape.split("x"))))


def check_compiler() -> None:
  """Raises `ValueError` where the TPU compiler is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("the TPU compiler, libtpu, is not installed; allowed: a virtual environment after "
                    "`pip install -r requirements-plan.txt`")


def devices(where: Topology) -> list[Any]:
  """The slice's devices, for which programs compile although they are not here.

  Call it in a process with `JAX_PLATFORMS=cpu` and `TPU_SKIP_MDS_QUERY=1` in its environment:
  otherwise libtpu looks for a TPU, and for Google's cloud around it.
  """
  from jax.experimental import topologies
  options: dict[str, Any] = {}
  if where.chips == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if where.name.startswith("v4:"):
    # Both cores of a chip are one device, as JAX on a TPU v4 has them.
    options["chip_config_name"] = "megacore"
  try:
    return list(topologies.get_topology_desc(where.name, "tpu", **options).devices)
  except RuntimeError as error:
    raise Failure(f"libtpu refuses the topology {where.name}: {error}") from error
