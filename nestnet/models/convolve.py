"""One convolution as XLA runs it well on CPU: a depthwise one as sums of shifted products, derivatives of
others on small images as matrix products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nestnet.errors import UserError

# Up to so many positions of an image a derivative is found from products: of a depthwise convolution of all
# pairs of them, of another one of the patches that its kernel covers.
FEW = 64


def convolution(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with as much zero padding on each side as half of an odd kernel.

  Unlike `"SAME"` the padding is equal on both sides for a stride of 2 too, as in PyTorch.

  Args:
    x: `[batch, rows, columns, channels]`.
    kernel: `[rows, columns, channels, features]`; or `[rows, columns, channels]`, depthwise: each
      channel with its own filter.
    stride: Of both directions.

  Forward-mode derivatives (`jax.jvp`) are there for dense kernels on images of more than 64 positions alone.

  Raises:
    ValueError: A kernel with an even side.

  Example:
    >>> images = jnp.ones((1, 4, 4, 2))
    >>> convolution(images, jnp.ones((3, 3, 2)), 2)[0, :, :, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    >>> convolution(images, jnp.ones((3, 3, 2, 5))).shape
    (1, 4, 4, 5)
  """
  if not all(side % 2 for side in kernel.shape[:2]):
    raise UserError(f"convolution: a kernel of {kernel.shape[0]} x {kernel.shape[1]}; allowed are odd sides")
  if kernel.ndim == 3:
    return _depthwise(x, kernel.astype(x.dtype), stride)
  few = x.shape[1] * x.shape[2] <= FEW and kernel.shape[2] == x.shape[-1]
  return (_convolve_few if few else _convolve)(x, kernel.astype(x.dtype), stride)


def _convolve(x, kernel, stride):
  groups = x.shape[-1] // kernel.shape[2]
  padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups)


def _convolve_backward(stride, saved, cotangents):
  # Inside a switch or a scan XLA runs its own ten times slower on CPU than outside.
  other, by_patches = (functools.partial(f, stride=stride) for f in (_transposed, _by_patches))
  return jax.lax.platform_dependent(*saved, cotangents, cpu=by_patches, default=other)


def _transposed(x, kernel, g, stride):
  """The derivatives of `_convolve`, each a convolution."""
  return (*jax.linear_transpose(lambda x: _convolve(x, kernel, stride), x)(g),
          *jax.linear_transpose(lambda kernel: _convolve(x, kernel, stride), kernel)(g))


def _by_patches(x, kernel, g, stride):
  """The same from the patches that the kernel covers, `[positions, rows * columns * channels]`."""
  def patches(x):
    (rows, columns), (tall, wide) = kernel.shape[:2], g.shape[1:3]
    x = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    seen = [x[:, i:i + (tall - 1) * stride + 1:stride, j:j + (wide - 1) * stride + 1:stride]
            for i in range(rows) for j in range(columns)]
    return jnp.concatenate(seen, -1).reshape(-1, rows * columns * x.shape[-1])

  columns, wide = g.reshape(-1, g.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
  # What the taps of a position add up to is rounded once.
  parts = jnp.matmul(columns, kernel.reshape(-1, g.shape[-1]).T, preferred_element_type=wide)
  (of_x,) = jax.linear_transpose(patches, jax.ShapeDtypeStruct(x.shape, wide))(parts)
  return of_x.astype(x.dtype), (patches(x).T @ columns).reshape(kernel.shape)


_convolve_few = jax.custom_vjp(_convolve, nondiff_argnums=(2,))
_convolve_few.defvjp(lambda x, kernel, stride: (_convolve(x, kernel, stride), (x, kernel)),
                     _convolve_backward)


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
  def other(x, kernel, g):
    return jax.vjp(lambda x, k: _grouped(x, k, stride), x, kernel)[1](g)
  pull = functools.partial(_shifted_derivative, stride=stride)
  return jax.lax.platform_dependent(*saved, cotangents, cpu=pull, default=other)


def _shifted_derivative(x, kernel, g, stride):
  """Of `_shifted`, without the sums over all positions that XLA runs ten times slower on CPU."""
  gaps = [(0, full - (size - 1) * stride - 1, stride - 1) for full, size in zip(x.shape[1:3], g.shape[1:3])]
  spread = jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
  of_kernel = _by_position if x.shape[1] * x.shape[2] <= FEW else _by_column
  return _shifted(spread, kernel[::-1, ::-1], 1), of_kernel(x, kernel, g, stride)


def _by_position(x, kernel, g, stride):
  """The kernel's derivative from products of every position with every other one."""
  rows, columns = (_meets(*sizes, stride) for sizes in zip(kernel.shape, x.shape[1:3], g.shape[1:3]))
  taps = np.einsum("iuh,jvw->ijuvhw", rows, columns).reshape(rows.shape[0] * columns.shape[0], -1)
  products = jnp.einsum("npc,nqc->cpq", *(v.reshape(len(v), -1, v.shape[-1]) for v in (x, g)))
  return (taps.astype(g.dtype) @ products.reshape(len(products), -1).T).reshape(kernel.shape)


def _by_column(x, kernel, g, stride):
  """The same from products of the columns of each row with those of the rows that its taps see."""
  tall, height, (top, left) = kernel.shape[0], g.shape[1], (size // 2 for size in kernel.shape[:2])
  x = jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
  x = jnp.concatenate([x[:, i:i + (height - 1) * stride + 1:stride] for i in range(tall)], 2)
  products = jnp.einsum("nhuc,nhwc->cuw", x, g).reshape(g.shape[-1], tall, -1, g.shape[2])
  meets = _meets(kernel.shape[1], products.shape[2], g.shape[2], stride, 0)
  return jnp.einsum("ciuw,juw->ijc", products, meets.astype(g.dtype))


def _meets(taps, full, size, stride, padding=None):
  """Whether tap i takes position u for the result h, `[i, u, h]`."""
  padding = taps // 2 if padding is None else padding
  i, u, h = np.ogrid[:taps, :full, :size]
  return (h * stride + i - padding == u).astype(np.float32)


# Differentiated as it stands, the choice would keep what either of its sides needs.
_depthwise = jax.custom_vjp(_depthwise_forward, nondiff_argnums=(2,))
_depthwise.defvjp(lambda x, kernel, stride: (_depthwise_forward(x, kernel, stride), (x, kernel)),
                  _depthwise_backward)


