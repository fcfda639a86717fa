"""Small linen layers with named axes, shared by the architectures."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import Axes, axes
from nestnet.errors import UserError
from nestnet.models.scaling import scaling_rule
from nestnet.models.stack import constant


# Of the queries of a long sequence; more save little and take long to compile.
BLOCKS = 4
# Rows that are multiplied one by one, where that is asked for; more are faster together.
FEW = 8


class Linear(nn.Module):
  """A projection written as one 2-D matmul, whatever axes it reads and produces.

  Attributes:
    names: The kernel's axes, such as `"embed -> heads 3 head_dim"`; as many trailing dimensions of
      the input are contracted as stand before the arrow.
    outputs: Sizes of the produced axes.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
    use_bias: Whether to add a bias over the produced axes.
    scaling: What `take` makes of the kernel where it cuts contracted axes: `"none"`, or `"ratio"`
      (`nestnet.models.scaling.WidthRatio`).
    by_row: As of `project`.
  """

  names: str
  outputs: tuple[int, ...]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  scaling: str = "none"
  by_row: bool = False

  @nn.compact
  def __call__(self, x):
    """Maps `[..., *inputs]` to `[..., *outputs]`."""
    named = Axes.parse(self.names)
    n = len(named.contracted)
    inputs = x.shape[-n:]
    init = nn.initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal", in_axis=range(n), out_axis=range(n, n + len(self.outputs)))
    rule = scaling_rule(self.scaling, dict(zip(named.names, inputs)))
    kernel = self.param("kernel", axes(init, self.names, rule), inputs + self.outputs, self.param_dtype)
    fan_in, fan_out = math.prod(inputs), math.prod(self.outputs)
    bias = None
    if self.use_bias:
      produced = "-> " + " ".join(named.names[n:])
      bias = self.param(
        "bias", axes(nn.initializers.zeros, produced), self.outputs, self.param_dtype).reshape(1, fan_out)
    y = project(x.reshape(-1, fan_in), kernel.reshape(fan_in, fan_out), bias, self.dtype, self.by_row)
    return y.reshape(x.shape[:-n] + self.outputs)


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, dtype: Any = jnp.float32,
            by_row: bool = False) -> jax.Array:
  """`x @ kernel + bias` in a type: `[..., inputs]` to `[..., outputs]`, as one 2-D matmul.

  Args:
    x: The input.
    kernel: `[inputs, outputs]`.
    bias: `[1, outputs]`.
    dtype: Of the product.
    by_row: Whether few rows are multiplied one by one on CPU, where the product of several copies the
      kernel first, at several times the cost of one row; and each is what it would be alone, bit for bit.
  """
  affine = _affine if jnp.dtype(dtype) == kernel.dtype else _mixed
  rows = x.reshape(-1, x.shape[-1]).astype(dtype)
  if by_row and 1 < len(rows) <= FEW:
    single = lambda *args: jnp.concatenate([affine(rows[i:i + 1], *args) for i in range(len(rows))])
    y = jax.lax.platform_dependent(kernel, bias, cpu=single, default=functools.partial(affine, rows))
  else:
    y = affine(rows, kernel, bias)
  return y.reshape(x.shape[:-1] + kernel.shape[1:])


def _affine(x, kernel, bias):
  """`x @ kernel + bias` in the type of `x`."""
  y = x @ kernel.astype(x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)


def _derivative(saved, cotangents):
  """Of `_affine`: sums over the batch, and so over devices, are in the wider type."""
  x, kernel, bias = saved
  wide = jnp.promote_types(x.dtype, kernel.dtype)
  of_kernel = jax.lax.dot_general(x, cotangents, (((0,), (0,)), ((), ())), preferred_element_type=wide)
  of_bias = None if bias is None else cotangents.sum(0, keepdims=True, dtype=wide).astype(bias.dtype)
  return cotangents @ kernel.astype(x.dtype).T, of_kernel.astype(kernel.dtype), of_bias


_mixed = jax.custom_vjp(_affine)
_mixed.defvjp(lambda x, kernel, bias: (_affine(x, kernel, bias), (x, kernel, bias)), _derivative)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Scaled dot-product attention; scores in float32.

  Args:
    q: `[batch, length, heads, head_dim]`.
    k: As `q`.
    v: As `q`.
    bias: What is added to the scores, `[windows, heads, length, length]`; the examples of the batch stand
      for these windows in turn.

  Returns:
    As `q`.
  """
  # With the batch dimensions side by side XLA's products are faster on CPU.
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
  if bias is not None:
    scores = (scores.reshape(-1, *bias.shape) + bias[None]).reshape(scores.shape)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhts,bhsd->bhtd", weights, v), 1, 2)


def grouped_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None
                      ) -> jax.Array:
  """Attention of groups of heads that share keys and values (2305.13245); scores in float32.

  Args:
    q: `[batch, length, kv_heads, queries, head_dim]`.
    k: `[batch, keys, kv_heads, head_dim]`.
    v: As `k`.
    visible: Booleans `[batch or 1, length, keys]`; a query that sees nothing gets a finite mean of all.
      None: each query sees the keys up to its own.

  Returns:
    As `q`.
  """
  length = q.shape[1]
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  if visible is not None:
    return attend(q, k, v, visible)
  # Long sequences in blocks, each with the keys up to its end: 3/8 less of what nobody sees.
  blocks = BLOCKS if length >= 32 * BLOCKS else 1
  ends = [length * i // blocks for i in range(blocks + 1)]
  order = jnp.arange(length)[None]
  return jnp.concatenate([
    attend(q[:, start:end], k[:, :, :end], v[:, :, :end], order[:, None, :end] <= order[:, start:end, None])
    for start, end in zip(ends, ends[1:])], axis=1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
  """`grouped_attention` with keys and values of a group side by side, `[batch, kv_heads, keys, head_dim]`."""
  batch, length, groups, queries, width = q.shape
  # The queries of a group as further rows: one product for each group, whose keys are not repeated.
  q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, queries * length, width)
  scores = jnp.einsum("bgtd,bgsd->bgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(width)
  scores = scores.reshape(batch, groups, queries, length, -1)
  # A finite bound, as rows of minus infinities have no derivative.
  scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores).astype(v.dtype).reshape(batch, groups, queries * length, -1)
  y = jnp.einsum("bgts,bgsd->bgtd", weights, v)
  return y.reshape(batch, groups, queries, length, width).transpose(0, 3, 1, 2, 4)


def rms_norm(name: str, axis: str = "embed", epsilon: float = 1e-6, dtype: Any = jnp.float32,
             param_dtype: Any = jnp.float32) -> nn.RMSNorm:
  """RMSNorm (1910.07467) over the last dimension, which is called `axis`; statistics in float32."""
  return nn.RMSNorm(epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, name=name,
                    scale_init=axes(nn.initializers.ones, f"-> {axis}"))


def layer_norm(name: str, axis: str = "embed", dtype: Any = jnp.float32,
               param_dtype: Any = jnp.float32) -> nn.LayerNorm:
  """LayerNorm over the last dimensions, which are called `axis`, such as `"4 embed"`; statistics in float32."""
  last = tuple(range(-len(axis.split()), 0))
  return nn.LayerNorm(
    epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, name=name, reduction_axes=last, feature_axes=last,
    scale_init=axes(nn.initializers.ones, f"-> {axis}"),
    bias_init=axes(nn.initializers.zeros, f"-> {axis}"))


def hide(module: nn.Module, x: jax.Array, mask: jax.Array | None, axis: str = "embed") -> jax.Array:
  """What a network with a field `masked` sees under a mask: a learned token in place of some positions (iBOT,
  2111.07832).

  Args:
    module: The network; where it is not `masked`, it has no token and there may be no mask.
    x: `[batch, positions, channels]`, or a map `[batch, rows, columns, channels]`.
    mask: Booleans `[batch, cells]`, row by row: those that are hidden. Cells are positions; on a map they are
      squares of positions, on a square grid.
    axis: Name of the channels.

  Raises:
    ValueError: There is a mask and no token for it, or a map does not divide into the mask's cells.
  """
  if not module.masked:
    if mask is not None:
      raise UserError(f"{type(module).__name__}: a mask was given, and masked=False; allowed is model.masked=True")
    return x
  token = module.param("mask", axes(nn.initializers.zeros, f"-> {axis}"), x.shape[-1:], module.param_dtype)
  if mask is None:
    return x
  if x.ndim == 4:
    mask = on_grid(mask[..., None], x.shape[1:3])[..., 0]
  return jnp.where(mask[..., None], token.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)), x)


def on_grid(cells: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Cells `[batch, cells, channels]` of a square grid as a map `[batch, *shape, channels]`, the nearest for each
  position.

  Raises:
    ValueError: They are no square grid, or positions do not divide into them.

  Example:
    >>> on_grid(jnp.arange(4).reshape(1, 4, 1), (2, 4))[0, ..., 0].tolist()
    [[0, 0, 1, 1], [2, 2, 3, 3]]
  """
  side = math.isqrt(cells.shape[1])
  if side * side != cells.shape[1] or any(n % side for n in shape):
    raise UserError(f"{cells.shape[1]} cells on a map of {shape[0]} x {shape[1]}; allowed are those of a square "
                    "grid whose side divides the map's")
  grid = cells.reshape(len(cells), side, side, -1)
  return grid.repeat(shape[0] // side, axis=1).repeat(shape[1] // side, axis=2)


def layer_scaled(module: nn.Module, y: jax.Array) -> jax.Array:
  """A residual branch `[..., embed]` with a factor for each channel, which begins at `module.layer_scale`;
  as it is where that is 0 (LayerScale, 2103.17239)."""
  if not module.layer_scale:
    return y
  init = axes(nn.initializers.constant(module.layer_scale), "-> embed")
  scale = module.param("layer_scale", init, y.shape[-1:], module.param_dtype).astype(y.dtype)
  return y * scale.reshape((1,) * (y.ndim - 1) + (-1,))


def residual(module: nn.Module, y: jax.Array, constants: Any, dropout: float, train: bool) -> jax.Array:
  """What a residual branch adds: `y`, in training with dropout and the layer's drop path."""
  rate = constant(module, "drop_path", constants) if "drop_path" in (constants or ()) else None
  if not train:
    return y
  y = nn.Dropout(dropout, deterministic=False)(y) if dropout else y
  if rate is None:
    return y
  keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (len(y),) + (1,) * (y.ndim - 1))
  return jnp.where(keep, y / (1 - rate).astype(y.dtype), 0)
