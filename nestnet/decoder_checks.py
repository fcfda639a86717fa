"""What decoding may be given: a decoder, its variables, and tokens that it knows."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict

from nestnet.axes import abstract_variables
from nestnet.errors import UserError, counted

Tokens = Sequence[int]
# What is read of a decoder beside its call.
_NEEDS = ("vocab", "context", "layers", "kv_heads", "head_dim", "dtype")


def check_decoder(module: nn.Module, variables: Mapping[str, Any]) -> None:
  """Raises `ValueError` for a module that is no decoder, or whose parameters are not among the variables."""
  lacks = [name for name in _NEEDS if not hasattr(module, name)]
  if lacks or not isinstance(module, nn.Module):
    got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise UserError(f"module: got {got}{', without ' + ', '.join(lacks) if lacks else ''}; allowed is a "
                    "decoder, such as nestnet.models.decoder.Decoder(...)")
  if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
    got = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
    raise UserError(f"variables: got {got or 'none'}; allowed is a mapping with params")
  expected, got = _parameter_shapes(module), _shapes(variables["params"])
  problems = {
    "missing": [name for name in expected if name not in got],
    "of another shape": [f"{name}: got {list(got[name])}, allowed is {list(shape)}"
                         for name, shape in expected.items() if name in got and got[name] != shape]}
  if any(problems.values()):
    raise counted(f"variables: not those of this {type(module).__name__}", problems)


@functools.lru_cache(maxsize=64)
def _parameter_shapes(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
  return _shapes(abstract_variables(module, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"])


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return flatten_dict(jax.tree.map(jnp.shape, dict(meta.unbox(params))), sep="/")


def unpadded(prompts: Sequence[Tokens]) -> list[list[int]]:
  """Prompts as lists, without padding.

  Raises:
    ValueError: A token that is no whole number.
  """
  return [[token for token in listed(prompt, f"prompt {number}") if token != -1]
          for number, prompt in enumerate(prompts, 1)]


def listed(tokens: Iterable[int], what: str) -> list[int]:
  """Tokens as whole numbers; raises `ValueError` for anything else."""
  if not np.iterable(tokens):
    raise UserError(f"{what}: got {tokens!r}, allowed is a list of tokens")
  return [whole(token, what) for token in tokens]


def whole(value: Any, what: str) -> int:
  """A whole number of any type; raises `ValueError` for another value."""
  try:
    return operator.index(value)
  except TypeError:
    raise UserError(f"{what}: got {value!r}, allowed is a whole number") from None


def check_tokens(module: nn.Module, tokens: Tokens, what: str) -> None:
  """Raises `ValueError` for a token that the network does not know."""
  for token in tokens:
    if not 0 <= token < module.vocab:
      raise UserError(f"{what}: token {token} is none of the network's; allowed is 0 to {module.vocab - 1}")
