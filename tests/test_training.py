"""The loop: phases, non-finite stops, logs, SIGTERM, and one device against eight."""

from __future__ import annotations

import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import training
from nestnet.checkpoint import Checkpoints
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.importance import Sort
from nestnet.models.layers import Linear
from nestnet.objectives import Objective, objective
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.space import Space
from nestnet.steps import Recipe, Step
from nestnet.training import NonFinite, Phase


class Net(nn.Module):
  embed: int
  mlp: int
  classes: int = 3

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images)
    h = jnp.tanh(Linear("embed -> mlp", (self.mlp,), name="up")(x))
    return {"logits": Linear("mlp -> classes", (self.classes,), name="head")(h)}


SPACE = Space(embed=(4, 8), mlp=(4, 8))


class Data:
  """Batches as a function of the step; `at` names calls for a step."""

  def __init__(self, at=None):
    self.at = at or {}

  def __getitem__(self, step):
    if step in self.at:
      self.at[step]()
    rng = np.random.default_rng(step)
    label = rng.integers(0, 3, 16).astype(np.int32)
    image = rng.normal(size=(16, 6)).astype(np.float32) + label[:, None]
    return {"image": image, "label": label}


def momentum(mask):
  del mask
  return optax.sgd(0.1, momentum=0.9)


def make(name="sandwich", devices=1, tx=momentum, loss=None, **fields):
  supernet = Supernet(Net(8, 8), SPACE, (jax.ShapeDtypeStruct((1, 6), jnp.float32),))
  recipe = Recipe(sampler(name, SPACE), loss or objective("classification"), **fields)
  return Step(supernet, recipe, tx, make_mesh({"data": devices}))


def train(phases, workdir, data=None, every=5, **options):
  return training.train(phases, data or Data(), workdir, checkpoint_every=every, log_every=1,
                        show_progress=False, **options)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir):
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.steps


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Phases.


@pytest.mark.slow
def test_transition_runs_once_at_the_boundary_and_a_teacher_appears(tmp_path):
  seen = []

  def enter(state, border):
    seen.append(jax.device_get(state))
    assert (border.before, border.after) == (first, second) and border.batches[4]["label"].shape == (16,)
    return state.replace(trained=jax.tree.map(lambda x: 2 * x, state.trained))

  first, second = make(), make(teacher="frozen")
  out = train([Phase(4, first), Phase(3, second, enter, fresh_optimizer=True)], tmp_path)
  assert out.finished and int(out.state.step) == 7 and [int(s.step) for s in seen] == [4]
  # The teacher is a copy of what the phase began with, and stays.
  same(out.state.teacher, jax.tree.map(lambda x: 2 * x, seen[0].trained))
  # The same by hand: four steps, the transition, three steps with fresh moments.
  state, data = first.init(), Data()
  for step in range(4):
    state, _ = first(state, put_batch(data[step], first.mesh), step)
  doubled = jax.tree.map(lambda x: 2 * x, state.trained)
  state = state.replace(trained=doubled, teacher=jax.tree.map(jnp.copy, doubled),
                        opt_state=second.tx.init(doubled))
  for step in range(4, 7):
    state, _ = second(state, put_batch(data[step], second.mesh), step)
  same(out.state, state)


@pytest.mark.parametrize("fresh", [True, False])
def test_moments_begin_anew_only_where_asked(tmp_path, fresh):
  """With no learning rate, momentum alone tells."""
  still = lambda mask: optax.chain(optax.trace(0.9), optax.scale(0.0))
  seen = []

  def enter(state, border):
    seen.append(jax.device_get(state.opt_state))
    return state

  one, two = make("largest", tx=still), make("largest", tx=still)
  out = train([Phase(1, one), Phase(1, two, enter, fresh_optimizer=fresh)], tmp_path)
  grads = jax.tree.map(lambda now, old: now - (0 if fresh else 0.9 * old),
                       jax.device_get(out.state.opt_state), seen[0])
  alone = two.init()
  alone, _ = two(alone, put_batch(Data()[1], two.mesh), 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads,
               jax.device_get(alone.opt_state))


@pytest.mark.parametrize("stop", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_resume_around_a_phase_change_is_exact(tmp_path, stop):
  """Killed exactly at the end of the first phase, and in the second; units are sorted by what data say."""
  def double(state, border):
    state = Sort("activation", ("mlp",), "nothing")(state, border)
    return state.replace(trained=jax.tree.map(lambda x: 2 * x, state.trained))

  phases = lambda: [Phase(4, make()), Phase(4, make(teacher="ema"), double, fresh_optimizer=True)]
  whole = train(phases(), tmp_path / "whole", every=1)

  def die():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train(phases(), tmp_path / "killed", Data({stop: die}), every=1)
  assert max(saved(tmp_path / "killed")) == stop
  same(train(phases(), tmp_path / "killed", every=1).state, whole.state)
  assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


# Failures.


def poisoned(at, part):
  """The classification loss; from step `at` on its value, or only its gradient, is no number."""
  plain = objective("classification")

  def loss(params, state, outputs, targets, step, rng):
    value, metrics = plain.loss(params, state, outputs, targets, step, rng)
    zero = jnp.where(step >= at, 0.0, 1.0) * jnp.sum(outputs["logits"] ** 2)
    # The root has an infinite slope at 0; multiplied by 0 on the way back it is no number.
    bad = jnp.where(step >= at, jnp.nan, 0.0) if part == "loss" else 0 * jnp.sqrt(zero)
    return value + bad, metrics

  return Objective(loss)


@pytest.mark.parametrize("part, at", [("loss", 7), ("grad_norm", 9)])
def test_non_finite_stops_with_the_last_good_checkpoint(tmp_path, part, at):
  """Update 10, the one that is due to be saved, and one before it."""
  with pytest.raises(NonFinite, match=f"step {at + 1}: {part} is .*last good checkpoint is kept"):
    train([Phase(20, make(loss=poisoned(at, part)))], tmp_path)
  assert saved(tmp_path) == [5]
  assert [row["step"] for row in rows(tmp_path)] == list(range(1, at + 1))
  step, state = training.restore([Phase(20, make())], tmp_path)
  assert step == 5 and all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))
  assert train([Phase(20, make())], tmp_path).finished


def test_divergence_by_a_huge_learning_rate_is_noticed(tmp_path):
  with pytest.raises(NonFinite, match="learning_rate"):
    train([Phase(60, make("largest", tx=lambda mask: optax.sgd(1e38)))], tmp_path)


def test_a_longer_run_is_not_cut(tmp_path):
  train([Phase(6, make())], tmp_path)
  with pytest.raises(UserError, match="at step 6, train.steps is 4; allowed is at least as many"):
    train([Phase(4, make())], tmp_path)
  assert train([Phase(8, make())], tmp_path).finished


# Logs.


def test_rows_past_the_restored_step_and_half_lines_are_dropped(tmp_path):
  def die():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train([Phase(12, make())], tmp_path, Data({8: die}))
  assert saved(tmp_path) == [5] and rows(tmp_path)[-1]["step"] == 7
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "lo')
  train([Phase(12, make())], tmp_path)
  assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_evaluation_is_logged_beside_the_metrics(tmp_path):
  out = train([Phase(6, make())], tmp_path, eval_every=2,
              evaluate=lambda step, state: {"seen": float(state.step)})
  assert out.finished
  assert [(r["step"], r["seen"]) for r in rows(tmp_path) if "seen" in r] == [(2, 2.0), (4, 4.0)]


# SIGTERM.


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path):
  whole = train([Phase(12, make())], tmp_path / "whole")
  terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
  before = signal.getsignal(signal.SIGTERM)
  stopped = train([Phase(12, make())], tmp_path / "run", Data({6: terminate}))
  assert signal.getsignal(signal.SIGTERM) is before
  assert not stopped.finished and int(stopped.state.step) == 7
  assert max(saved(tmp_path / "run")) == 7 and rows(tmp_path / "run")[-1]["step"] == 7
  out = train([Phase(12, make())], tmp_path / "run")
  assert out.finished
  same(out.state, whole.state)
  assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# Devices.


def test_eight_devices_equal_one(tmp_path):
  """Loss and gradients from common parameters over 10 steps; parameters after 20 steps of SGD."""
  capture = lambda mask: optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p),
    lambda g, s, p: (jax.tree.map(lambda x: -0.1 * x, g), g))
  one, eight, data = make(tx=capture), make(tx=capture, devices=8), Data()
  state, host = one.init(), None
  for step in range(20):
    if step < 10:
      host = jax.device_get(state)
      common = jax.device_put(host, jax.tree.map(lambda x: x.sharding, eight.abstract()))
      other, metrics = jax.block_until_ready(eight(common, put_batch(data[step], eight.mesh), step))
    state, wanted = jax.block_until_ready(one(state, put_batch(data[step], one.mesh), step))
    if step < 10:
      assert abs(float(metrics["loss"]) - float(wanted["loss"])) < 1e-6 * float(wanted["loss"])
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                   jax.device_get(other.opt_state), jax.device_get(state.opt_state))
  sharded = eight.init()
  for step in range(20):
    # As the loop does, lest programs pile up: collectives of faked devices may then deadlock.
    sharded, _ = jax.block_until_ready(eight(sharded, put_batch(data[step], eight.mesh), step))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
               jax.device_get(sharded.trained), jax.device_get(state.trained))
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))


def test_batches_must_divide_over_the_devices():
  with pytest.raises(UserError, match="12 examples .* do not divide over 8 devices"):
    put_batch({"image": np.zeros((12, 6))}, make_mesh({"data": 8}))
  with pytest.raises(UserError, match="16 devices, 8 are here"):
    make_mesh({"data": 16})
