"""Decoding: the cache, rows of unequal lengths, stops, draws."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Subnet, extract
from nestnet.errors import UserError
from nestnet.generate import DRAFT, DRAW, Differences, differences, filtered, generate, sampling
from nestnet.models.decoder import Decoder
from nestnet.timing import compilations

MODEL = Decoder(layers=2, embed=16, heads=4, kv_heads=2, mlp=32, vocab=32, context=16)
TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
PROMPTS = [[5], [1, 2, 3], [7, 8, 9, 10, 11, 12, 13]]
# With the longest prompt they fill the context.
NEW = 9


def randomised(module, seed=0):
  """Variables in which norms are as random as the kernels."""
  rng, shapes = np.random.default_rng(seed), jax.eval_shape(module.init, jax.random.key(0), TOKENS)
  return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), meta.unbox(shapes))


@functools.cache
def uncached(module):
  return jax.jit(lambda variables, tokens: module.apply(variables, tokens)["logits"])


def logits_after(module, variables, text):
  """After a text, without a cache; what is behind it is not seen."""
  tokens = np.zeros((1, module.context), np.int32)
  tokens[0, :len(text)] = text
  return np.asarray(uncached(module)(variables, tokens)[0, len(text) - 1])


def by_hand(module, variables, prompt, new=NEW):
  text = list(prompt)
  for _ in range(new):
    text.append(int(logits_after(module, variables, text).argmax()))
  return text[len(prompt):]


@pytest.fixture(scope="module")
def variables():
  return randomised(MODEL)


@pytest.fixture(scope="module")
def alone(variables):
  """Greedy continuations of the prompts, each by itself."""
  return [by_hand(MODEL, variables, prompt) for prompt in PROMPTS]


def test_a_batch_of_unequal_prompts_is_each_alone(variables, alone):
  assert generate(MODEL, variables, PROMPTS, max_new_tokens=NEW) == alone
  assert len({tuple(row) for row in alone}) == 3 and len(set(sum(alone, []))) > 4
  # Padding is skipped wherever it stands.
  left = [[-1] * (7 - len(prompt)) + prompt for prompt in PROMPTS]
  assert generate(MODEL, variables, np.array(left), max_new_tokens=NEW) == alone


@pytest.mark.parametrize("text", [
  "layers=+1,embed=8,heads=2,mlp=16",
  pytest.param("mlp=32:16,heads=2:4", marks=pytest.mark.slow),
  pytest.param("kv_heads=1,heads=2", marks=pytest.mark.slow),
  pytest.param("layers=1,kv_heads=1,heads=1,embed=8", marks=pytest.mark.slow)])
def test_members_write_what_they_would_without_a_cache(variables, text):
  module, small = extract(MODEL, variables, Subnet.parse(text), TOKENS)
  assert generate(module, small, PROMPTS[1:], max_new_tokens=NEW) == [
    by_hand(module, small, prompt) for prompt in PROMPTS[1:]]


def test_a_row_ends_with_its_stop_token(variables, alone):
  stop = alone[1][3], alone[2][5]
  found = generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, stop=stop)
  ends = [next((i + 1 for i, token in enumerate(row) if token in stop), NEW) for row in alone]
  assert found == [row[:end] for row, end in zip(alone, ends)] and min(ends) < NEW
  assert generate(MODEL, variables, PROMPTS, max_new_tokens=8) == [row[:8] for row in alone]


@pytest.mark.parametrize("top_k, top_p", [(1, 1), (3, 1), (99, 1), (99, 0.4), (99, 0.8), (4, 0.6), (2, 1e-9)])
def test_filters_are_those_by_hand(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
  expected = np.full_like(logits, -np.inf)
  for row, kept in zip(logits, expected):
    order = sorted(range(9), key=lambda i: -row[i])[:top_k]
    shares = np.exp(row[order]) / np.exp(row[order]).sum()
    for i, token in enumerate(order):
      if i == 0 or shares[:i].sum() < top_p:
        kept[token] = row[token]
  np.testing.assert_array_equal(jax.jit(filtered)(logits, top_k, top_p), expected)


MANY = 3000
TOY = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=8, context=8)


@pytest.mark.parametrize("options", [{}, pytest.param({"top_k": 4, "top_p": 0.7}, marks=pytest.mark.slow)])
def test_tokens_are_drawn_as_often_as_they_are_probable(options):
  variables, temperature = randomised(TOY), 0.3
  found = generate(TOY, variables, [[3]] * MANY, max_new_tokens=1, temperature=temperature, **options)
  logits = jnp.asarray(logits_after(TOY, variables, [3]) / temperature)
  expected = jax.nn.softmax(filtered(logits, 4, 0.7) if options else logits)
  often = np.bincount(np.ravel(found), minlength=8) / MANY
  # Twice what 3,000 draws from 8 tokens are off at the most, on average.
  assert 0.5 * np.abs(often - expected).sum() < 0.04
  assert (np.asarray(expected) > 0.02).sum() >= 2 and not often[np.asarray(expected) == 0].any()


def test_a_draw_depends_on_seed_row_and_position_alone(variables):
  draw = functools.partial(generate, MODEL, variables, max_new_tokens=NEW, temperature=1.0)
  found = draw(PROMPTS)
  assert draw([[9, 9], PROMPTS[1], [4] * 7])[1] == found[1] and draw(PROMPTS) == found
  # Rows of one text are other draws, and so are positions and seeds.
  assert len({tuple(row) for row in draw([PROMPTS[2]] * 3)}) == 3
  assert draw(PROMPTS, seed=1) != found
  assert any(len(set(row)) > 3 for row in found)


def test_no_two_draws_are_one():
  how, places = sampling(1.0, None, None, seed=0), jnp.tile(jnp.arange(6)[None], (2, 1))
  drawn = [jax.jit(functools.partial(how.draw, purpose=purpose))(jnp.zeros((2, 6, 10_000)), places)
           for purpose in (DRAW, DRAFT)]
  assert len(set(np.ravel(drawn).tolist())) == 24


def test_few_programs_are_compiled(variables):
  generate(MODEL, variables, PROMPTS, max_new_tokens=NEW, temperature=1.0)
  with compilations() as found:
    for length, new, options in ((6, 7, {}), (7, 9, {"stop": [1], "temperature": 0.5}), (7, 8, {"seed": 3})):
      prompts = [list(range(1, length + 1)), [2], [3, 4]]
      generate(MODEL, variables, prompts, max_new_tokens=new, **{"temperature": 0.7, **options})
  assert "jit(_generate)" not in found.programs


def test_first_differences_are_ties_or_not(variables, alone):
  changed = [list(row) for row in alone]
  best = np.argsort(logits_after(MODEL, variables, [*PROMPTS[1], *alone[1][:4]]))
  gap = np.diff(logits_after(MODEL, variables, [*PROMPTS[1], *alone[1][:4]])[best[-2:]])[0]
  changed[1][4] = int(best[-2])
  changed[2] = changed[2][:3]
  compare = functools.partial(differences, MODEL, variables, PROMPTS, changed, alone)
  assert compare() == Differences(1, 0, (1, 2))
  # An end is no tie.
  assert compare(tie=1.01 * float(gap)) == Differences(1, 1, (2,))


@pytest.mark.parametrize("prompts, options, message", [
  ([[1], []], {}, "prompt 2 is empty"),
  ([], {}, "no prompts"),
  ([[1] * 8], {}, "prompt 1 has 8 tokens, and 9 new ones may follow; together they may be 16"),
  ([[1, 32]], {}, "prompt 1: token 32 .* 0 to 31"),
  ([[1]], {"stop": [40]}, "stop: token 40"),
  ([[1]], {"temperature": -1.0}, "temperature: got -1"),
  ([[1]], {"temperature": float("nan")}, "temperature: got nan"),
  ([[1]], {"top_k": 0}, "top_k: got 0"),
  ([[1]], {"top_p": 1.5}, "top_p: got 1.5"),
  ([[1]], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
  ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, allowed is a whole number"),
  ([[1], [2, 1.5]], {}, "prompt 2: got 1.5, allowed is a whole number"),
  ([1, 2], {}, "prompt 1: got 1, allowed is a list of tokens"),
  ([[1]], {"stop": 3}, "stop: got 3, allowed is a list of tokens"),
  ([[1]], {"top_k": 2.5, "temperature": 1.0}, "top_k: got 2.5, allowed is a whole number"),
  ([[1]], {"seed": 0.5}, "seed: got 0.5, allowed is a whole number")])
def test_what_is_wrong_is_said(variables, prompts, options, message):
  with pytest.raises(UserError, match=message):
    generate(MODEL, variables, prompts, **{"max_new_tokens": NEW, **options})


@pytest.mark.parametrize("module, change, message", [
  (nn.Dense(3), dict, "module: got Dense, without vocab, context, .*; allowed is a decoder"),
  (Decoder, dict, "module: got the class Decoder.*; allowed is a decoder"),
  (MODEL, lambda variables: variables["params"], "variables: got .*embedding.*; allowed is a mapping"),
  (MODEL, lambda variables: {"params": {}}, "variables: not those of this Decoder: .* missing"),
  (MODEL.clone(mlp=16), dict,
   r"3 of another shape\n.*blocks/mlp/down/kernel: got \[2, 32, 16\], allowed is \[2, 16, 16\]")])
def test_networks_and_variables_that_do_not_fit_are_said(variables, module, change, message):
  with pytest.raises(UserError, match=message):
    generate(module, change(variables), [[1]], max_new_tokens=1)
