"""What a network costs: parameters, bytes of weights, FLOPs and measured latency.

Parameters and FLOPs are computed on abstract values: no weight is allocated and nothing is
compiled. FLOPs are counted from the jaxpr, because XLA's `cost_analysis` counts the body of a scan
once, whatever its length.

Convention: a multiply-add of a matrix product or a convolution is 2 FLOPs; element-wise work,
norms, reductions, gathers and FFTs are ignored, as in most published tables. (Papers that print
"FLOPs" or "MACs" for multiply-adds state half of these numbers.)
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import time
from typing import Any

from flax import linen as nn
import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

# Primitives that run their inner jaxprs a number of times that the jaxpr does not state.
_UNKNOWN_COUNT = frozenset({"while", "pallas_call", "custom_linear_solve"})


@dataclasses.dataclass(frozen=True)
class Latency:
  """Wall-clock time of one call, in milliseconds.

  Attributes:
    median: half of the calls were faster.
    lower: first quartile.
    upper: third quartile.
  """

  median: float
  lower: float
  upper: float


def count_tree(tree: Any) -> int:
  """Counts the numbers in a tree of arrays, concrete or abstract.

  Example:
    >>> count_tree({"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32), "bias": np.zeros(4)})
    16
  """
  return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def count_params(model: nn.Module, *inputs: Any) -> int:
  """Counts the parameters of a model without making any.

  Args:
    model: a linen module.
    *inputs: arrays or `jax.ShapeDtypeStruct`, as `model.apply(variables, *inputs)` takes them.

  Returns:
    The size of the `params` collection; statistics and constants are not parameters.

  Example:
    >>> count_params(nn.Dense(3), jax.ShapeDtypeStruct((8, 4), jnp.float32))
    15
  """
  return count_tree(_variables(model, inputs).get("params", {}))


def weight_bytes(model: nn.Module, *inputs: Any) -> int:
  """Counts the bytes of a model's parameters in the data type that they are stored in.

  Example:
    >>> weight_bytes(nn.Dense(3, param_dtype=jnp.bfloat16), np.zeros((8, 4), np.float32))
    30
  """
  params = _variables(model, inputs).get("params", {})
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def flops(model: nn.Module, *inputs: Any, train: bool = False) -> int:
  """Counts the FLOPs of a model on one batch.

  Args:
    model: a linen module.
    *inputs: arrays or `jax.ShapeDtypeStruct`; the count is for the whole batch.
    train: counts forward and backward, the gradient of a loss with respect to the parameters,
      instead of forward only. The loss reads `outputs["logits"]`, or every floating output if
      there is no such entry. Recomputation by `nn.remat` counts as work.

  Returns:
    FLOPs of matrix products and convolutions that the outputs depend on, see `count_flops`.

  Example:
    >>> images = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    >>> flops(nn.Dense(3), images), flops(nn.Dense(3), images, train=True)
    (192, 384)
  """
  variables = dict(_variables(model, inputs))
  if not train:
    return count_flops(model.apply, variables, *inputs)
  params = variables.pop("params", {})

  def loss(params: Any, rest: Any, *inputs: Any) -> jax.Array:
    return squares(model.apply({"params": params, **rest}, *inputs))

  return count_flops(jax.value_and_grad(loss), params, variables, *inputs)


def squares(outputs: Any) -> jax.Array:
  """A loss to count with: it reads the `logits`, or every floating output if there is no such entry."""
  if isinstance(outputs, dict) and "logits" in outputs:
    outputs = outputs["logits"]
  leaves = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
  return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.float32(0))


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
  """Counts the matrix product and convolution FLOPs of a function from its jaxpr.

  - Work that no output depends on is removed first, as the compiler does.
  - The body of a scan counts once for each iteration; of the branches of a `cond` or `switch` the
    most expensive one counts; a `shard_map` counts over all its devices.
  - A convolution costs its kernel at every output position, padding included. Where the input has
    fewer positions than the output (transposed convolutions, gradients), it costs its kernel at
    every input position: zeros inserted between inputs are not work. Hence the gradient with
    respect to the input, or to the kernel, costs what the forward pass costs.

  Args:
    fn: any function that JAX can trace.
    *args: trees of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    FLOPs, 2 for each multiply-add.

  Raises:
    ValueError: a matrix product or convolution stands where the number of times that it runs is
      unknown: in a `while` loop, a Pallas kernel or a custom linear solve.

  Example:
    >>> count_flops(jnp.dot, np.zeros((2, 3)), np.zeros((3, 4)))
    48
  """
  jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  live, _ = partial_eval.dce_jaxpr(jaxpr, used_outputs=True)
  return _jaxpr_flops(live)


def latency(
    fn: Callable[..., Any], *args: Any, repeats: int = 20, warmup: int = 3) -> Latency:
  """Measures the wall-clock time of a jitted call on the default device.

  Args:
    fn: a function of arrays; it is compiled before the clock starts.
    *args: trees of concrete arrays, moved to the device before the clock starts.
    repeats: measured calls, at least 1.
    warmup: unmeasured calls before them, at least 1 (the first one compiles).

  Returns:
    Median and quartiles in milliseconds.

  Raises:
    ValueError: too few repeats or warm-up calls, or an abstract argument.

  Example:
    >>> latency(jnp.dot, np.ones((2, 3)), np.ones((3, 4)), repeats=5).median > 0
    True
  """
  if repeats < 1 or warmup < 1:
    raise ValueError(
        f"repeats and warmup must be at least 1, got repeats={repeats}, warmup={warmup}")
  if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args)):
    raise ValueError("latency runs the function: got an abstract ShapeDtypeStruct, needs arrays")
  call, args = jax.jit(fn), jax.device_put(args)
  for _ in range(warmup):
    jax.block_until_ready(call(*args))
  milliseconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    milliseconds.append(1e3 * (time.perf_counter() - start))
  lower, median, upper = np.percentile(milliseconds, (25, 50, 75)).tolist()
  return Latency(median=median, lower=lower, upper=upper)


def _variables(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
  """The abstract variables of a model."""
  return jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs), *inputs)


def _jaxpr_flops(jaxpr: jex.Jaxpr) -> int:
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: jex.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot_flops(equation)
  if name == "conv_general_dilated":
    return _conv_flops(equation)
  inner = [_jaxpr_flops(jaxpr) for jaxpr in jex.jaxprs_in_params(params)]
  if name in _UNKNOWN_COUNT and any(inner):
    raise ValueError(
        f"cannot count the FLOPs of a matrix product or convolution inside {name!r}: the number of "
        "times that it runs is unknown; use jax.lax.scan (or fori_loop with constant bounds)")
  if name == "cond":
    # Of one way for each platform, that of platforms in general: products that another one takes
    # instead of a convolution are no work of the network.
    platforms = params.get("branches_platforms") or ()
    return inner[platforms.index(None)] if None in platforms else max(inner, default=0)
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "shard_map":
    shape = params["mesh"].shape
    return math.prod(shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
  return sum(inner)


def _dot_flops(equation: jex.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _conv_flops(equation: jex.JaxprEqn) -> int:
  source, kernel = (variable.aval.shape for variable in equation.invars)
  target = equation.outvars[0].aval.shape
  dims = equation.params["dimension_numbers"]
  # A kernel is [out features, in features of one group, *spatial] in the order of rhs_spec, so
  # groups need no care: every output feature reads exactly the kernel's own in-features.
  taps = math.prod(kernel[axis] for axis in dims.rhs_spec[1:])
  positions = math.prod(
      min(source[i], target[o]) for i, o in zip(dims.lhs_spec[2:], dims.out_spec[2:]))
  batch, features = (target[axis] for axis in dims.out_spec[:2])
  return 2 * batch * features * positions * taps
