"""One step of decoding: layers one by one, and rows that are what they would be alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Subnet, generate
from nestnet.decoder_steps import feed, unrolled
from nestnet.drafts import drafted_by
from nestnet.models.cache import init_cache
from tests.test_generate import MODEL, NEW, PROMPTS, randomised

TEXT = np.array([[3, 1, 4, 1, 5]], np.int32)
PLACES = np.arange(5, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def variables():
  return randomised(MODEL)


def test_layers_one_by_one_are_the_same_network(variables):
  module, own = unrolled(MODEL, variables)
  assert set(own["params"]["blocks"]) == {"layers_0", "layers_1"}
  logits = lambda net, v: jax.jit(net.apply)(v, TEXT)["logits"]
  np.testing.assert_allclose(logits(module, own), logits(MODEL, variables), rtol=1e-5, atol=1e-5)
  # Once apart they stay, nothing is copied again; and lists of sizes are apart already.
  again, same = unrolled(module, own)
  assert again is module and same is own
  mixed = drafted_by(MODEL, variables, Subnet(mlp=(32, 16)))
  assert unrolled(*mixed)[0] is mixed[0]
  assert generate.generate(module, own, PROMPTS, max_new_tokens=NEW) == generate.generate(
    MODEL, variables, PROMPTS, max_new_tokens=NEW)


def test_constants_of_layers_go_with_them():
  model = MODEL.clone(layer_dropout=0.5)
  variables = jax.jit(model.init)(jax.random.key(0), TEXT)
  _, own = unrolled(model, variables)
  assert [float(own["constants"]["blocks"][f"layers_{i}"]["mlp"]["layer"]) for i in range(2)] == [0, 1]


def test_no_step_of_the_loop_scans_over_layers(variables, monkeypatch):
  """A scan would copy every layer's weights in every step."""
  right, seen = generate._generate, []
  monkeypatch.setattr(generate, "_generate", lambda *args: seen.append(args) or right(*args))
  generate.generate(MODEL, variables, PROMPTS, max_new_tokens=NEW)
  ((module, prefilled, *args),) = seen
  program = str(jax.make_jaxpr(lambda *args: right(module, prefilled, *args))(*args))
  assert "while[" in program and "scan[" not in program


def test_tokens_that_are_checked_together_are_what_single_steps_say(variables):
  module, own = unrolled(MODEL, variables)

  @jax.jit
  def run(v):
    cache, found = init_cache(module, 1, 8), []
    for i in range(5):
      outputs, cache = feed(module, v, cache, TEXT[:, i:i + 1], PLACES[:, i:i + 1])
      found.append(outputs["logits"])
    return jnp.concatenate(found, 1), feed(module, v, init_cache(module, 1, 8), TEXT, PLACES)[0]["logits"]

  single, together = run(own)
  np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-5)


def test_a_network_goes_on_from_the_outputs_of_its_first_layers(variables):
  first, rest = (drafted_by(MODEL, variables, Subnet.parse(text)) for text in ("layers=1", "layers=+1"))

  @jax.jit
  def run(v, first_v, rest_v):
    taps = first[0].apply(first_v, TEXT, taps=True)["taps"]
    return MODEL.apply(v, TEXT)["logits"], rest[0].apply(rest_v, TEXT, inner=taps[-1])["logits"]

  whole, own = run(variables, first[1], rest[1])
  np.testing.assert_allclose(own, whole, rtol=1e-5, atol=1e-5)
