"""The next token and distillation: losses and gradients equal their formulas in numpy."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import build, recipes
from nestnet.errors import UserError
from nestnet.models.layers import Linear
from nestnet.objectives import Targets, objective
from nestnet.sharding import put_batch

RNG = np.random.default_rng(0)
VOCAB, LENGTH = 7, 5
LOGITS, TEACHER = (RNG.normal(0, 2, (3, LENGTH, VOCAB)).astype(np.float32) for _ in range(2))
TOKENS = RNG.integers(0, VOCAB, (3, LENGTH + 1)).astype(np.int32)
# The end of a text: four of fifteen targets do not count.
TOKENS[2, 2:] = -1
COUNTED = [(i, j) for i in range(3) for j in range(LENGTH) if TOKENS[i, j + 1] >= 0]
TAUGHT = Targets({"tokens": TOKENS}, {"logits": TEACHER})


def softmax(x):
  e = np.exp(x.astype(np.float64))
  return e / e.sum(axis=-1, keepdims=True)


def by_hand(t=1.0, direction="forward"):
  """`((CE, its gradient), (KL * T^2, its gradient))`, with respect to the logits, target by target."""
  ce, kl, of_ce, of_kl = 0.0, 0.0, np.zeros(LOGITS.shape), np.zeros(LOGITS.shape)
  for i, j in COUNTED:
    q, known = softmax(LOGITS[i, j]), TOKENS[i, j + 1]
    ce -= np.log(q[known])
    of_ce[i, j] = q - np.eye(VOCAB)[known]
    q, p = softmax(LOGITS[i, j] / t), softmax(TEACHER[i, j] / t)
    ratio = np.log(q) - np.log(p)
    if direction == "forward":
      kl -= t ** 2 * np.sum(p * ratio)
      of_kl[i, j] = t * (q - p)
    else:
      own = np.sum(q * ratio)
      kl += t ** 2 * own
      of_kl[i, j] = t * q * (ratio - own)
  n = len(COUNTED)
  return (ce / n, of_ce / n), (kl / n, of_kl / n)


def minimised(targets=TAUGHT, step=0, **options):
  made = objective("language_modelling", **options)
  return jax.value_and_grad(
    lambda logits: made.loss({}, {}, {"logits": logits}, targets, step, None), has_aux=True)(LOGITS)


def test_without_a_teacher_it_is_the_mean_over_what_counts():
  (value, metrics), gradient = minimised(Targets({"tokens": TOKENS}), temperature=3.0)
  (ce, of_ce), _ = by_hand()
  assert len(COUNTED) == 11
  np.testing.assert_allclose(value, ce, rtol=1e-6)
  np.testing.assert_allclose(gradient, of_ce, atol=1e-6)
  right = [LOGITS[i, j].argmax() == TOKENS[i, j + 1] for i, j in COUNTED]
  assert set(metrics) == {"bits_per_token", "accuracy"}
  np.testing.assert_allclose(metrics["bits_per_token"], ce / math.log(2), rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_distillation_in_both_directions(direction, t):
  (value, metrics), gradient = minimised(
    divergence=direction, temperature=t, student_labels=0.5, distillation=0.7)
  (ce, of_ce), (kl, of_kl) = by_hand(t, direction)
  np.testing.assert_allclose(value, 0.5 * ce + 0.7 * kl, rtol=1e-6)
  np.testing.assert_allclose(gradient, 0.5 * of_ce + 0.7 * of_kl, atol=1e-6)
  np.testing.assert_allclose(metrics["distillation"], kl, rtol=1e-6)


@pytest.mark.parametrize("step, share", [(0, 0), (2, 0), (3, 0.5), (4, 1), (9, 1)])
def test_delay_and_ramp(step, share):
  (ce, _), (kl, _) = by_hand()
  (value, _), _ = minimised(step=step, delay=3, ramp=1, student_labels=0.25)
  np.testing.assert_allclose(value, (1 - share) * ce + share * (0.25 * ce + kl), rtol=1e-6)


def test_a_student_that_agrees_has_nothing_to_learn():
  for direction in ("forward", "reverse"):
    made = objective("language_modelling", divergence=direction)
    targets = Targets({"tokens": TOKENS}, {"logits": LOGITS + 3})
    value, gradient = jax.value_and_grad(
      lambda logits: made.loss({}, {}, {"logits": logits}, targets, 0, None)[0])(LOGITS)
    assert abs(value) < 1e-6 and np.abs(gradient).max() < 1e-6


def test_a_batch_without_a_target_costs_nothing():
  (value, _), gradient = minimised(Targets({"tokens": np.full_like(TOKENS, -1)}))
  assert value == 0 and not gradient.any()


def test_half_precision_logits_are_read_in_float32_and_the_last_token_is_no_input():
  made, seen = objective("language_modelling"), []
  value, _ = made.loss({}, {}, {"logits": LOGITS.astype(jnp.bfloat16)}, TAUGHT, 0, None)
  assert value.dtype == np.float32
  made.forward(seen.append, {"tokens": TOKENS})
  np.testing.assert_array_equal(seen[0], np.maximum(TOKENS[:, :-1], 0))
  assert made.teach({}, {}, {"logits": 1, "features": 2}, {}, 0) == {"logits": 1}


class Pairs(nn.Module):
  """The next token from the last alone, through `embed` numbers."""

  embed: int
  vocab: int

  @nn.compact
  def __call__(self, tokens, *, train=False):
    table = Linear("tokens -> embed", (self.embed,), use_bias=False, name="first")
    head = Linear("embed -> vocab", (self.vocab,), use_bias=False, name="second")
    return {"logits": head(table(jax.nn.one_hot(tokens, self.vocab)))}


class Rhyme:
  train = test = [{"text": f"{i} potato"} for i in range(20)]


def test_one_step_of_two_members_is_the_formula():
  """Plain gradient descent of rate 1 moves the weights by the sum of the members' gradients."""
  run = build.build({
    "model": {"name": f"{__name__}:Pairs", "embed": 3}, "space": {"embed": (1, 3)},
    "recipe": recipes.recipe("matformer_joint") | {"objective": {"name": "language_modelling"}},
    "data": {"name": f"{__name__}:Rhyme", "length": 6},
    "optim": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0},
    "train": {"steps": 1, "batch_size": 4, "checkpoint_every": 1, "log_every": 1, "eval_every": 0},
    "mesh": {"data": 1}})
  assert run.supernet.model.vocab == 256
  state = run.step.init()
  kernel = lambda state, name: np.array(state.trained["model"][name]["kernel"], np.float64)
  first, second = kernel(state, "first"), kernel(state, "second")
  tokens = run.batches[0]["tokens"]
  state, metrics = run.step(state, put_batch(run.batches[0], run.step.mesh), 0)
  inputs, targets = tokens[:, :-1].ravel(), tokens[:, 1:].ravel()
  inputs, targets = inputs[targets >= 0], targets[targets >= 0]
  total, moved = 0.0, [np.zeros_like(first), np.zeros_like(second)]
  for k in (1, 3):
    x = first[inputs, :k]
    q = softmax(x @ second[:k])
    total -= np.mean(np.log(q[np.arange(len(targets)), targets]))
    error = (q - np.eye(256)[targets]) / len(targets)
    moved[1][:k] += x.T @ error
    np.add.at(moved[0][:, :k], inputs, error @ second[:k].T)
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
  for name, before, by in (("first", first, moved[0]), ("second", second, moved[1])):
    np.testing.assert_allclose(before - kernel(state, name), by, atol=1e-6)


@pytest.mark.parametrize("options, message", [
  ({"divergence": "forwards"}, "unknown divergence of distillation 'forwards'; did you mean 'forward'"),
  ({"temperature": 0.0}, "temperature=0.0; allowed is a temperature above 0"),
  ({"ramp": -1}, "language_modelling: delay=0, ramp=-1"),
  ({"label_smoothing": 0.1}, "unknown option of the objective language_modelling 'label_smoothing'"),
])
def test_wrong_options(options, message):
  with pytest.raises(UserError, match=message):
    objective("language_modelling", **options)
