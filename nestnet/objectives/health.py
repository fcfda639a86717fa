"""Whether representations are alive: what a collapse shows in, of a batch.

All are measurements: no gradient flows through them, so a loss may report them among its metrics.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

_TINY = 1e-12


def feature_std(features: jax.Array) -> jax.Array:
  """The standard deviation over the batch of each dimension of unit-length features, mean over dimensions.

  It is about `dim ** -0.5` where features point in all directions alike, and 0 where all of them are
  the same (SimSiam, 2011.10566, section 4.1).

  Args:
    features: `[batch, dim]`.

  Returns:
    A scalar, float32.

  Example:
    >>> float(feature_std(jnp.ones((4, 2)))), float(feature_std(jnp.array([[2.0, 0.0], [-1.0, 0.0]])))
    (0.0, 0.5)
  """
  return jnp.mean(jnp.std(unit(_measured(features)), axis=0))


def effective_rank(features: jax.Array) -> jax.Array:
  """The exponential of the entropy of the singular values, which are made to sum to 1 (RankMe, 2210.02885).

  From 1, where all features are multiples of one, to `min(batch, dim)`; features are not centred.

  Args:
    features: `[batch, dim]`.

  Returns:
    A scalar, float32.

  Example:
    >>> round(float(effective_rank(jnp.eye(3))), 4), round(float(effective_rank(jnp.ones((3, 3)))), 4)
    (3.0, 1.0)
  """
  values = jnp.linalg.svd(_measured(features), compute_uv=False)
  return jnp.exp(entr(values / jnp.maximum(values.sum(), _TINY)).sum())


def entropies(probabilities: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two entropies of a teacher's assignments to K prototypes, in nats.

  Where the first is near ln K every sample is assigned to all prototypes alike; where the second is near 0
  all samples are assigned to the same one. Both are collapses.

  Args:
    probabilities: `[batch, prototypes]`, each row sums to 1.

  Returns:
    The mean of the entropies of the samples, and the entropy of the mean of the samples.

  Example:
    >>> [round(float(x), 4) for x in entropies(jnp.eye(2))]
    [0.0, 0.6931]
  """
  probabilities = _measured(probabilities)
  return entr(probabilities).sum(-1).mean(), entr(probabilities.mean(0)).sum()


def unit(features: jax.Array) -> jax.Array:
  """Features `[..., dim]` at length 1; those that are 0 stay so."""
  return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), _TINY)


def _measured(values: jax.Array) -> jax.Array:
  return jax.lax.stop_gradient(values).astype(jnp.float32)
