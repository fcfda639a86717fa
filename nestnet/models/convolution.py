"""Convolutions, batch normalisation and squeeze-excite with named axes.

Images are `[batch, rows, columns, channels]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.axes import axes
from nestnet.errors import UserError, one_of
from nestnet.models.layers import Linear
from nestnet.subnet import Subnet

STATISTICS = "batch_stats"


def divisible(value: float, divisor: int = 8) -> int:
  """The multiple of `divisor` nearest to a width, never more than 10 % below it (1801.04381).

  Example:
    >>> divisible(19.2), divisible(40.8), divisible(3)
    (24, 40, 8)
  """
  nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
  return nearest + divisor if nearest < 0.9 * value else nearest


def _h_sigmoid(x: jax.Array) -> jax.Array:
  return nn.relu6(x + 3) / 6


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "none": lambda x: x, "relu": nn.relu, "relu6": nn.relu6, "swish": nn.swish, "h_sigmoid": _h_sigmoid,
  "h_swish": lambda x: x * _h_sigmoid(x)}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """An element-wise function by name; raises `ValueError` for an unknown one."""
  if name not in ACTIVATIONS:
    raise one_of("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]


def convolution(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with as much zero padding on each side as half of an odd kernel.

  Unlike `"SAME"` the padding is equal on both sides for a stride of 2 too, as in PyTorch.

  Args:
    x: `[batch, rows, columns, channels]`.
    kernel: `[rows, columns, channels, features]`; or `[rows, columns, channels]`, depthwise: each
      channel with its own filter.
    stride: Of both directions.

  Example:
    >>> images = jnp.ones((1, 4, 4, 2))
    >>> convolution(images, jnp.ones((3, 3, 2)), 2)[0, :, :, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    >>> convolution(images, jnp.ones((3, 3, 2, 5))).shape
    (1, 4, 4, 5)
  """
  if kernel.ndim == 3:
    return _depthwise(x, kernel.astype(x.dtype), stride)
  return _convolve(x, kernel.astype(x.dtype), stride)


def _convolve(x, kernel, stride):
  groups = x.shape[-1] // kernel.shape[2]
  padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups)


def _grouped(x, kernel, stride):
  return _convolve(x, kernel[:, :, None, :], stride)


def _shifted(x, kernel, stride):
  """The sum of shifted products, which XLA runs several times faster than its convolution on CPU."""
  rows, columns = kernel.shape[:2]
  x = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
  tall, wide = (x.shape[1] - rows) // stride * stride + 1, (x.shape[2] - columns) // stride * stride + 1
  total = None
  for i in range(rows):
    for j in range(columns):
      seen = x[:, i:i + tall:stride, j:j + wide:stride]
      product = seen * kernel[i, j].reshape(1, 1, 1, -1)
      total = product if total is None else total + product
  return total


def _depthwise_forward(x, kernel, stride):
  # Chosen where the program is lowered: a step for another kind of device is compiled on CPU machines.
  return jax.lax.platform_dependent(
    x, kernel, cpu=lambda x, k: _shifted(x, k, stride), default=lambda x, k: _grouped(x, k, stride))


def _depthwise_backward(stride, saved, cotangents):
  def pull(function):
    return lambda x, kernel, g: jax.vjp(lambda x, k: function(x, k, stride), x, kernel)[1](g)
  return jax.lax.platform_dependent(*saved, cotangents, cpu=pull(_shifted), default=pull(_grouped))


# Differentiated as it stands, the choice would keep what either of its sides needs.
_depthwise = jax.custom_vjp(_depthwise_forward, nondiff_argnums=(2,))
_depthwise.defvjp(lambda x, kernel, stride: (_depthwise_forward(x, kernel, stride), (x, kernel)),
                  _depthwise_backward)


def he_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Normal with variance 2 / (positions of the kernel * output channels) (1502.01852)."""
  positions = shape[0] * shape[1] if len(shape) > 2 else 1
  return jax.random.normal(key, shape, dtype) * jnp.sqrt(2 / (positions * shape[-1])).astype(dtype)


# Elastic kernels: rules that `take` applies to the weights of a depthwise convolution.


def centre(kernel: Any, size: int) -> Any:
  """The middle `size` rows and columns of `[..., rows, columns, channels]`."""
  full = kernel.shape[-2]
  if size > full or (full - size) % 2:
    raise UserError(f"kernel={size} has no centre in one of {full}; allowed are odd sizes up to {full}")
  edge = (full - size) // 2
  return kernel[..., edge:full - edge, edge:full - edge, :] if edge else kernel


@dataclasses.dataclass(frozen=True)
class CentreCrop:
  """A smaller kernel is the centre of the stored one.

  Attributes:
    axis: The choice of kernel size, such as `kernel_2`.
  """

  axis: str

  @property
  def axes(self) -> tuple[str, ...]:
    return (self.axis,)

  def __call__(self, leaf: Any, subnet: Subnet) -> Any:
    return centre(leaf, subnet.chosen[self.axis]) if self.axis in subnet.chosen else leaf


@dataclasses.dataclass(frozen=True)
class KernelTransform:
  """A smaller kernel is the centre of the next larger one times a learned matrix (1908.09791, 3.3).

  It reads all leaves of the convolution: beside `kernel` a matrix `to_5` `[25, 25]` makes the 5x5 kernel
  from the centre of the 7x7 one, then `to_3` `[9, 9]` the 3x3 kernel from the centre of that. A
  sub-network whose kernel size is chosen is ordinary: the kernel alone.

  Attributes:
    axis: The choice of kernel size, such as `kernel_2`.
  """

  axis: str
  node = True

  @property
  def axes(self) -> tuple[str, ...]:
    return (self.axis,)

  def __call__(self, node: Mapping[str, Any], subnet: Subnet) -> Mapping[str, Any]:
    if self.axis not in subnet.chosen:
      return node
    kernel, size = node["kernel"], subnet.chosen[self.axis]
    centre(kernel, size)
    for smaller in range(kernel.shape[-2] - 2, size - 1, -2):
      kernel, matrix = centre(kernel, smaller), node[f"to_{smaller}"]
      columns = kernel.reshape(kernel.shape[:-3] + (smaller * smaller, kernel.shape[-1]))
      # The weights of a network are worth the precision that matrix units do not give by default.
      product = np.matmul(matrix, columns) if isinstance(kernel, np.ndarray) else jnp.matmul(
        matrix, columns, precision=jax.lax.Precision.HIGHEST)
      kernel = product.reshape(kernel.shape)
    return {"kernel": kernel}


class Convolution(nn.Module):
  """A convolution without bias; one of size 1 is a matmul.

  Attributes:
    reads: Axis of its input channels; None: depthwise.
    writes: Axis of its output channels.
    features: Number of output channels.
    kernel: Odd side of the kernel.
    stride: Of both directions.
    choice: Axis by which the kernel's size is chosen, None: it is fixed. Depthwise only.
    transforms: Whether smaller kernels are made by learned matrices.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  reads: str | None
  writes: str
  features: int
  kernel: int = 1
  stride: int = 1
  choice: str | None = None
  transforms: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, features]`."""
    x = x.astype(self.dtype)
    if self.kernel == 1 and self.reads:
      x = x[:, ::self.stride, ::self.stride]
      weights = self.param("kernel", axes(he_fan_out, f"{self.reads} -> {self.writes}"),
                           (x.shape[-1], self.features), self.param_dtype)
      return (x.reshape(-1, x.shape[-1]) @ weights.astype(x.dtype)).reshape(x.shape[:-1] + (self.features,))
    square = (self.kernel, self.kernel)
    if self.reads:
      names, rule = f"rows columns {self.reads} -> {self.writes}", None
      shape = square + (x.shape[-1], self.features)
    else:
      names, shape = f"rows columns -> {self.writes}", square + (self.features,)
      rule = self.choice and (KernelTransform if self.transforms else CentreCrop)(self.choice)
    weights = self.param("kernel", axes(he_fan_out, names, rule), shape, self.param_dtype)
    for size in range(self.kernel - 2, 1, -2) if rule and self.transforms else ():
      eye = lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype)
      self.param(f"to_{size}", axes(eye, "positions -> taps"), (size * size,) * 2, self.param_dtype)
    return convolution(x, weights, self.stride)


class BatchNorm(nn.Module):
  """Batch normalisation whose statistics belong to one network (1502.03167).

  No running averages are kept in training. Statistics are those of the batch, unless the `batch_stats`
  collection holds calibrated ones (`mean` and `var`) and `train` is off. Where `batch_stats` is mutable,
  the batch's own moments are put there, from which calibration makes its averages.

  Attributes:
    axis: Name of the channels.
    epsilon: Added to the variance.
    dtype: Of the result.
    param_dtype: Of the stored parameters.
  """

  axis: str
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    """Normalises each channel of `[batch, rows, columns, channels]`."""
    shape = x.shape[-1:]
    scale = self.param("scale", axes(nn.initializers.ones, f"-> {self.axis}"), shape, self.param_dtype)
    bias = self.param("bias", axes(nn.initializers.zeros, f"-> {self.axis}"), shape, self.param_dtype)
    record = self.is_mutable_collection(STATISTICS) and not self.is_initializing()
    if self.has_variable(STATISTICS, "mean") and not train and not record:
      mean, var = (self.get_variable(STATISTICS, key) for key in ("mean", "var"))
    else:
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      mean = wide.mean((0, 1, 2))
      var = jnp.maximum(jnp.square(wide).mean((0, 1, 2)) - jnp.square(mean), 0)
      if record:
        self.put_variable(STATISTICS, "mean", mean)
        self.put_variable(STATISTICS, "var", var)
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    factor, offset = (v.reshape(1, 1, 1, -1) for v in (factor, bias - mean * factor))
    return (x * factor + offset).astype(self.dtype)


class ConvNorm(nn.Module):
  """A convolution, batch normalisation and an activation.

  Attributes:
    reads: Axis of its input channels; None: depthwise.
    writes: Axis of its output channels.
    features: Number of output channels.
    kernel: Odd side of the kernel.
    stride: Of both directions.
    act: Name of the activation.
    epsilon: Of the normalisation.
    choice: As in `Convolution`.
    transforms: As in `Convolution`.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  reads: str | None
  writes: str
  features: int
  kernel: int = 1
  stride: int = 1
  act: str = "none"
  epsilon: float = 1e-5
  choice: str | None = None
  transforms: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, features]`."""
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = Convolution(self.reads, self.writes, self.features, self.kernel, self.stride, self.choice,
                    self.transforms, name="conv", **dtypes)(x)
    return activation(self.act)(BatchNorm(self.writes, self.epsilon, name="norm", **dtypes)(x, train))


class SqueezeExcite(nn.Module):
  """Weighs channels by a function of their means (1709.01507), in the form of MobileNetV3.

  Attributes:
    axis: Name of the channels.
    hidden: Name of the hidden units.
    size: Number of hidden units.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  axis: str
  hidden: str
  size: int
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Maps `[batch, rows, columns, channels]` to the same."""
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    y = Linear(f"{self.axis} -> {self.hidden}", (self.size,), name="reduce", **dtypes)(x.mean((1, 2)))
    y = Linear(f"{self.hidden} -> {self.axis}", x.shape[-1:], name="expand", **dtypes)(nn.relu(y))
    return x * _h_sigmoid(y)[:, None, None, :]
