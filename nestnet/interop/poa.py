"""Weights of vision transformers trained with POA's published code (github.com/alipay/POA).

    model = poa.vit(state)
    variables = poa.load(model, state)
    module, small = extract(model, variables, poa.subnet(model, embed=384, layers=12), images)

`state` maps the names of that code, without a `backbone.` before them or with, to arrays in PyTorch's layout;
or it is a `.safetensors` file of them. Its authors publish no weights. `images` is a batch or its shape, in
our layout `[batch, rows, columns, channels]`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nestnet.choices import spaced
from nestnet.errors import UserError, counted
from nestnet.interop.state_dict import read
from nestnet.models.vit import ViT
from nestnet.subnet import Subnet

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PREFIX = "backbone."
_OUTSIDE = {
  ("token",): "cls_token", ("positions",): "pos_embed", ("mask",): "mask_token",
  ("patch", "kernel"): "patch_embed.proj.weight", ("patch", "bias"): "patch_embed.proj.bias",
  ("norm", "scale"): "norm.norm.weight", ("norm", "bias"): "norm.norm.bias"}
_INSIDE = {
  ("attention", "norm", "scale"): "norm1.norm.weight", ("attention", "norm", "bias"): "norm1.norm.bias",
  ("attention", "qkv", "kernel"): "attn.qkv.linear.weight", ("attention", "qkv", "bias"): "attn.qkv.linear.bias",
  ("attention", "out", "kernel"): "attn.proj.linear.weight", ("attention", "out", "bias"): "attn.proj.linear.bias",
  ("attention", "layer_scale"): "ls1.gamma",
  ("mlp", "norm", "scale"): "norm2.norm.weight", ("mlp", "norm", "bias"): "norm2.norm.bias",
  ("mlp", "up", "kernel"): "mlp.fc1.linear.weight", ("mlp", "up", "bias"): "mlp.fc1.linear.bias",
  ("mlp", "down", "kernel"): "mlp.fc2.linear.weight", ("mlp", "down", "bias"): "mlp.fc2.linear.bias",
  ("mlp", "layer_scale"): "ls2.gamma"}


def vit(state: Mapping[str, Any] | str | os.PathLike[str], head_dim: int = 64) -> ViT:
  """The supernet that a state dict is of, a backbone without a head.

  Args:
    state: As in the module's docstring.
    head_dim: Width of a head, which the tensors do not tell; 64 in the published configurations.

  Raises:
    ValueError: Tensors that its sizes follow from are missing, or it does not divide into heads.
    FileNotFoundError: There is no such file.
  """
  tensors = _tensors(state)
  needed = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.linear.weight")
  if missing := [name for name in needed if name not in tensors]:
    raise counted("the state dict is not that of a vision transformer of POA", {"missing": missing})
  embed, _, patch, _ = tensors[needed[0]].shape
  if embed % head_dim:
    raise UserError(f"width {embed} does not divide into heads of head_dim={head_dim}")
  layers = 1 + max(int(match[1]) for match in map(_BLOCK.match, tensors) if match)
  return ViT(
    layers=layers, embed=embed, heads=embed // head_dim, mlp=tensors[needed[1]].shape[0], classes=0, patch=patch,
    head_dim=head_dim, pool="token", masked="mask_token" in tensors,
    layer_scale=1.0 if "blocks.0.ls1.gamma" in tensors else 0.0, width_scaling="ratio", exact_gelu=True)


def subnet(model: ViT, embed: int, layers: int) -> Subnet:
  """A member by its width and depth: whole heads, the MLP in proportion, evenly spaced blocks.

  Args:
    model: The supernet.
    embed: Width, a multiple of the width of a head.
    layers: How many blocks.

  Raises:
    ValueError: A width that is no multiple, or more than there is.

  Example:
    >>> model = ViT(layers=8, embed=192, heads=6, mlp=768, classes=0, head_dim=32, pool="token")
    >>> str(subnet(model, embed=64, layers=4))
    'layers=0+2+4+7,embed=64,heads=2,mlp=256'
  """
  if embed % model.head_dim or not 0 < embed <= model.embed or not 0 < layers <= model.layers:
    raise UserError(f"embed={embed}, layers={layers}; allowed are multiples of {model.head_dim} up to "
                    f"{model.embed}, and 1 to {model.layers} layers")
  (ids,) = spaced(model.layers, (layers,))
  return Subnet(layers=ids, embed=embed, heads=embed // model.head_dim, mlp=model.mlp * embed // model.embed)


def load(model: ViT, state: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
  """The variables of a supernet from a state dict.

  Args:
    model: As `vit` gives it.
    state: As there.

  Returns:
    `{"params": ...}`.

  Raises:
    ValueError: Tensors are missing, not known or of another shape, of which the first are listed.
    FileNotFoundError: There is no such file.
  """
  tensors = _tensors(state)
  outside = {path: name for path, name in _OUTSIDE.items() if model.masked or path != ("mask",)}
  inside = {path: name for path, name in _INSIDE.items() if model.layer_scale or path[-1] != "layer_scale"}
  named = {path: [name] for path, name in outside.items()}
  layers = range(model.layers)
  named |= {("blocks", *path): [f"blocks.{i}.{name}" for i in layers] for path, name in inside.items()}
  expected = {name for names in named.values() for name in names}
  problems = {"missing": sorted(expected - set(tensors)), "not known": sorted(set(tensors) - expected),
              "of another shape": []}
  params: dict[str, Any] = {}
  for path, names in named.items():
    if not set(names) <= set(tensors):
      continue
    shape = _shape(model, path, tensors)
    problems["of another shape"] += [
      f"{name}: got {list(tensors[name].shape)}, expected {list(shape)}"
      for name in names if tensors[name].shape != shape]
    if any(tensors[name].shape != shape for name in names):
      continue
    ours = [_ours(model, path, tensors[name]) for name in names]
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = jnp.asarray(np.stack(ours) if path[0] == "blocks" else ours[0])
  if any(problems.values()):
    raise counted("the state dict is not that of this ViT", problems)
  return {"params": params}


def _tensors(state) -> dict[str, np.ndarray]:
  state = state if isinstance(state, Mapping) else read(state)
  return {name.removeprefix(_PREFIX): np.asarray(array) for name, array in state.items()}


def _shape(model, path, tensors) -> tuple[int, ...]:
  """The shape that a tensor has there."""
  d, hidden, heads = model.embed, model.mlp, model.heads * model.head_dim
  # What the model does not say: the number of channels, and of tokens.
  free = lambda name, axis: tensors[name].shape[axis] if tensors[name].ndim > axis else 1
  known = {
    ("token",): (1, 1, d), ("mask",): (1, d), ("positions",): (1, free("pos_embed", 1), d),
    ("patch", "kernel"): (d, free("patch_embed.proj.weight", 1), model.patch, model.patch),
    ("attention", "qkv", "kernel"): (3 * heads, d), ("attention", "qkv", "bias"): (3 * heads,),
    ("attention", "out", "kernel"): (d, heads),
    ("mlp", "up", "kernel"): (hidden, d), ("mlp", "up", "bias"): (hidden,), ("mlp", "down", "kernel"): (d, hidden)}
  return known.get(path[1:] if path[0] == "blocks" else path, (d,))


def _ours(model: ViT, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """A tensor in our layout."""
  heads = model.heads, model.head_dim
  match path[-2:]:
    case ("token",) | ("positions",) | ("mask",):
      return array[0]
    case ("patch", "kernel"):
      return array.transpose(2, 3, 1, 0)
    case ("qkv", "kernel"):
      return array.reshape(3, *heads, -1).transpose(3, 1, 0, 2)
    case ("qkv", "bias"):
      return array.reshape(3, *heads).transpose(1, 0, 2)
    case ("out", "kernel"):
      return array.T.reshape(*heads, -1)
    case (_, "kernel"):
      return array.T
  return array
