"""Projection heads with prototypes: what self-distillation compares representations by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import Axes
from nestnet.errors import UserError
from nestnet.models.layers import project
from nestnet.models.scaling import scaling_rule


def init_heads(rng: jax.Array, model: nn.Module, prototypes: Sequence[int], hidden: int, bottleneck: int
               ) -> tuple[dict[str, Any], dict[str, Any]]:
  """The parameters of several heads, and their axis names.

  Each is an MLP of three layers to a bottleneck of length 1, then a weight-normalised projection on its
  prototypes (DINO, 2104.14294, section 3.1; multiple heads: POA, 2408.01031, appendix C.1). Only the first
  layer reads an axis along which the model nests; it is scaled as the model's own layers are.

  Args:
    rng: Of the initial values.
    model: Names the axis of its features, and their number, in `representation`.
    prototypes: How many each head has.
    hidden: Width of the MLP.
    bottleneck: Width of what it gives.

  Raises:
    ValueError: The model does not name the axis.
  """
  if not hasattr(model, "representation"):
    raise UserError(f"{type(model).__name__} does not say which axis its features are; allowed are models with a "
                    "property `representation`, the axis and its length, such as ('embed', 64)")
  axis, width = model.representation
  rule = scaling_rule(getattr(model, "width_scaling", "none"), {axis: width})
  shapes = {"up": (width, hidden), "middle": (hidden, hidden), "down": (hidden, bottleneck)}
  names = {
    "up": {"kernel": Axes.parse(f"{axis} -> head_hidden", rule), "bias": "-> head_hidden"},
    "middle": {"kernel": "head_hidden -> head_middle", "bias": "-> head_middle"},
    "down": {"kernel": "head_middle -> bottleneck", "bias": "-> bottleneck"},
    "prototypes": {"kernel": "bottleneck -> prototypes", "gain": "-> prototypes"}}
  normal = nn.initializers.truncated_normal(0.02)

  def one(key, count):
    keys = iter(jax.random.split(key, 4))
    layers = {name: {"kernel": normal(next(keys), shape), "bias": jnp.zeros(shape[1])}
              for name, shape in shapes.items()}
    return layers | {"prototypes": {"kernel": normal(next(keys), (bottleneck, count)), "gain": jnp.ones(count)}}

  params = {f"head_{i}": one(jax.random.fold_in(rng, i), count) for i, count in enumerate(prototypes)}
  return params, {name: names for name in params}


def scores(head: Any, features: jax.Array, frozen: jax.Array | bool = False) -> jax.Array:
  """Similarities of features with prototypes, in float32: `[..., features]` to `[..., prototypes]`.

  Args:
    head: Parameters of one head, as `init_heads` makes them.
    features: Computed with in their own type.
    frozen: Whether its prototypes do not learn.
  """
  kind = features.dtype
  layer = lambda x, part: project(x, part["kernel"], part["bias"].reshape(1, -1), kind)
  x = nn.gelu(layer(features, head["up"]), approximate=False)
  x = nn.gelu(layer(x, head["middle"]), approximate=False)
  x = _unit(layer(x, head["down"]).astype(jnp.float32), -1)
  last = jax.tree.map(lambda w: jnp.where(frozen, jax.lax.stop_gradient(w), w), head["prototypes"])
  kernel = _unit(last["kernel"].astype(jnp.float32), 0) * last["gain"].astype(jnp.float32)[None]
  return project(x.astype(kind), kernel, None, kind).astype(jnp.float32)


def _unit(x, axis):
  return x * jax.lax.rsqrt(jnp.sum(x ** 2, axis=axis, keepdims=True) + 1e-12)
