"""How alike two networks continue the same texts (MatFormer, 2310.07707, section 3.4)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestnet.decoder_checks import Tokens, check_tokens, unpadded
from nestnet.errors import UserError
from nestnet.generate import padded

Pair = tuple[nn.Module, Mapping[str, Any]]


def consistency(small: Pair, large: Pair, texts: Sequence[Tokens], batch_size: int = 8
                ) -> Iterator[tuple[str, float]]:
  """Agreement of two networks on the next token, over every prefix of texts.

  They may be members of one family or trained apart. Texts that the large network wrote show what a draft
  of speculative decoding meets.

  Args:
    small: A module and its variables.
    large: The same; both have one vocabulary.
    texts: Tokens of each, of any lengths; every one of them ends a prefix.
    batch_size: Texts in a call.

  Yields:
    `agreement`, the share of prefixes after which both find the same token most probable; `kl`, the mean
    of KL(small || large), in nats; `tokens`, the number of prefixes.

  Raises:
    ValueError: Vocabularies that differ, no texts, an empty one, or one longer than a context.

  Example:
    >>> from nestnet.models.decoder import Decoder
    >>> model = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=16)
    >>> same = model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> dict(consistency(same, same, [[1, 2, 3], [4, 5]]))
    {'agreement': 1.0, 'kl': 0.0, 'tokens': 5.0}
  """
  (module, variables), (other, others) = small, large
  if module.vocab != other.vocab:
    raise UserError(f"one network has {module.vocab} tokens, the other {other.vocab}; allowed is one "
                    "vocabulary")
  texts, context = unpadded(texts), min(module.context, other.context)
  if not texts:
    raise UserError("no texts; at least one is needed")
  for number, text in enumerate(texts, 1):
    check_tokens(module, text, f"text {number}")
    if not 0 < len(text) <= context:
      raise UserError(f"text {number} has {len(text)} tokens; allowed are 1 to {context}, the context")
  # Those of like length together, so that little is filled up.
  texts = sorted(texts, key=len)
  sums = np.zeros(3)
  for start in range(0, len(texts), batch_size):
    batch = padded(texts[start:start + batch_size], context)
    sums += np.asarray(_compared(module, other, variables, others, *batch), np.float64)
  same, divergence, count = sums.tolist()
  yield "agreement", same / count
  yield "kl", divergence / count
  yield "tokens", count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compared(module, other, variables, others, tokens, places):
  own, reference = (
    jax.nn.log_softmax(m.apply(v, tokens, positions=places)["logits"].astype(jnp.float32))
    for m, v in ((module, variables), (other, others)))
  there = places >= 0
  same = (own.argmax(-1) == reference.argmax(-1)) & there
  divergence = jnp.where(there, (jnp.exp(own) * (own - reference)).sum(-1), 0)
  return same.sum(), divergence.sum(), there.sum()
