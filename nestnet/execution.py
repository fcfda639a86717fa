"""How sub-networks run: a supernet and its slices, each slice one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from nestnet.axes import abstract_variables, named_variables, statistics_axes, variable_axes
from nestnet.errors import UserError, one_of
from nestnet.models.convolution import STATISTICS, borrowed
from nestnet.models.switch import CHOICE
from nestnet.objectives.base import Objective, Targets
from nestnet.slicing import take
from nestnet.space import Space
from nestnet.subnet import INPUTS, Subnet, reach


@dataclasses.dataclass(frozen=True, eq=False)
class Supernet:
  """A module, the family of its sub-networks, and the shapes of its input.

  Attributes:
    model: The largest network, an ordinary linen module.
    space: The family; its largest member is the model.
    inputs: Example arguments of the model, as `jax.ShapeDtypeStruct`s.
  """

  model: nn.Module
  space: Space
  inputs: tuple[jax.ShapeDtypeStruct, ...]

  def __post_init__(self):
    """Raises `ValueError` where the model and the space do not go together."""
    fields = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(self.model)
              if f.name not in ("parent", "name")}
    name = type(self.model).__name__
    for axis in INPUTS:
      for side in self.space.choices(axis) if axis in self.space.axes else ():
        self._check_side(side)
    for axis, size in self.space.largest.of_model.items():
      if axis not in fields:
        raise one_of(f"axis of {name}", axis, fields)
      if fields[axis] != size:
        raise UserError(f"the largest of the space has {axis}={size}, the model has "
                        f"{fields[axis]}; they must be equal")
      for choice in self.space.choices(axis):
        if reach(axis, choice) > reach(axis, self.space.largest.chosen[axis]):
          raise UserError(f"the largest of the space, {self.space.largest}, does not contain "
                          f"{axis}={choice}")
    if hasattr(self.model, "check_space"):
      self.model.check_space(self.space)
    for member in {self.space.smallest, self.space.largest, *self.space.pool}:
      self.check(member)
    if "batch_stats" in self.shapes:
      raise UserError(f"{name} keeps running statistics (batch_stats), which belong to one "
                      "sub-network and are not trained here; use LayerNorm or GroupNorm")

  def _check_side(self, side: int) -> None:
    for x in self.inputs:
      if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise UserError(f"the space has a resolution, and the inputs are {list(x.shape)}; allowed are square "
                        "images [batch, rows, columns, channels]")
      if not isinstance(side, int) or side > x.shape[1]:
        raise UserError(f"resolution={side}: the images are {x.shape[1]} x {x.shape[2]} pixels; allowed are "
                        f"sides up to {x.shape[1]}, and what the data set gives would have to be larger")

  @functools.cached_property
  def axes(self) -> dict[str, Any]:
    """Axis names of every collection."""
    return named_variables(self.model, _traced(self.model, self.inputs))

  @functools.cached_property
  def shapes(self) -> dict[str, Any]:
    """Abstract variables of the largest network."""
    return {"params": {}} | meta.unbox(_traced(self.model, self.inputs))

  def check(self, subnet: Subnet) -> None:
    """Raises `ValueError` unless the slice of `subnet` is what its own module would make."""
    own = meta.unbox(_traced(self.module(subnet), self.inputs_of(subnet)))
    hint = "; parameters may not depend on the resolution" if self.inputs_of(subnet) != self.inputs else ""
    cut = jax.eval_shape(lambda v: self.cut(v, subnet), self.shapes)
    for collection in own:
      if jax.tree.structure(own[collection]) != jax.tree.structure(cut[collection]):
        raise UserError(f"sub-network {subnet}: the module and the slice have other {collection}: "
                        f"{jax.tree.structure(own[collection])} and "
                        f"{jax.tree.structure(cut[collection])}")
      for (path, a), b in zip(jax.tree.leaves_with_path(own[collection]),
                              jax.tree.leaves(cut[collection])):
        if a.shape != b.shape:
          raise UserError(f"sub-network {subnet}: {jax.tree_util.keystr(path)} of the module is "
                          f"{list(a.shape)}, the slice is {list(b.shape)}{hint}")

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Fresh variables of the largest network; trace it under `jax.jit`."""
    inputs = [jax.numpy.zeros(x.shape, x.dtype) for x in self.inputs]
    return {"params": {}} | meta.unbox(self.model.init(rng, *inputs))

  def module(self, subnet: Subnet) -> nn.Module:
    """The ordinary module of a sub-network."""
    return module_of(self.model, subnet)

  def inputs_of(self, subnet: Subnet) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Example arguments of a sub-network's module: images at its resolution."""
    return tuple(resized(x, subnet) for x in self.inputs)

  def runnable(self, subnet: Subnet) -> Runnable:
    """A sub-network as a program of its own."""
    return Runnable(subnet, functools.partial(self.cut, subnet=subnet), self.module(subnet))

  def cut(self, variables: dict[str, Any], subnet: Subnet) -> dict[str, Any]:
    """A sub-network's variables, every collection of them."""
    return cut(self.model, variables, self.axes, subnet, self.space.groups)


@functools.lru_cache(maxsize=64)
def _traced(model: nn.Module, inputs: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, Any]:
  """`abstract_variables`; the families of a run's phases have the same model and many members in common."""
  return abstract_variables(model, *inputs)


def module_of(model: nn.Module, sizes: Mapping[str, Any]) -> nn.Module:
  """The ordinary module of a sub-network: `model.member(sizes)` where it has that, else a clone."""
  sizes = sizes.of_model if isinstance(sizes, Subnet) else sizes
  return model.member(sizes) if hasattr(model, "member") else model.clone(**sizes)


def sizes_of(model: nn.Module, subnet: Subnet) -> Subnet:
  """What `take` cuts for a sub-network whose fields are choices: `model.sizes(subnet)`, else the subnet."""
  subnet = subnet.of_model
  return model.sizes(subnet) if hasattr(model, "sizes") else subnet


def resized(images: Any, subnet: Mapping[str, Any]) -> Any:
  """Images as a sub-network sees them: at its `resolution`, where it has one.

  They are interpolated linearly between pixels, averaged over those that fall together. As a choice of a
  sub-network (1908.09791, section 3.1) it steers the batch and cuts no parameter.

  Args:
    images: `[batch, rows, columns, channels]`, an array or its shape.
    subnet: The sub-network.

  Example:
    >>> resized(jax.numpy.ones((2, 8, 8, 3)), Subnet(resolution=6, layers=2)).shape
    (2, 6, 6, 3)
  """
  side = subnet.get("resolution")
  if side is None or images.shape[1:3] == (side, side):
    return images
  shape = (images.shape[0], side, side, *images.shape[3:])
  if isinstance(images, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, images.dtype)
  return jax.image.resize(images, shape, "linear", antialias=True)


def cut(model: nn.Module, variables: dict[str, Any], axes: dict[str, Any], subnet: Subnet,
        groups: dict[str, int] | None = None, strict: bool = False) -> dict[str, Any]:
  """A sub-network's variables, every collection of them; calibrated statistics need no names.

  Raises:
    ValueError: As `take`, which is strict on the parameters where `strict` is set; or sizes that do not go
      together, of models that say so by `check_member(subnet)`.
  """
  if hasattr(model, "check_member"):
    model.check_member(subnet)
  sizes = sizes_of(model, subnet)
  named = lambda name, tree: axes[name] if name in axes else statistics_axes(axes["params"], tree)
  return {name: take(tree, named(name, tree), sizes, groups, strict=strict and name == "params")
          for name, tree in variables.items()}


def extract(model: nn.Module, variables: dict[str, Any], subnet: Subnet, *inputs: Any,
            groups: dict[str, int] | None = None) -> tuple[nn.Module, dict[str, Any]]:
  """A sub-network as an ordinary module with its own variables.

  Statistics of batch normalisation, where there are any, are cut too, and those of a smaller network
  marked as borrowed, which evaluators refuse: `nestnet.calibrate` makes its own.

  Args:
    model: The supernet.
    variables: Its variables, `{"params": ..., ...}`.
    subnet: Which member.
    *inputs: Example arguments of the model; shapes are enough.
    groups: As in `Space.groups`.

  Example:
    >>> from nestnet.models.vit import ViT
    >>> model = ViT(layers=2, embed=8, heads=2, mlp=16, classes=3)
    >>> images = jax.numpy.zeros((1, 8, 8, 1))
    >>> variables = jax.jit(model.init)(jax.random.key(0), images)
    >>> module, small = extract(model, variables, Subnet(layers=1, mlp=4), images)
    >>> module.apply(small, images)["logits"].shape
    (1, 3)
  """
  small = cut(model, variables, variable_axes(model, *inputs), subnet, groups, strict=True)
  module = module_of(model, subnet)
  whole = module == module_of(model, Subnet()) and all(resized(x, subnet).shape == x.shape for x in inputs)
  if STATISTICS in small and not whole:
    small[STATISTICS] = borrowed(small[STATISTICS])
  return module, small


def member(supernet: Supernet, objective: Objective, objective_axes: Any, trained: dict[str, Any],
           fixed: dict[str, Any], subnet: Subnet) -> dict[str, Any]:
  """The variables of a sub-network as it is evaluated and extracted.

  Args:
    supernet: The family.
    objective: What it was trained with; it may hold a part of the network.
    objective_axes: Axis names of the objective's own parameters.
    trained: `{"model": params, "objective": params}`.
    fixed: Collections beside `params`.
    subnet: Which member.
  """
  variables = supernet.cut({"params": trained["model"], **fixed}, subnet)
  own = objective_part(supernet, objective_axes, trained["objective"], subnet)
  return objective.attach(variables, own, subnet)


def objective_part(supernet: Supernet, axes: Any, params: Any, subnet: Subnet) -> Any:
  """What belongs to a sub-network of the parameters of an objective, given their axis names."""
  return take(params, axes, sizes_of(supernet.model, subnet), supernet.space.groups, strict=False)


@dataclasses.dataclass(frozen=True)
class Runnable:
  """What runs on a slice of the supernet: one sub-network, or all that data can tell apart.

  Attributes:
    subnet: The sizes that are the same for all of them, the resolution of their images among them.
    cut: Makes the module's variables from the supernet's.
    module: What is applied to them.
    choice: A collection for the module beside its variables: which member it is.
  """

  subnet: Subnet
  cut: Callable[[dict[str, Any]], dict[str, Any]]
  module: nn.Module
  choice: dict[str, Any] | None = None


def forward(objective: Objective, runnable: Runnable, variables: dict[str, Any],
            batch: dict[str, Any], rng: jax.Array | None = None, teaches: bool = False) -> Any:
  """The outputs of one sub-network on a batch; with `rng`, dropout and drop path are on; or the teacher's."""
  rngs = None if rng is None else {"dropout": rng}
  if runnable.choice is not None:
    variables = {**variables, CHOICE: runnable.choice}

  def apply(inputs, **options):
    inputs = resized(inputs, runnable.subnet)
    return runnable.module.apply(variables, inputs, train=rng is not None, rngs=rngs, **options)

  return ((teaches and objective.forward_teacher) or objective.forward)(apply, batch)


def term_loss(supernet: Supernet, objective: Objective, objective_axes: Any, runnable: Runnable,
              regularised: bool, trained: dict[str, Any], fixed: dict[str, Any], state: Any,
              targets: Targets, step: jax.Array, rng: jax.Array
              ) -> tuple[jax.Array, tuple[Any, Any]]:
  """The loss of one sub-network on its slice: `(loss, (outputs, metrics))`."""
  variables = runnable.cut({"params": trained["model"], **fixed})
  own = objective_part(supernet, objective_axes, trained["objective"], runnable.subnet)
  dropout, noise = jax.random.split(rng)
  outputs = forward(objective, runnable, variables, targets.batch, dropout if regularised else None)
  loss, metrics = objective.loss(own, state, outputs, targets, step, noise)
  return loss, (outputs, metrics)
