"""Speculative decoding: the target's own text, whoever drafts."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy import stats

from nestnet import Subnet, speculative, timing
from nestnet.drafts import drafted_by, prepared
from nestnet.generate import generate
from nestnet.models.decoder import Decoder
from nestnet.speculative import measure, speculate

MODEL = Decoder(layers=3, embed=16, heads=4, kv_heads=2, mlp=32, vocab=32, context=24)
TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
PROMPTS = [[5], [1, 2, 3], [7, 8, 9, 10, 11, 12, 13]]
NEW = 12


def randomised(module, seed=0, scale=0.4):
  """Variables in which norms are as random as the kernels, and later layers say less than the first."""
  rng, shapes = np.random.default_rng(seed), jax.eval_shape(module.init, jax.random.key(0), TOKENS)
  variables = jax.tree.map(
    lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), meta.unbox(shapes))
  for part, name in (("attention", "out"), ("mlp", "down")):
    kernel = variables["params"]["blocks"][part][name]["kernel"]
    kernel[1:] *= 0.3
  return variables


@pytest.fixture(scope="module")
def variables():
  return randomised(MODEL)


@pytest.fixture(scope="module")
def greedy(variables):
  return generate(MODEL, variables, PROMPTS, max_new_tokens=NEW)


def check(variables, greedy, draft, draft_tokens, **options):
  found = speculate(MODEL, variables, draft, PROMPTS, max_new_tokens=NEW, draft_tokens=draft_tokens,
                    **options)
  assert found.tokens == greedy
  # Each call gives a token of the target's own.
  for row, calls, drafted, accepted in zip(found.tokens, found.calls, found.drafted, found.accepted):
    assert accepted <= drafted <= calls * draft_tokens
    assert len(row) in (accepted + calls, accepted + calls - 1) and calls <= len(row)
  return found


def test_leading_layers_draft_with_the_target_s_cache(variables, greedy):
  found = check(variables, greedy, Subnet(layers=2), 4)
  assert found.shared and 0.2 < found.acceptance < 1
  # Calls are shared: the row that was refused most decides.
  assert max(found.calls) < NEW


def test_no_layer_runs_twice_for_a_token(variables):
  """The target goes on from what its leading layers have said as the draft."""
  drafts = prepared(MODEL, variables, Subnet(layers=2))
  (target, own), (draft, _) = drafts.target, drafts.draft
  assert (target.layers, draft.layers) == (1, 2) and [*own["params"]["blocks"]] == ["layers_0"]
  last = jax.tree.map(lambda leaf: leaf[2], variables["params"]["blocks"])
  jax.tree.map(np.testing.assert_array_equal, own["params"]["blocks"]["layers_0"], last)
  assert prepared(MODEL, variables, Subnet(layers=2), share_cache=False).target[0].layers == 3


def test_another_network_drafts_with_a_cache_of_its_own(variables, greedy):
  rng = np.random.default_rng(1)
  near = jax.tree.map(lambda leaf: leaf + 0.04 * rng.normal(size=leaf.shape).astype(leaf.dtype), variables)
  found = check(variables, greedy, (MODEL, near), 4)
  assert not found.shared and 0.2 < found.acceptance < 1


def test_the_target_accepts_all_that_it_drafts_itself(variables, greedy):
  found = check(variables, greedy, (MODEL, variables), 4)
  assert found.acceptance == 1 and found.calls == (3, 3, 3) and found.tokens_per_call == NEW / 3


@pytest.mark.slow
@pytest.mark.parametrize("text, count, share", [
  ("layers=1", 1, None), ("layers=2", 2, False), ("layers=2,mlp=24", 3, None), ("mlp=16", 2, True),
  ("embed=12", 4, True), ("kv_heads=1,heads=2", 5, None), ("layers=0+2", 3, True), ("mlp=32:16:8", 4, None),
  ("layers=0+2,mlp=16:32,embed=8,heads=2", 5, None)])
def test_every_member_drafts_the_target_s_own_text(variables, greedy, text, count, share):
  found = check(variables, greedy, Subnet.parse(text), count, share_cache=share)
  assert found.shared == (text in ("layers=1", "layers=2", "layers=3") if share is None else share)


@pytest.mark.slow
def test_a_list_of_sizes_may_be_the_target(variables):
  mixed = Subnet.parse("mlp=32:24:16")
  module, own = drafted_by(MODEL, variables, mixed)
  greedy = generate(module, own, PROMPTS, max_new_tokens=NEW)
  for text, shared in (("layers=2,mlp=32:24", True), ("layers=1,mlp=32", True), ("layers=0+2,mlp=16", False)):
    found = speculate(module, own, Subnet.parse(text), PROMPTS, max_new_tokens=NEW)
    assert found.tokens == greedy and found.shared == shared


def test_a_stop_inside_an_accepted_run_ends_the_row(variables, greedy):
  whole = speculate(MODEL, variables, Subnet(layers=2), PROMPTS, max_new_tokens=NEW)
  for stop in {token for row in greedy for token in row}:
    found = speculate(MODEL, variables, Subnet(layers=2), PROMPTS, max_new_tokens=NEW, stop=[stop])
    assert found.tokens == [row[:row.index(stop) + 1] if stop in row else row for row in greedy]
    assert all(a <= b for a, b in zip(found.calls, whole.calls))
    # Nothing counts that was drafted behind it.
    assert all(accepted <= len(row) for row, accepted in zip(found.tokens, found.accepted))
  # Some of these ended where more had been accepted.
  assert whole.acceptance > 0.2


TOY = Decoder(layers=2, embed=8, heads=2, kv_heads=1, mlp=8, vocab=4, context=8)
MANY = 6000


def probabilities(module, variables, temperature, new):
  """Of every text of so many tokens behind token 1."""
  texts = np.array(list(itertools.product(range(4), repeat=new)))
  tokens = np.concatenate([np.ones((len(texts), 1), int), texts], axis=1)
  logits = jax.jit(lambda v, t: module.apply(v, t)["logits"])(variables, tokens)[:, :-1]
  chances = jax.nn.softmax(logits / temperature)
  return np.take_along_axis(np.asarray(chances, np.float64), texts[:, :, None], 2)[:, :, 0].prod(1)


@pytest.mark.slow
@pytest.mark.parametrize("text, count", [
  ("layers=1", 2), ("embed=4", 4)])
def test_what_is_drawn_has_the_target_s_distribution(text, count):
  variables, temperature, new = randomised(TOY, seed=3, scale=0.7), 0.5, 3
  draw = functools.partial(speculate, TOY, variables, Subnet.parse(text), max_new_tokens=new,
                           draft_tokens=count, temperature=temperature)
  found = draw([[1]] * MANY)
  often = np.bincount(np.array(found.tokens) @ (16, 4, 1), minlength=64)
  expected = probabilities(TOY, variables, temperature, new)
  drafted = probabilities(*drafted_by(TOY, variables, Subnet.parse(text)), temperature, new)
  # Rare texts are one class: the statistic is none of chi-square's for them.
  rare = MANY * expected < 5
  merge = lambda counts: np.append(counts[~rare], counts[rare].sum())
  chance = lambda p: stats.chisquare(merge(often), merge(MANY * p / p.sum())).pvalue
  assert chance(expected) > 1e-4
  assert 0.5 * np.abs(drafted - expected).sum() > 0.1 and chance(drafted) < 1e-9
  assert 0.3 < found.acceptance < 0.95
  # A draw depends on seed, row and position alone.
  neighbours = draw([[1], [2]] * (MANY // 2)).tokens
  assert neighbours[::2] == found.tokens[::2] and neighbours[1::2] != found.tokens[1::2]
  assert draw([[1]] * MANY, seed=1).tokens != found.tokens


def test_the_report_counts_and_times(variables, greedy):
  report = measure(MODEL, variables, Subnet(layers=2), PROMPTS, max_new_tokens=NEW, pairs=2)
  assert report.differences.equal == 3 and report.plain_tokens == 3 * NEW
  assert report.speculated.tokens == greedy and report.own_ms > 0
  assert report.tokens_per_second == pytest.approx(3000 * NEW / report.own_ms)
  small = jax.eval_shape(MODEL.clone(layers=2).init, jax.random.key(0), TOKENS)
  assert report.params == sum(leaf.size for leaf in jax.tree.leaves(small))


# As long as the longest above, so that all together they run by the same programs.
SEVENS = [[i, 3, 2 * i, 5, 1, i, 4] for i in range(1, 4)]
# Tokens that their tests ask for: a number of its own, so that no other test has compiled these programs.
FEW = 9


def test_a_report_over_batches_is_the_sum_of_theirs(variables, monkeypatch):
  """Prompts of one length share their programs."""
  whole = speculate(MODEL, variables, Subnet(layers=2), SEVENS, max_new_tokens=FEW)
  clock, calls = itertools.count(), []

  def paired(own, bases, pairs):
    calls.append((own(), *(base() for base in bases)))
    # The third batch is slower, by another factor.
    return np.array([[2.0, 3.0]] * pairs if next(clock) < 2 else [[20.0, 10.0]] * pairs)

  monkeypatch.setattr(speculative, "paired_ms", paired)
  with timing.compilations() as found:
    report = measure(MODEL, variables, Subnet(layers=2), SEVENS, max_new_tokens=FEW, batch_size=1)
  assert found.programs.count("jit(_speculate)") == found.programs.count("jit(_generate)") == 1
  assert report.speculated == whole and report.differences.equal == 3
  assert [[*own.tokens, *plain] for own, plain in calls] == [2 * [row] for row in whole.tokens]
  # Times add up; the speed-up is of pairs, 3 of each batch.
  assert (report.own_ms, report.plain_ms, report.plain_tokens) == (24, 16, 3 * FEW)
  assert report.speed_ups == 6 * (1.5,) + 3 * (0.5,) and report.quartiles == (0.5, 1.5, 1.5)


def test_a_report_counts_rows_that_differ(variables, monkeypatch):
  greedy = generate(MODEL, variables, SEVENS, max_new_tokens=FEW)

  def other(*args, **kwargs):
    (row,) = right(*args, **kwargs)
    return [[*row[:-1], (row[-1] + 1) % 32]] if row == greedy[1] else [row]

  right = speculative.plain.generate
  monkeypatch.setattr(speculative.plain, "generate", other)
  report = measure(MODEL, variables, Subnet(layers=2), SEVENS, max_new_tokens=FEW, batch_size=1, pairs=1)
  assert (report.differences.equal, report.differences.ties, report.differences.other) == (2, 0, (1,))


@pytest.mark.parametrize("draft, options, message", [
  (Subnet(mlp=64), {}, "draft mlp=64 is larger than the target: .* mlp"),
  (Subnet(layers=4), {}, "draft layers=4 is larger"),
  (Subnet(kv_heads=1), {}, "draft kv_heads=1 is larger than the target: .*: heads=4 in kv_heads=1 groups are 4 "
   "in each, where the largest has 2; allowed beside kv_heads=1 are at most heads=2"),
  (Subnet(width=4), {}, "'width'"),
  ((MODEL, {}), {"draft_tokens": 0}, "draft_tokens: got 0"),
  ((MODEL, {}), {"draft_tokens": 2.5}, "draft_tokens: got 2.5, allowed is a whole number"),
  (Subnet(heads=3), {}, "heads=3"),
  ((MODEL.clone(vocab=16), {}), {}, "draft has 16 tokens, the target 32"),
  ((MODEL, {"params": {"kernel": np.zeros(10 ** 6)}}), {}, "draft has 1000000 parameters, the target"),
  ((MODEL, {}), {"share_cache": True}, "share_cache=True with a draft that has weights of its own")])
def test_what_is_wrong_is_said(variables, draft, options, message):
  with pytest.raises(ValueError, match=message):
    speculate(MODEL, variables, draft, PROMPTS, max_new_tokens=NEW, **options)
