"""Schedules at named steps, and optimizers against their formulas in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import optim, recipes
from nestnet.errors import UserError


@pytest.mark.parametrize("name, options, wanted", [
  ("constant", {}, {0: 0, 5: 0.5, 10: 1, 60: 1, 110: 1}),
  ("cosine", {}, {5: 0.5, 10: 1, 60: 0.5, 110: 0}),
  ("cosine", {"floor": 0.2}, {10: 1, 60: 0.6, 110: 0.2}),
  ("linear", {}, {10: 1, 35: 0.75, 110: 0}),
  ("linear", {"floor": 0.1}, {60: 0.55, 110: 0.1}),
  # Ten steps from fall to fall, then the constant ending.
  ("exponential", {"decay_rate": 0.5, "decay_share": 0.1, "floor": 0.05},
   {5: 0.5, 10: 1, 19: 1, 20: 0.5, 29: 0.5, 30: 0.25, 50: 0.0625, 60: 0.05, 109: 0.05}),
  ("step", {"decay_rate": 0.1, "milestones": (0.5, 0.75)}, {10: 1, 54: 1, 56: 0.1, 81: 0.1, 84: 0.01}),
])
def test_rates_at_named_steps(name, options, wanted):
  rate = optim.schedule(name, 2.0, 10, 110, **options)
  for step, share in wanted.items():
    np.testing.assert_allclose(rate(step), 2 * share, atol=1e-6)


def test_bignas_ends_at_a_twentieth():
  """0.97 every 2.4 epochs of 360: it is there after 99 falls, 237.6 epochs."""
  options = recipes.optim("bignas")
  epoch = 100
  steps = 360 * epoch
  warmup = round(options["warmup_share"] * steps)
  assert warmup == 5 * epoch
  rate = optim.schedule(options["schedule"], 0.256, warmup, steps, **{
    k: options[k] for k in ("decay_rate", "decay_share", "floor")})
  fall = 2.4 * epoch
  for falls in (1, 10, 98):
    np.testing.assert_allclose(rate(warmup + int(np.ceil(falls * fall))), 0.256 * 0.97 ** falls, rtol=1e-5)
  for falls in (99, 149):
    np.testing.assert_allclose(rate(warmup + int(np.ceil(falls * fall))), 0.05 * 0.256, rtol=1e-5)


W = np.array([0.5, -2.0, 1.0])
GRADS = np.array([[1.0, -3.0, 0.2], [0.5, 1.0, -0.4], [-0.2, 0.1, 0.3]])
RATE, DECAY, MOMENTUM = 0.1, 0.01, 0.9


def run(**options):
  """Three steps on a weight that decays and its copy that does not."""
  tx = optim.optimizer(rate=optax.constant_schedule(RATE), weight_decay=DECAY, **options)(
    {"kernel": "in -> out", "bias": "-> out"})
  params = {"kernel": jnp.float32(W), "bias": jnp.float32(W)}
  state = tx.init(params)
  for grads in GRADS:
    updates, state = tx.update({key: jnp.float32(grads) for key in params}, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize("coupled", [True, False])
def test_sgd_is_pytorchs_with_nesterov_momentum(coupled):
  for key, decay in (("kernel", DECAY), ("bias", 0.0)):
    w, buffer = W.copy(), np.zeros(3)
    for grads in GRADS:
      own = grads + decay * w * coupled
      buffer = MOMENTUM * buffer + own
      w = w - RATE * (own + MOMENTUM * buffer + decay * w * (not coupled))
    np.testing.assert_allclose(run(name="sgd", momentum=MOMENTUM, coupled=coupled)[key], w, rtol=1e-5)


@pytest.mark.parametrize("coupled", [True, False])
def test_rmsprop_divides_by_the_root_then_gathers_momentum(coupled):
  for key, decay in (("kernel", DECAY), ("bias", 0.0)):
    w, buffer, square = W.copy(), np.zeros(3), np.zeros(3)
    for grads in GRADS:
      own = grads + decay * w * coupled
      square = 0.9 * square + 0.1 * own ** 2
      buffer = MOMENTUM * buffer + own / np.sqrt(square + 1e-3)
      w = w - RATE * (buffer + decay * w * (not coupled))
    found = run(name="rmsprop", momentum=MOMENTUM, b2=0.9, epsilon=1e-3, coupled=coupled)[key]
    np.testing.assert_allclose(found, w, rtol=1e-5)


def test_clipping_by_value_is_element_by_element():
  found = run(name="sgd", momentum=0.0, clip_value=0.5)["bias"]
  np.testing.assert_allclose(found, W - RATE * np.clip(GRADS, -0.5, 0.5).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("call, message", [
  (lambda: optim.schedule("cosin", 1.0, 0, 10), "'cosin'; did you mean 'cosine'.*exponential, step"),
  (lambda: optim.schedule("cosine", 1.0, 10, 10), "warmup_steps=10"),
  (lambda: optim.schedule("cosine", 1.0, 0, 10, floor=2.0), "floor=2.0"),
  (lambda: optim.schedule("step", 1.0, 0, 10, milestones=(0.5, 1.5)), "milestones"),
  (lambda: optim.optimizer("sgd", lambda step: 1.0, clip_value=-1.0), "clip_value=-1.0"),
  (lambda: optim.optimizer("adamw", lambda step: 1.0, coupled=True), "coupled.*sgd, rmsprop"),
  (lambda: optim.optimizer("rmspop", lambda step: 1.0)({}), "'rmspop'; did you mean 'rmsprop'"),
  (lambda: recipes.optim("rss"), "'rss'.*ofa"),
])
def test_mistakes_are_named(call, message):
  with pytest.raises(UserError, match=message):
    call()
