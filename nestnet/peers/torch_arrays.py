"""Arrays of JAX as parameters of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

Params = Mapping[str, Any]


def each_layer(size: int | tuple[int, ...], layers: Sequence[int]) -> tuple[int, ...]:
  """A size of every layer: one for all, or as many as there are."""
  return size if isinstance(size, tuple) else (size,) * len(layers)


def layers_of(blocks: Params, count: int) -> Iterator[Params]:
  """The parameters of each layer of a stack."""
  return (jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(count))


def matrix(kernel: Any, inputs: int) -> np.ndarray:
  """A kernel whose first `inputs` dimensions are contracted, as `[outputs, inputs]`."""
  kernel = np.asarray(kernel)
  return kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T


def parameter(array: Any) -> nn.Parameter:
  return nn.Parameter(torch.from_numpy(np.array(array, np.float32, order="C")))
