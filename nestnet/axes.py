"""Names of parameter axes, written once where a parameter is made.

An axis name stands for a space of activations, never for a size: every array that reads or
writes the residual stream has a dimension called `embed`, whatever its length. The same names
say what a sub-network keeps (`nestnet.slicing.take`) and how an array is sharded.

A name has a role. Written as an arrow, contracted (in) axes stand on one side and produced (out)
axes on the other:

    embed -> heads 3 head_dim      a kernel that reads `embed`; a numeral is a fixed size
    -> mlp                         a bias
    layers: embed -> mlp           the same kernel, stacked over the layers
    mlp <- embed                   a kernel stored with its outputs first
    (heads head_dim=16) -> embed   a product axis, for imported trees only
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from nestnet.errors import UserError

Product = tuple[tuple[str, int | None], ...]
Name = str | Product
Rule = Callable[[Any, Any], Any]

STACK = "stack"
REST = "rest"

_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")


@dataclasses.dataclass(frozen=True)
class Axes:
  """The names of one array's dimensions, in order.

  Attributes:
    names: One name for each dimension. A numeral names a fixed size; a tuple of
      `(name, size or None)` is a product axis, whose factors are cut one by one.
    contracted: Names that the array contracts over (role "in").
    stacked: Names that only stack copies of the array (role "stack").
    rule: Optional function `(leaf, subnet) -> leaf`, applied by `take` after the cut. With an
      attribute `node` that is true it maps the whole node that holds the leaf; in `axes` it may name
      axes of the subnet that it reads.
    stack: Key of the stack that the array belongs to, where it is known. It says which node of a
      tree becomes `layers_0`, `layers_1`, ... when nothing beside the stack is in the tree.

  Example:
    >>> Axes.parse("layers: embed -> heads 3 head_dim").names
    ('layers', 'embed', 'heads', '3', 'head_dim')
    >>> Axes.parse("layers: embed -> mlp").role("embed")
    'in'
  """

  names: tuple[Name, ...]
  contracted: frozenset[str] = frozenset()
  stacked: frozenset[str] = frozenset()
  rule: Rule | None = None
  stack: str | None = dataclasses.field(default=None, compare=False)

  @classmethod
  def parse(cls, text: str, rule: Rule | None = None) -> Axes:
    """Reads the arrow form; raises `ValueError` if it has more than one arrow or colon."""
    stack, colon, arrow = text.rpartition(":")
    left, sign, right = arrow, "", ""
    for candidate in ("->", "<-"):
      if candidate in arrow:
        left, sign, right = arrow.partition(candidate)
    if "->" in left + right or "<-" in left + right or ":" in stack:
      raise UserError(f"axes {text!r}: expected 'stacked: in -> out' or 'stacked: out <- in'")
    if not sign:
      left, right = "", arrow
    groups = [_names(part) for part in (stack, left, right)]
    contracted = groups[2] if sign == "<-" else groups[1]
    return cls(names=sum(groups, ()), contracted=frozenset(flat(contracted)),
               stacked=frozenset(flat(groups[0])), rule=rule)

  @classmethod
  def of(cls, value: Axes | str | jax.sharding.PartitionSpec | tuple) -> Axes:
    """Coerces the text form, a `PartitionSpec` or a tuple of names."""
    if isinstance(value, Axes):
      return value
    if isinstance(value, str):
      return cls.parse(value)
    return cls(names=tuple(value))

  def role(self, name: str) -> str:
    """`"in"`, `"out"` or `"stack"`."""
    return "stack" if name in self.stacked else "in" if name in self.contracted else "out"

  def without(self, name: str) -> Axes:
    """The axes of one entry along `name`."""
    return dataclasses.replace(self, names=tuple(n for n in self.names if n != name),
                               stacked=self.stacked - {name})

  def __str__(self) -> str:
    def text(role):
      return " ".join(_text(n) for n in self.names if self.role(flat((n,))[0]) == role)
    stack = text("stack") + ": " if self.stacked else ""
    if not self.contracted:
      return f"{stack}-> {text('out')}".rstrip()
    produced_first = self.names and self.role(flat((self.names[len(self.stacked)],))[0]) == "out"
    sides = ("out", "<-", "in") if produced_first else ("in", "->", "out")
    return f"{stack}{text(sides[0])} {sides[1]} {text(sides[2])}".rstrip()


def flat(names: tuple[Name, ...]) -> tuple[str, ...]:
  """Names with product axes spelled out as their factors."""
  return tuple(f for n in names for f in ((n,) if isinstance(n, str) else [f for f, _ in n]))


def is_axes(value: Any) -> bool:
  """Whether `value` is a leaf of an axes tree."""
  return isinstance(value, (Axes, str, jax.sharding.PartitionSpec)) or (
    type(value) is tuple and all(isinstance(n, str) or _is_product(n) for n in value))


def _is_product(name: Any) -> bool:
  return type(name) is tuple and bool(name) and all(
    type(factor) is tuple and len(factor) == 2 and isinstance(factor[0], str) for factor in name)


def axes(init: Callable[..., Any], names: str, rule: Rule | None = None) -> Callable[..., Any]:
  """Wraps an initializer so that its parameter carries axis names and roles.

  Works with every linen module that takes initializers, and under `nn.scan`, which adds the name
  of the stacked axis (`metadata_params={nn.PARTITION_NAME: "layers"}`).

  Args:
    init: A function that returns an array.
    names: The arrow form, such as `"embed -> mlp"`.
    rule: Optional function `(leaf, subnet) -> leaf` for `take` to apply after the cut.

  Example:
    >>> dense = nn.Dense(8, kernel_init=axes(nn.initializers.lecun_normal(), "embed -> mlp"),
    ...                  bias_init=axes(nn.initializers.zeros, "-> mlp"))
    >>> str(axis_names(dense, jax.numpy.ones((1, 4)))["kernel"])
    'embed -> mlp'
  """
  parsed = Axes.parse(names, rule)

  def named(*args, **kwargs):
    return _Named(init(*args, **kwargs), names=parsed.names, contracted=parsed.contracted,
                  stacked=parsed.stacked, rule=rule)

  return named


class _Named(nn.LogicallyPartitioned):
  """The box in which a linen variable carries its `Axes`."""

  contracted: frozenset[str] = struct.field(default=frozenset(), pytree_node=False)
  stacked: frozenset[str] = struct.field(default=frozenset(), pytree_node=False)
  rule: Rule | None = struct.field(default=None, pytree_node=False)
  stack: str | None = struct.field(default=None, pytree_node=False)

  def add_axis(self, index, params):
    box = super().add_axis(index, params)
    return box.replace(stacked=self.stacked | {box.names[index]},
                       stack=params.get(STACK, self.stack))

  def remove_axis(self, index, params):
    box = super().remove_axis(index, params)
    return box.replace(stacked=self.stacked - {self.names[index]})

  @property
  def axes(self) -> Axes:
    return Axes(tuple(self.names), self.contracted, self.stacked, self.rule, self.stack)


def axis_names(model: nn.Module, *inputs: Any) -> Any:
  """The tree of `Axes` of a model's parameters, from the module's own annotations.

  Args:
    model: A linen module whose parameters are made with `axes`.
    *inputs: Example arguments of the model: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A tree like `params` with an `Axes` for every leaf. No weight is computed.

  Raises:
    ValueError: A leaf has no names, repeats one, or has another number of dimensions or another
      fixed size than its names say. Every such leaf is listed.
  """
  return variable_axes(model, *inputs)["params"]


def variable_axes(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Any]:
  """`axis_names` for every collection: `{"params": ..., "constants": ..., ...}`.

  `options` are keyword arguments of the model, as they are. Statistics that carry no names of their
  own (BatchNorm's `mean` and `var`) take those of the `scale` beside them.
  """
  return named_variables(model, abstract_variables(model, *inputs, **options))


def named_variables(model: nn.Module, boxed: Mapping[str, Any]) -> dict[str, Any]:
  """`variable_axes` from what `abstract_variables` gave."""
  scales = {path[1:-1]: _leaf_axes(leaf) for path, leaf in _walk(boxed)
            if path[0] == "params" and path[-1] == "scale"}
  found, problems = {}, []
  for path, leaf in _walk(boxed):
    names = _leaf_axes(leaf)
    if names is None and path[0] != "params":
      names = scales.get(path[1:-1])
    shape = jax.tree.leaves(leaf)[0].shape
    problem = "has no axis names" if names is None else _problem(names, shape)
    if problem:
      problems.append(f"  {'/'.join(path)} {list(shape)}: {problem}")
    found[path] = names
  if problems:
    raise UserError(
      f"axis names of {type(model).__name__} are not complete; wrap the initializers of these "
      "leaves in nestnet.axes.axes(init, 'in -> out'):\n" + "\n".join(problems))
  return {"params": {}} | _nest(found)


def statistics_axes(params: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
  """Names of statistics that `init` does not make: those of the `scale` in the same place.

  Args:
    params: The axis names of the parameters.
    tree: The collection of statistics; a leaf without dimensions, such as a mark, has nothing to name.

  Raises:
    ValueError: There is no `scale` where a statistic is.
  """
  scales = {path[:-1]: leaf for path, leaf in _walk(params) if path[-1] == "scale"}
  leaves = dict(_walk(tree))
  missing = ["/".join(path) for path, leaf in leaves.items() if leaf.ndim and path[:-1] not in scales]
  if missing:
    raise UserError(f"statistics without a scale beside them among the parameters: {', '.join(missing)}")
  return _nest({path: scales[path[:-1]] if leaf.ndim else Axes(()) for path, leaf in leaves.items()})


def abstract_variables(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Any]:
  """Shapes of a model's variables, still in the boxes that carry their names."""
  return jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **options), *inputs)


def _leaf_axes(leaf: Any) -> Axes | None:
  if isinstance(leaf, _Named):
    return leaf.axes
  return Axes.of(tuple(leaf.names)) if isinstance(leaf, nn.Partitioned) else None


def _problem(names: Axes, shape: tuple[int, ...]) -> str | None:
  if not is_axes(names.names):
    return f"has the names {names.names}, and each must be a word"
  if len(names.names) != len(shape):
    return f"named {str(names)!r}, {len(names.names)} names for {len(shape)} dimensions"
  every = flat(names.names)
  repeated = sorted({n for n in every if every.count(n) > 1 and not n.isdigit()})
  if repeated:
    return f"named {str(names)!r}, repeats {', '.join(repeated)}"
  for name, size in zip(names.names, shape):
    if isinstance(name, str) and name.isdigit() and int(name) != size:
      return f"named {str(names)!r}, but the dimension called {name} has size {size}"
  return None


def _walk(tree: Mapping, path: tuple[str, ...] = ()):
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _walk(value, path + (key,))
    else:
      yield path + (key,), value


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


def _names(text: str) -> tuple[Name, ...]:
  return tuple(_product(inner) if inner else name for inner, name in _TOKEN.findall(text))


def _product(text: str) -> Product:
  factors = []
  for token in text.split():
    name, sign, size = token.partition("=")
    if sign and not size.isdigit():
      raise UserError(f"product axis ({text}): {token!r} has no whole size; write name=size")
    factors.append((name, int(size) if size else int(name) if name.isdigit() else None))
  if sum(size is None for _, size in factors) > 1:
    raise UserError(f"product axis ({text}): at most one factor may have no size; write name=size")
  return tuple(factors)


def _text(name: Name) -> str:
  if isinstance(name, str):
    return name
  factors = (n if size is None or n.isdigit() else f"{n}={size}" for n, size in name)
  return f"({' '.join(factors)})"
