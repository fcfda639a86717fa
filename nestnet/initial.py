"""A run that begins with the weights of a folder, not with random ones."""

from __future__ import annotations

import dataclasses
import os

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from nestnet.errors import UserError, counted
from nestnet.execution import Supernet
from nestnet.interop.folder import load, peek
from nestnet.interop.layouts import mismatch
from nestnet.steps import TrainState
from nestnet.subnet import Subnet
from nestnet.training import Border, Transition

# Fields that say how a network runs and trains, not what it computes.
FREE = ("dtype", "param_dtype", "remat", "unroll", "dropout", "drop_path", "layer_dropout", "position_std",
        "context")


@dataclasses.dataclass(frozen=True)
class Parent:
  """Weights to begin with: a transition into the first phase, which a resumed run does not repeat.

  Attributes:
    folder: An extracted network (`nestnet.save`), or a decoder in Hugging Face's form.
    family: What the folder holds: the largest of the space that the config describes.
    member: The sub-network of it that the run trains alone; None: all of it.
    enter: What else happens at the beginning of the phase, after it.
  """

  folder: str | os.PathLike[str]
  family: Supernet
  member: Subnet | None = None
  enter: Transition | None = None

  def check(self) -> None:
    """Looks at the folder without reading weights.

    Raises:
      ValueError: It is damaged, or holds another network, with every field that differs.
      FileNotFoundError: It is not there.
    """
    _check_fields(self.folder, peek(self.folder, type(self.family.model)), self.family.model)

  def __call__(self, state: TrainState, border: Border) -> TrainState:
    """The state with the folder's weights; optimizer and teacher begin with them.

    Raises:
      ValueError: As `check`; or the weights have other names or shapes.
      FileNotFoundError: As `check`.
    """
    module, variables = load(self.folder, type(self.family.model))
    _check_fields(self.folder, module, self.family.model)
    params = variables.get("params", {})
    shapes = lambda tree: {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()}
    problems = mismatch(shapes(self.family.shapes["params"]), shapes(params))
    if any(problems.values()):
      raise counted(f"config.init_from: the weights in {self.folder} are not those of config.model", problems)
    if self.member is not None:
      params = self.family.cut({"params": params}, self.member)["params"]
    step, current = border.after, state.trained["model"]
    params = jax.tree.map(lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
                          params, current)
    trained = state.trained | {"model": params}
    state = state.replace(trained=trained, teacher=step.teacher_of(trained),
                          opt_state=jax.jit(step.tx.init)(trained))
    return self.enter(state, border) if self.enter else state


def _check_fields(folder: str | os.PathLike[str], held: nn.Module, wanted: nn.Module) -> None:
  differing = [f"{name}: {getattr(held, name)} there, {getattr(wanted, name)} in config.model"
               for name in (field.name for field in dataclasses.fields(wanted))
               if name not in (*FREE, "parent", "name") and getattr(held, name) != getattr(wanted, name)]
  if differing:
    raise UserError(f"config.init_from: {folder} holds another {type(wanted).__name__} than config.model; "
                    "allowed is the same:\n" + "\n".join(f"  {line}" for line in differing))
