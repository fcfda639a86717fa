"""What makes up for a missing part of a layer's input: a rule that `take` applies to sliced kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nestnet.errors import one_of

SCALINGS = ("none", "ratio")


@dataclasses.dataclass(frozen=True)
class WidthRatio:
  """Multiplies a sliced kernel by full over active width of the axes that it contracts (POA, 2408.01031,
  section 3.1).

  There the input of the layer is multiplied, which is the same but for rounding; here the factor is in the
  weights, and so in those of an extracted network.

  Attributes:
    full: The axes, each with the width of the whole network.

  Example:
    >>> import jax.numpy as jnp
    >>> from nestnet.subnet import Subnet
    >>> WidthRatio((("embed", 8),))(jnp.ones(2), Subnet(embed=4)).tolist()
    [2.0, 2.0]
  """

  full: tuple[tuple[str, int], ...]

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes whose widths it reads."""
    return tuple(axis for axis, _ in self.full)

  def __call__(self, leaf: Any, subnet: Mapping[str, int]) -> Any:
    ratio = math.prod(full / subnet.get(axis, full) for axis, full in self.full)
    return leaf if ratio == 1 else leaf * ratio


def scaling_rule(scaling: str, widths: Mapping[str, int]) -> WidthRatio | None:
  """The rule of a kernel that contracts axes of some widths.

  Args:
    scaling: `"ratio"`, or `"none"` for no rule.
    widths: The widths of the contracted axes; fixed ones, which are numerals, are left out.

  Raises:
    ValueError: Another `scaling`.
  """
  check_scaling(scaling)
  full = tuple((axis, width) for axis, width in widths.items() if not axis.isdigit())
  return WidthRatio(full) if scaling == "ratio" and full else None


def check_scaling(scaling: str) -> None:
  """Raises `ValueError` for an unknown scaling of widths."""
  if scaling not in SCALINGS:
    raise one_of("width_scaling", scaling, SCALINGS)
