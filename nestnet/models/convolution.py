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
from nestnet.models.convolve import convolution
from nestnet.models.layers import Linear
from nestnet.subnet import Subnet

STATISTICS = "batch_stats"
# A mark among the statistics: they are another network's. What calibration makes comes without it.
BORROWED = "borrowed"


def borrowed(statistics: Mapping[str, Any]) -> dict[str, Any]:
  """Statistics marked as another network's: it can be applied with them, and evaluators refuse it.

  The mark is a leaf beside theirs, so that a cut and a file keep it.

  Example:
    >>> sorted(borrowed({"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}))
    ['borrowed', 'norm']
  """
  return {**statistics, BORROWED: jnp.array(True)}


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


def average(x: jax.Array, size: int) -> jax.Array:
  """Means of squares of `size` positions side by side; at the far edges of those that are left."""
  if size == 1:
    return x
  rows, columns = (-n % size for n in x.shape[1:3])
  return nn.avg_pool(x, (size, size), (size, size), ((0, rows), (0, columns)), count_include_pad=False)


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
    zero: Whether the scale starts at 0 instead of 1.
    dtype: Of the result.
    param_dtype: Of the stored parameters.
  """

  axis: str
  epsilon: float = 1e-5
  zero: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    """Normalises each channel of `[batch, rows, columns, channels]`."""
    scale, bias = _affine(self, x.shape[-1:])
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


class GroupNorm(nn.Module):
  """Normalises groups of channels image by image (1803.08494), so that it needs no calibration.

  By default a group has a fixed number of channels: a sub-network that keeps the leading ones keeps whole
  groups, each with the statistics that it has in the largest network. With a fixed number of groups these
  are made anew at each width, of fewer channels where there are fewer.

  Attributes:
    axis: Name of the channels.
    size: Channels in a group.
    count: Number of groups instead, whatever the width.
    epsilon: Added to the variance.
    zero: Whether the scale starts at 0 instead of 1.
    dtype: Of the result.
    param_dtype: Of the stored parameters.
  """

  axis: str
  size: int = 8
  count: int | None = None
  epsilon: float = 1e-5
  zero: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool):
    """Normalises `[batch, rows, columns, channels]`; alike in training and behind it.

    Raises:
      ValueError: The channels do not divide into the groups.
    """
    del train
    count = self.count or x.shape[-1] // self.size
    if x.shape[-1] % (self.count or self.size):
      raise UserError(f"GroupNorm: {self.axis}={x.shape[-1]} does not divide into "
                      + (f"{count} groups" if self.count else f"groups of {self.size}"))
    scale, bias = _affine(self, x.shape[-1:])
    groups = x.reshape(len(x), -1, count, x.shape[-1] // count)
    groups = groups.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = groups.mean((1, 3), keepdims=True)
    var = jnp.square(groups - mean).mean((1, 3), keepdims=True)
    factor = scale.reshape(1, 1, count, -1) * jax.lax.rsqrt(var + self.epsilon)
    offset = bias.reshape(1, 1, count, -1) - mean * factor
    return (groups * factor + offset).reshape(x.shape).astype(self.dtype)


def _affine(norm, shape):
  """The scale and the offset of a normalisation."""
  start = nn.initializers.zeros if norm.zero else nn.initializers.ones
  return (norm.param("scale", axes(start, f"-> {norm.axis}"), shape, norm.param_dtype),
          norm.param("bias", axes(nn.initializers.zeros, f"-> {norm.axis}"), shape, norm.param_dtype))


NORMS = ("batch", "group")


def check_norm(name: str, norm: str, group: int) -> None:
  """Raises `ValueError` for an unknown norm, or groups into which not every width divides."""
  if norm not in NORMS:
    raise one_of(f"norm of {name}", norm, NORMS)
  if group not in (1, 2, 4, 8):
    raise UserError(f"{name}: group={group}; allowed are 1, 2, 4 and 8, since widths are multiples of 8")


class Normed(nn.Module, kw_only=True):
  """A part of a network whose convolutions are normalised; what is inside gets its options as `**normed`.

  They are given by name. A class that changes a default of these must be `kw_only` too.

  Attributes:
    norm: `"batch"`, or `"group"`, which needs no calibration.
    group: Channels in a group.
    groups: Number of groups instead, whatever the width.
    epsilon: Of the normalisation.
    dtype: Of the computation.
    param_dtype: Of the stored parameters.
  """

  norm: str = "batch"
  group: int = 8
  groups: int | None = None
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def typed(self) -> dict[str, Any]:
    """The options that layers without a normalisation have too."""
    return dict(dtype=self.dtype, param_dtype=self.param_dtype)

  @property
  def normed(self) -> dict[str, Any]:
    """All of them."""
    return dict(norm=self.norm, group=self.group, groups=self.groups, epsilon=self.epsilon, **self.typed)


class ConvNorm(Normed):
  """A convolution, a normalisation and an activation.

  Attributes:
    reads: Axis of its input channels; None: depthwise.
    writes: Axis of its output channels.
    features: Number of output channels.
    kernel: Odd side of the kernel.
    stride: Of both directions.
    act: Name of the activation.
    zero: Whether the scale of the normalisation starts at 0.
    choice: As in `Convolution`.
    transforms: As in `Convolution`.
  """

  reads: str | None
  writes: str
  features: int
  kernel: int = 1
  stride: int = 1
  act: str = "none"
  zero: bool = False
  choice: str | None = None
  transforms: bool = False

  @nn.compact
  def __call__(self, x, train: bool):
    """Maps `[batch, rows, columns, channels]` to `[batch, rows / stride, columns / stride, features]`."""
    x = Convolution(self.reads, self.writes, self.features, self.kernel, self.stride, self.choice,
                    self.transforms, name="conv", **self.typed)(x)
    options = dict(epsilon=self.epsilon, zero=self.zero, name="norm", **self.typed)
    norm = (BatchNorm(self.writes, **options) if self.norm == "batch" else
            GroupNorm(self.writes, self.group, self.groups, **options))
    return activation(self.act)(norm(x, train))


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
