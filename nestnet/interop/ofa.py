"""Weights of the Once-for-All supernets that its authors publish (github.com/mit-han-lab/once-for-all).

    model = MobileNetV3(1000, width=1.2, transforms=True)
    variables = ofa.load(model, "ofa_mbv3_d234_e346_k357_w1.2.safetensors")
    module, small = extract(model, variables, ofa.subnet(model, ks=3, e=4, d=2), images)
    small["batch_stats"] = calibrate(module, small, batches)
    save("small", module, small, {"data": "ImageNet"})

`images` is a batch or its shape; `batches` are of training images, 2,000 in all in the authors' code. The
running averages in the file of a supernet come from all the networks that trained it and are right for
none, so that evaluators refuse them. The published files are pickles, which nestnet does not read;
`nestnet.interop.state_dict.CONVERT` is the command, run beside PyTorch, that makes a safetensors file of one.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from nestnet.axes import REST, abstract_variables
from nestnet.errors import UserError, counted
from nestnet.interop.state_dict import read
from nestnet.models.convolution import STATISTICS, borrowed
from nestnet.models.mobilenet import MobileNet
from nestnet.models.mobilenet_v3 import MobileNetV3
from nestnet.models.proxyless_nas import ProxylessNAS
from nestnet.models.resnet50d import ResNet50D
from nestnet.subnet import Subnet

PUBLISHED = (MobileNetV3, ProxylessNAS, ResNet50D)
# What their sub-networks have: of a MobileNet, then of a ResNet.
DEPTHS, EXPANSIONS, KERNELS = (2, 3, 4), (3, 4, 6), (3, 5, 7)
MORE_DEPTHS, SHARES = (0, 1, 2), (0.2, 0.25, 0.35)

_NORM = {("params", "scale"): "weight", ("params", "bias"): "bias", (STATISTICS, "mean"): "running_mean",
         (STATISTICS, "var"): "running_var"}


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where a tensor of the authors' goes.

  Attributes:
    name: The authors' name, in the short form of `_short`.
    path: Of our leaf, from its collection.
    index: The layer in our leaf, where it is stacked.
  """

  name: str
  path: tuple[str, ...]
  index: int | None = None


def load(model: MobileNet | ResNet50D, state: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
  """The variables of a supernet from the authors' state dict.

  Args:
    model: The supernet in full, `transforms=True` where kernels are transformed.
    state: Arrays by the authors' names, in PyTorch's layout; or a `.safetensors` file of them.

  Returns:
    `{"params": ..., "batch_stats": ...}`. The statistics are the authors' running averages, marked as
    borrowed: a network, the largest too, is calibrated before it is evaluated.

  Raises:
    ValueError: Tensors are missing, not known or of another shape, which are counted and the first of them
      listed; or the file is no safetensors file; or the authors published no such network.
    FileNotFoundError: There is no such file.
  """
  _check_published(model)
  if not isinstance(state, Mapping):
    state = read(state)
  given = {_short(name): (name, array) for name, array in state.items()
           if not name.endswith("num_batches_tracked")}
  shapes = _shapes(model)
  entries = list(_entries(model, shapes))
  known = {entry.name for entry in entries}
  missing = [entry.name for entry in entries if entry.name not in given]
  unknown = [name for short, (name, _) in given.items() if short not in known]
  shaped = []
  leaves: dict[tuple[str, ...], Any] = {}
  for entry in entries:
    if entry.name not in given:
      continue
    name, array = given[entry.name]
    shape = shapes[entry.path].shape[entry.index is not None:]
    array = np.asarray(array)
    expected = _theirs(entry, shape)
    if array.shape != expected:
      shaped.append(f"{name}: got {list(array.shape)}, expected {list(expected)}")
      continue
    array = _ours(array, len(shape), entry)
    if entry.index is None:
      leaves[entry.path] = array
    else:
      leaves.setdefault(entry.path, {})[entry.index] = array
  if missing or unknown or shaped:
    raise counted(f"the state dict is not that of this {type(model).__name__}", {
      "missing": missing, "not known": unknown, "of another shape": shaped})
  whole = {path: np.stack([leaf[i] for i in range(len(leaf))]) if isinstance(leaf, dict) else leaf
           for path, leaf in leaves.items()}
  tree = unflatten_dict({path: jnp.asarray(leaf, shapes[path].dtype) for path, leaf in whole.items()})
  return tree | {STATISTICS: borrowed(tree[STATISTICS])}


def _check_published(model: nn.Module) -> None:
  if type(model) not in PUBLISHED:
    raise UserError(f"the authors of Once-for-All published no weights of a {type(model).__name__}; allowed "
                    f"are {', '.join(each.__name__ for each in PUBLISHED)}")


def subnet(model: MobileNet | ResNet50D, *, d: int | Sequence[int], e: float | Sequence[float],
           ks: int | Sequence[int] | None = None, w: int | Sequence[int] | None = None,
           widths: Sequence[int] = (65, 80, 100)) -> Subnet:
  """A sub-network from the authors' description of it.

  Args:
    model: The supernet in full.
    d: Depth of each stage, `DEPTHS`, where a stage has more than one block; of a ResNet, `MORE_DEPTHS`, the
      stem first, which has its residual convolution with 2, then what a stage has more than the least.
      A scalar stands for all, here and below.
    e: Expansion for each block of the supernet, `EXPANSIONS`, of a ResNet `SHARES`; what stands for blocks
      that are left out is not read.
    ks: Kernel size for each block of the supernet, `KERNELS`; not of a ResNet.
    w: Positions in `widths` for a ResNet: inside the stem, behind it, and for each stage.
    widths: What the positions mean, in hundredths.

  Raises:
    ValueError: A list has another length than the network has places, or a value is none of the published
      networks'.

  Example:
    >>> from nestnet.models.mobilenet_v3 import MobileNetV3
    >>> small = subnet(MobileNetV3(10), d=[2, 2, 3, 2, 2], e=[3] * 19 + [6], ks=7)
    >>> small["layers_3"], small["expand_5"], small["kernel_1"]
    (3, 3, 7)
  """
  _check_published(model)
  stages, mobile = model.stages, isinstance(model, MobileNet)
  for name, value in ({"w": w} if mobile else {"ks": ks}).items():
    if value is not None:
      raise UserError(f"{name}={value}: the authors' {type(model).__name__} has no such choice; allowed are "
                      + ("d, e and ks" if mobile else "d, e and w"))
  full = [getattr(model, f"layers_{s}") for s in stages]
  starts = [0, *itertools.accumulate(full)]
  sizes: dict[str, Any] = {}
  if mobile:
    depths = [min(_allowed(place, DEPTHS if most > 1 else (1, *DEPTHS)), most)
              for place, most in zip(_places("d", d, len(stages)), full)]
    choices = {"expand": (_places("e", e, starts[-1]), EXPANSIONS),
               "kernel": (_places("ks", ks, starts[-1]), KERNELS)}
  else:
    stem, *more = (_allowed(place, MORE_DEPTHS) for place in _places("d", d, len(stages) + 1))
    depths = [most - 2 + extra for most, extra in zip(full, more)]
    choices = {"expand": (_places("e", e, starts[-1]), SHARES)}
    sizes["layers_0"] = 2 if stem == 2 else 1
    for name, place in zip(("stem", 0, *stages), _places("w", w, len(stages) + 2)):
      sizes[f"width_{name}"] = widths[_allowed(place, range(len(widths)))]
  for s, start, depth in zip(stages, starts, depths):
    sizes[f"layers_{s}"] = depth
    for axis, (places, allowed) in choices.items():
      values = [_allowed(place, allowed) for place in places[start:start + depth]]
      sizes[f"{axis}_{s}"] = tuple(x if mobile else round(100 * x) for x in values)
  return Subnet(**sizes)


def _places(name: str, value: Any, count: int) -> list[tuple[str, Any]]:
  """What is asked for in each place, with what the user calls it."""
  if value is None:
    raise UserError(f"{name} is missing; allowed are a number and a list of {count}")
  if not isinstance(value, (list, tuple, np.ndarray)):
    return [(name, value)] * count
  if len(value) != count:
    raise UserError(f"{name} lists {len(value)} values; allowed are a number and a list of {count}")
  return [(f"{name}[{i}]", each) for i, each in enumerate(value)]


def _allowed(place: tuple[str, Any], allowed: Sequence[Any]) -> Any:
  name, value = place
  if value not in allowed:
    raise UserError(f"{name}={value}; allowed are {', '.join(map(str, allowed))}")
  return allowed[allowed.index(value)]


def _short(name: str) -> str:
  """A name without the repetitions in which the authors' files differ."""
  parts = name.replace("mobile_inverted_conv", "conv").split(".")
  return ".".join(part for part, before in zip(parts, [None, *parts]) if part != before)


def _shapes(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """Our leaves, with the statistics of the norms."""
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  params = flatten_dict(meta.unbox(abstract_variables(model, image))["params"])
  shapes = {("params", *path): leaf for path, leaf in params.items()}
  for path, leaf in params.items():
    if path[-1] == "scale":
      shapes |= {(STATISTICS, *path[:-1], key): leaf for key in ("mean", "var")}
  return shapes


def _entries(model, shapes) -> Iterator[_Entry]:
  """Every leaf of ours, layer by layer, with the authors' name for it."""
  name_of = _mobilenet_name if isinstance(model, MobileNet) else _resnet_name
  starts = {}
  block = int(isinstance(model, MobileNet))
  for s in model.stages:
    starts[s] = block
    block += getattr(model, f"layers_{s}")
  for path, leaf in shapes.items():
    layers = range(leaf.shape[0]) if REST in path else (None,)
    for index in layers:
      yield _Entry(_short(name_of(model, path, index, starts)), path, index)


def _block(path, index, starts) -> tuple[int, tuple[str, ...]] | None:
  """The number of a block in the whole network, and the path inside it; None outside the stages."""
  stage = re.fullmatch(r"stage_(\d+)", path[1])
  if not stage:
    return None
  position = 0 if index is None else 1 + index
  return starts[int(stage[1])] + position, path[3:]


def _leaf(collection: str, inner: tuple[str, ...]) -> str:
  """`conv.weight`, `bn.running_mean`, ... of a convolution and its norm."""
  if inner[0] == "norm":
    return f"bn.{_NORM[collection, inner[1]]}"
  if inner[1].startswith("to_"):
    size = int(inner[1].removeprefix("to_"))
    return f"conv.{size + 2}to{size}_matrix"
  return "conv.weight"


def _mobilenet_name(model, path, index, starts) -> str:
  collection, first, *inner = path
  found = _block(path, index, starts)
  if found or first == "fixed":
    number, (part, *inner) = found or (0, inner)
    if part == "squeeze":
      kind = "weight" if inner[1] == "kernel" else "bias"
      return f"blocks.{number}.conv.depth_conv.se.fc.{inner[0]}.{kind}"
    part = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}[part]
    return f"blocks.{number}.conv.{part}.{_leaf(collection, tuple(inner))}"
  if first == "classifier":
    return f"classifier.linear.{'weight' if inner[0] == 'kernel' else 'bias'}"
  if first == "stem":
    return f"first_conv.{_leaf(collection, tuple(inner))}"
  if first == "head_1":
    return "feature_mix_layer.conv.weight"
  last = "final_expand_layer" if len(model.head) == 2 else "feature_mix_layer"
  return f"{last}.{_leaf(collection, tuple(inner))}"


def _resnet_name(model, path, index, starts) -> str:
  collection, first, *inner = path
  found = _block(path, index, starts)
  if found:
    number, (part, *inner) = found
    part = {"reduce": "conv1", "spatial": "conv2", "expand": "conv3", "shortcut": "downsample"}[part]
    return f"blocks.{number}.{part}.{_leaf(collection, tuple(inner))}"
  if first == "classifier":
    return f"classifier.linear.{'weight' if inner[0] == 'kernel' else 'bias'}"
  if first == "stem_out":
    return f"input_stem.2.{_leaf(collection, tuple(inner))}"
  position, *inner = inner
  middle = "" if position == "layers_0_0" else "conv."
  return f"input_stem.{int(position[-1])}.{middle}{_leaf(collection, tuple(inner))}"


def _theirs(entry: _Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in PyTorch's layout."""
  if len(shape) == 4:
    return shape[3], shape[2], *shape[:2]
  if len(shape) == 3:
    return shape[2], 1, *shape[:2]
  if len(shape) == 2 and not entry.name.endswith("_matrix"):
    return shape[::-1] + (() if entry.name.startswith("classifier") else (1, 1))
  return shape


def _ours(array: np.ndarray, rank: int, entry: _Entry) -> np.ndarray:
  """In our layout: channels last, outputs behind inputs."""
  if array.ndim == 4:
    array = array.transpose(2, 3, 1, 0)
    return array if rank == 4 else array[:, :, 0] if rank == 3 else array[0, 0]
  return array.T if array.ndim == 2 and not entry.name.endswith("_matrix") else array
