"""Members that tables show beside those of a space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestnet.choices import least_slope
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.subnet import Subnet, depth_of


def members(config: Mapping[str, Any], family: Supernet) -> tuple[Subnet, ...]:
  """The members that `config.eval` names; beside a network that trains alone there is none.

  They are those of `members`, in text form, and the mixtures along the axis `mix`.

  Raises:
    ValueError: One is outside the space, or lists sizes of more or fewer layers than it has.
  """
  if "subnet" in config["recipe"]:
    return ()
  options, found = config.get("eval") or {}, []
  for key, read in (("members", list), ("mix", lambda axis: mixtures(family, axis))):
    try:
      for spec in read(options[key]) if options.get(key) else ():
        found.append(family.space.subnet(spec))
        # Only where weights are cut a list is seen to be of another number of layers.
        family.cut({"params": family.shapes["params"]}, found[-1])
    except UserError as error:
      raise UserError(f"config.eval.{key}: {error}") from None
  return tuple(dict.fromkeys(found))


def mixtures(family: Supernet, axis: str) -> list[dict[str, Any]]:
  """Of each two neighbouring sizes of an axis a member with the smaller one in the first half of its layers.

  This is the middle of what MatFormer's Mix'n'Match takes from between them (2310.07707, section 3.3).

  Raises:
    ValueError: An unknown axis.
  """
  layers = getattr(family.model, depth_of(axis), 1)
  rows = least_slope(layers, family.space.choices(axis))
  return [{axis: widths} for _, widths in rows[layers // 2:-1:layers]]
