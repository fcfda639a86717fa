"""A member of a nested family: which size, which layers, along which axis."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nestnet.errors import UserError

Size = int | tuple[int, ...]

# Axes of the images that a network is given, not of its parameters: the side, in pixels.
INPUTS = ("resolution",)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """Several sizes of a field, of which data says which one each layer has.

  Attributes:
    axes: Each axis that is chosen along, and its sizes, in rising order.
    values: What the field is for each combination of these.
    sites: Where what is cut by such choices stands, by path (`nestnet.models.switch.Site`).

  Example:
    >>> width, expand = OneOf.along("width", (8, 16)), OneOf.along("expand", (3, 6))
    >>> derived(width, lambda width, expand: width * expand, expand).value({"width": 16, "expand": 3})
    48
  """

  axes: tuple[tuple[str, tuple[int, ...]], ...]
  values: tuple[int, ...]
  sites: Mapping[tuple[str, ...], Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

  @classmethod
  def along(cls, axis: str, sizes: tuple[int, ...], sites: Mapping[tuple[str, ...], Any] | None = None
            ) -> OneOf:
    """A field that is what was chosen along one axis."""
    return cls(((axis, sizes),), sizes, sites or {})

  def value(self, choice: Mapping[str, int]) -> int:
    """The field where these sizes are chosen, of other axes too."""
    index = 0
    for axis, sizes in self.axes:
      index = index * len(sizes) + sizes.index(choice[axis])
    return self.values[index]


def is_data(size: Any) -> bool:
  """Whether data says which of several a size is."""
  return isinstance(size, OneOf) and len(set(size.values)) > 1


def derived(size: Any, function: Callable[..., int], *others: Any) -> Any:
  """What follows from a size; from each size of a list, or from each that data chooses from.

  Args:
    size: A size, one for each layer, or `OneOf` several.
    function: Of a size, then of the others.
    *others: Further sizes, or `OneOf` several.

  Example:
    >>> derived(3, lambda n: n + 1), derived((1, 2), lambda n, m: n + m, 4)
    (4, (5, 6))
  """
  if isinstance(size, tuple):
    return tuple(derived(own, function, *others) for own in size)
  sizes = (size, *others)
  several = [own for own in sizes if isinstance(own, OneOf)]
  if not several:
    return function(*sizes)
  axes = dict(pair for own in several for pair in own.axes)
  values = []
  for row in itertools.product(*axes.values()):
    choice = dict(zip(axes, row))
    values.append(function(*(own.value(choice) if isinstance(own, OneOf) else own for own in sizes)))
  return OneOf(tuple(axes.items()), tuple(values), several[0].sites)


_AXIS = re.compile(r"[A-Za-z_]\w*")
_DEPTH = re.compile(r"layers(_\d+)?")
_VALUE = re.compile(r"\d+|\+\d+|\d+(\+\d+)+|\d+:|\d+(:\d+)+")


def is_depth(axis: str) -> bool:
  """Whether `axis` counts layers: `layers`, or `layers_2` for a stage of its own."""
  return _DEPTH.fullmatch(axis) is not None


def depth_of(axis: str) -> str:
  """The depth axis whose layers a per-layer `axis` is listed over: `expand_2` -> `layers_2`."""
  stage = re.search(r"_\d+$", axis)
  return "layers" + (stage.group() if stage else "")


def kind_of(axis: str) -> str:
  """What the axes of several stages have in common: `expand_2` -> `expand`."""
  return re.sub(r"_\d+$", "", axis)


def kept_ids(size: Size) -> tuple[int, ...]:
  """The layer ids that a size along a depth axis stands for."""
  return tuple(range(size)) if isinstance(size, int) else size


def reach(axis: str, size: Size) -> int:
  """How long an axis must be for `size` to be cut from it."""
  return size if isinstance(size, int) else max(size) + is_depth(axis)


def kept_count(size: Size) -> int:
  """How many layers a size along a depth axis keeps."""
  return size if isinstance(size, int) else len(size)


class Subnet(Mapping[str, Size]):
  """A sub-network: a frozen, hashable mapping from axis name to size.

  As a mapping it yields the fields of the small module, so `model.clone(**subnet)` is that
  module; `chosen` says which layers and units they are.

  A size is an int (the leading units), a tuple of ids on a depth axis (`layers=(0, 2, 4)`), or a
  tuple with one size for each kept layer on any other (`mlp=(96, 192, 96)`). Ids that are a
  prefix and lists that are uniform are stored as the int that they mean.

  Example:
    >>> small = Subnet(layers=(0, 2, 4), embed=48)
    >>> str(small)
    'layers=0+2+4,embed=48'
    >>> dict(small)
    {'layers': 3, 'embed': 48}
    >>> Subnet.parse("embed=48,layers=0+2+4") == small
    True
  """

  __slots__ = ("_chosen", "_key")

  def __init__(self, /, **sizes: int | Sequence[int]):
    """Raises `ValueError` for sizes that are not positive, ids that do not increase, and per-layer
    lists of another length than the layers."""
    chosen = {axis: _size(axis, value) for axis, value in sizes.items()}
    for axis, value in chosen.items():
      depth = chosen.get(depth_of(axis))
      if is_depth(axis) or isinstance(value, int) or depth is None:
        continue
      if len(value) != kept_count(depth):
        raise UserError(f"{axis}={_text(axis, value)} lists {len(value)} layers, but "
                        f"{depth_of(axis)} keeps {kept_count(depth)}")
      if len(set(value)) == 1:
        chosen[axis] = value[0]
    object.__setattr__(self, "_chosen", MappingProxyType(chosen))
    object.__setattr__(self, "_key", frozenset(chosen.items()))

  def __setattr__(self, name, value):
    raise AttributeError(
      f"a Subnet is frozen; make another: Subnet(**{{**subnet.chosen, {name!r}: ...}})")

  @classmethod
  def parse(cls, text: str) -> Subnet:
    """Reads the text form, such as `layers=0+2+4,embed=48,mlp=96:192:96`.

    Raises:
      ValueError: The text is not a list of `axis=size`, or names an axis twice.
    """
    sizes: dict[str, Size] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
      axis, _, value = (part.strip() for part in item.partition("="))
      if not _VALUE.fullmatch(value):
        raise UserError(
          f"sub-network {text!r}: {item!r} is not axis=size; allowed are a size (layers=4), layer "
          "ids (layers=0+2+4) and one size a layer (mlp=96:192:96); of a space, smallest and largest")
      if axis in sizes:
        raise UserError(f"sub-network {text!r}: {axis} is given twice")
      separator = "+" if "+" in value else ":"
      parts = tuple(int(n) for n in value.split(separator) if n)
      if separator in value and is_depth(axis) != (separator == "+"):
        raise UserError(f"sub-network {text!r}: {item!r} mixes two forms; layer ids are joined by "
                        "'+' on a layers axis, sizes of layers by ':' on any other")
      sizes[axis] = parts if separator in value else parts[0]
    return cls(**sizes)

  @property
  def chosen(self) -> Mapping[str, Size]:
    """What was chosen along each axis: an int, layer ids, or one size a layer."""
    return self._chosen

  @property
  def of_model(self) -> Subnet:
    """Without what steers its inputs: the sizes of the module and of its parameters."""
    return Subnet(**{a: s for a, s in self._chosen.items() if a not in INPUTS})

  def layer(self, depth: str, position: int) -> Subnet:
    """The sizes of one kept layer: lists over `depth` become that layer's entry."""
    return Subnet(**{
      axis: value[position] if isinstance(value, tuple) and depth_of(axis) == depth else value
      for axis, value in self._chosen.items() if axis != depth})

  def behind(self, depth: str, first: int, ids: Sequence[int]) -> Subnet:
    """What remains of `depth` behind its first layers: the layers `ids`, with their entries of lists."""
    return Subnet(**{
      axis: tuple(value[first:]) if isinstance(value, tuple) and depth_of(axis) == depth else value
      for axis, value in self._chosen.items() if axis != depth}, **{depth: tuple(ids)})

  def per_layer(self, depth: str) -> bool:
    """Whether some axis has its own size in each layer of `depth`."""
    return any(isinstance(value, tuple) and not is_depth(axis) and depth_of(axis) == depth
               for axis, value in self._chosen.items())

  def within(self, outer: Subnet) -> Subnet:
    """This sub-network in the coordinates of `outer`, which contains it.

    `take(take(p, axes, a), axes_of_a, b.within(a)) == take(p, axes, b)`.

    Raises:
      ValueError: This sub-network is not inside `outer`.

    Example:
      >>> str(Subnet(layers=(0, 4), embed=32).within(Subnet(layers=(0, 2, 4), embed=48)))
      'layers=0+2,embed=32'
    """
    def refuse(axis):
      raise UserError(f"{self} is not inside {outer}: {axis}")

    rebased, kept = {}, {}
    for axis in {**outer.chosen, **self._chosen}:
      if is_depth(axis):
        ids = kept_ids(self._chosen[axis]) if axis in self._chosen else None
        outer_ids = kept_ids(outer.chosen[axis]) if axis in outer.chosen else None
        if ids is None or (outer_ids is not None and not set(ids) <= set(outer_ids)):
          refuse(axis)
        kept[axis] = ids if outer_ids is None else tuple(outer_ids.index(i) for i in ids)
        rebased[axis] = kept[axis]
    for axis in {**outer.chosen, **self._chosen}:
      if is_depth(axis):
        continue
      if axis not in self._chosen:
        refuse(axis)
      size, limit = self._chosen[axis], outer.chosen.get(axis)
      positions = kept.get(depth_of(axis))
      if isinstance(limit, tuple) and positions is not None:
        if positions[-1] >= len(limit):
          refuse(axis)
        limit = tuple(limit[i] for i in positions)
      if limit is not None:
        sizes, limits = _broadcast(size, limit)
        if len(sizes) != len(limits) or any(s > m for s, m in zip(sizes, limits)):
          refuse(axis)
      rebased[axis] = size
    return Subnet(**{axis: rebased[axis] for axis in self._chosen})

  def __getitem__(self, axis: str) -> Size:
    value = self._chosen[axis]
    return kept_count(value) if is_depth(axis) else value

  def __iter__(self) -> Iterator[str]:
    return iter(self._chosen)

  def __len__(self) -> int:
    return len(self._chosen)

  def __eq__(self, other: object) -> bool:
    return self._key == other._key if isinstance(other, Subnet) else NotImplemented

  def __hash__(self) -> int:
    return hash(self._key)

  def __str__(self) -> str:
    return ",".join(f"{axis}={_text(axis, value)}" for axis, value in self._chosen.items())

  def __repr__(self) -> str:
    return f"Subnet({str(self)!r})"

  def __reduce__(self):
    return _restore, (dict(self._chosen),)

  def to_json(self) -> dict[str, int | list[int]]:
    """A JSON form, read back by `Subnet(**json)`."""
    return {a: list(v) if isinstance(v, tuple) else v for a, v in self._chosen.items()}


def folded(subnet: Subnet | str) -> str:
  """The text of a sub-network for people, in which equal sizes of all stages are said once.

  A space reads it back. A text in which nothing can be folded stays as it is.

  Example:
    >>> folded("layers_1=2,layers_2=2,expand_1=3:4,expand_2=6,embed=8")
    'layers=2,expand_1=3:4,expand_2=6,embed=8'
  """
  sizes = {axis: mark + size for axis, mark, size in (item.partition("=") for item in str(subnet).split(","))}
  stages: dict[str, dict[str, str]] = {}
  for axis, size in sizes.items():
    stages.setdefault(kind_of(axis), {})[axis] = size
  same = {kind for kind, own in stages.items()
          if len(own) > 1 and kind not in own and len(set(own.values())) == 1}
  shown = {kind if (kind := kind_of(axis)) in same else axis: size for axis, size in sizes.items()}
  return ",".join(axis + size for axis, size in shown.items())


def unfolded(subnet: Subnet, axes: Collection[str]) -> Subnet:
  """The sub-network with a size that is given for all stages written out for each; that of a stage wins.

  Args:
    subnet: Some sizes.
    axes: Of the family.

  Example:
    >>> str(unfolded(Subnet(layers=2, layers_2=3), ("layers_1", "layers_2", "layers_3")))
    'layers_1=2,layers_3=2,layers_2=3'
  """
  stages = {axis: kind for axis in axes if (kind := kind_of(axis)) not in axes and kind in subnet.chosen}
  own = {axis: size for axis, size in subnet.chosen.items() if axis not in stages.values()}
  return Subnet(**{axis: subnet.chosen[kind] for axis, kind in stages.items() if axis not in own}, **own)


def _restore(chosen: dict[str, Size]) -> Subnet:
  return Subnet(**chosen)


def _broadcast(a: Size, b: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
  length = max(len(v) if isinstance(v, tuple) else 1 for v in (a, b))
  return tuple(v if isinstance(v, tuple) else (v,) * length for v in (a, b))


def _size(axis: str, value: int | Sequence[int]) -> Size:
  if not _AXIS.fullmatch(axis):
    raise UserError(f"axis {axis!r}: a name of letters, digits and _ is allowed")
  numbers = value if isinstance(value, (tuple, list)) else (value,)
  whole = all(hasattr(n, "__index__") and not isinstance(n, bool) for n in numbers)
  least = 0 if is_depth(axis) and numbers is value else 1
  if not whole or not numbers or any(n < least for n in numbers):
    raise UserError(
      f"{axis}={value!r}: a whole number of at least {least} is allowed, or a list of them")
  numbers = tuple(int(n) for n in numbers)
  if not isinstance(value, (tuple, list)):
    return numbers[0]
  if is_depth(axis):
    if any(a >= b for a, b in zip(numbers, numbers[1:])):
      raise UserError(f"{axis}={list(numbers)}: layer ids must increase")
    return len(numbers) if numbers == tuple(range(len(numbers))) else numbers
  return numbers


def _text(axis: str, value: Size) -> str:
  if isinstance(value, int):
    return str(value)
  separator = "+" if is_depth(axis) else ":"
  if len(value) == 1:
    return f"+{value[0]}" if is_depth(axis) else f"{value[0]}:"
  return separator.join(map(str, value))
