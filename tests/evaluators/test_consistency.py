"""Agreement of networks on the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Subnet, extract
from nestnet.evaluators.consistency import consistency
from nestnet.models.decoder import Decoder

MODEL = Decoder(layers=1, embed=16, heads=2, kv_heads=1, mlp=32, vocab=16, context=12)
TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
TEXTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11, 12, 13]]


def randomised(module):
  rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, jax.random.key(0), TOKENS)
  return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), meta.unbox(shapes))


def test_it_is_the_mean_over_every_prefix_by_hand():
  large = MODEL, randomised(MODEL)
  small = extract(*large, Subnet(mlp=8), TOKENS)
  pairs, forward = [], jax.jit(lambda module, v, t: module.apply(v, t)["logits"], static_argnums=0)
  for text in TEXTS:
    # In equal shapes, so that one program serves them.
    tokens = np.array([text + [0] * (MODEL.context - len(text))])
    of = lambda pair: np.asarray(jax.nn.log_softmax(forward(*pair, tokens)), np.float64)
    pairs += [*zip(of(small)[0, :len(text)], of(large)[0, :len(text)])]
  same = [p.argmax() == q.argmax() for p, q in pairs]
  divergence = [(np.exp(p) * (p - q)).sum() for p, q in pairs]
  found = dict(consistency(small, large, TEXTS, batch_size=2))
  assert found["tokens"] == len(pairs) == 13 and 0 < found["agreement"] < 1
  assert found["agreement"] == np.mean(same)
  assert found["kl"] == pytest.approx(np.mean(divergence), rel=1e-4)


@pytest.mark.parametrize("texts, message", [
  ([], "no texts"), ([[1], []], "text 2 has 0 tokens; allowed are 1 to 12"), ([[1] * 13], "13 tokens"),
  ([[16]], "text 1: token 16")])
def test_what_is_wrong_is_said(texts, message):
  with pytest.raises(ValueError, match=message):
    dict(consistency((MODEL, {}), (MODEL, {}), texts))
  with pytest.raises(ValueError, match="16 tokens, the other 8"):
    dict(consistency((MODEL, {}), (MODEL.clone(vocab=8), {}), [[1]]))
