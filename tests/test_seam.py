"""Two methods that nestnet does not know train, resume, shard and extract with no edit of it."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from nestnet import build, extraction, runs

MODULE = '''
import flax.linen as nn
import jax
import jax.numpy as jnp

from nestnet.axes import axes
from nestnet.objectives import Objective


class Net(nn.Module):
  """A perceptron; the user's own model."""
  embed: int
  features: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    def dense(name, x, size, names):
      init = nn.initializers.lecun_normal()
      return x @ self.param(name, axes(init, names), (x.shape[-1], size))
    x = jnp.tanh(dense("up", images.reshape(len(images), -1), self.embed, "pixels -> embed"))
    z = dense("out", x, self.features, "embed -> features")
    return {"features": z, "logits": dense("head", z, self.classes, "features -> classes")}


def contrast(proj=3, temperature=0.5):
  """Supervised contrast of projected features; students regress on the teacher's projection."""
  def project(params, outputs):
    z = outputs["features"] @ params["kernel"] + params["bias"][None]
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

  def init(rng, model, space):
    params = {"kernel": jax.random.normal(rng, (model.features, proj)), "bias": jnp.ones((proj,))}
    return params, {"kernel": "features -> proj", "bias": "-> proj"}, {}

  def teach(params, state, outputs, batch, step):
    return project(params, outputs)

  def loss(params, state, outputs, targets, step, rng):
    z, labels = project(params, outputs), targets.batch["label"]
    if targets.teacher is not None:
      return jnp.mean((z - targets.teacher) ** 2), {}
    same = labels[:, None] == labels[None]
    logp = jax.nn.log_softmax(z @ z.T / temperature)
    one_hot = jax.nn.one_hot(labels, 10)
    ce = -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(outputs["logits"]), axis=-1))
    return ce - jnp.mean(same * logp), {"same": jnp.mean(same)}

  return Objective(loss, init, teach=teach)


def centred(rate=0.1, sharpness=2.0):
  """Students follow an averaged teacher whose logits a running centre is taken from (as DINO)."""
  def init(rng, model, space):
    return {}, {}, {"centre": jnp.zeros((model.classes,)), "updates": jnp.zeros((), jnp.int32)}

  def teach(params, state, outputs, batch, step):
    logits = outputs["logits"]
    target = jax.nn.softmax((logits - state["centre"][None]) * sharpness)
    return {"target": target, "logits": logits}

  def loss(params, state, outputs, targets, step, rng):
    logp = jax.nn.log_softmax(outputs["logits"])
    target = (jax.nn.one_hot(targets.batch["label"], 10) if targets.teacher is None
              else targets.teacher["target"])
    return -jnp.mean(jnp.sum(target * logp, axis=-1)), {}

  def update(state, params, outputs, step):
    centre = (1 - rate) * state["centre"] + rate * outputs["logits"].mean(axis=0)
    return {"centre": centre, "updates": state["updates"] + 1}

  return Objective(loss, init, teach=teach, update=update)
'''
SANDWICH = {"name": "sandwich", "random": 1, "candidates": 1, "reduce": "sum", "by": "choices",
            "regularise": "largest"}
RECIPES = {
  "contrast": {"sampler": SANDWICH, "objective": {"name": "seam_methods:contrast", "proj": 4}},
  "centred": {"sampler": {**SANDWICH, "candidates": 2}, "teacher": "ema", "ema": 0.9,
              "select": "highest", "objective": {"name": "seam_methods:centred", "rate": 0.2}},
}
STEPS = 6


@pytest.fixture(autouse=True)
def importable(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.getbasetemp() / "seam"
  folder.mkdir(exist_ok=True)
  (folder / "seam_methods.py").write_text(MODULE)
  monkeypatch.syspath_prepend(folder)


def config(method, devices=1):
  return {
    "seed": 0, "model": {"name": "seam_methods:Net", "embed": 16, "features": 8},
    "space": {"embed": (8, 16), "features": (4, 8)}, "recipe": {"name": method, **RECIPES[method]},
    "data": {"name": "digits", "data_dir": "", "augment": "digits"},
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "cosine", "warmup_steps": 2,
              "weight_decay": 0.01, "momentum": 0.9},
    "train": {"steps": STEPS, "batch_size": 16, "checkpoint_every": 2, "log_every": 1,
              "eval_every": 0},
    "mesh": {"data": devices}}


def state_of(workdir):
  run, step, state = runs.opened(workdir)
  assert step == STEPS
  return run, state


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_method_of_the_users_own(method, tmp_path):
  workdir = tmp_path / "run"
  assert runs.train(config(method), workdir, show_progress=False)
  run, state = state_of(workdir)
  fresh = run.step.init()
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trained, fresh.trained)
  assert all(jax.tree.leaves(moved))

  # Resume: what was saved after step 4 ends as the uninterrupted run did, to the last bit.
  again = tmp_path / "again"
  shutil.copytree(workdir, again)
  shutil.rmtree(again / "checkpoints" / str(STEPS))
  (again / "done").unlink()
  assert runs.train(config(method), again, show_progress=False)
  jax.tree.map(np.testing.assert_array_equal, state_of(again)[1], state)
  assert (again / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()

  # Eight devices: the same numbers.
  assert runs.train(config(method, devices=8), tmp_path / "eight", show_progress=False)
  sharded = state_of(tmp_path / "eight")[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharded, state)

  # Extract: equal to the slice in place, with the objective's own slice beside it.
  row, difference = extraction.extract_run(workdir, tmp_path / "small", "embed=8,features=4")
  assert difference == 0.0 and row["params"] == 64 * 8 + 8 * 4 + 4 * 10
  beside = tmp_path / "small" / "objective.safetensors"
  if method == "centred":
    assert not beside.exists()
    assert int(state.objective["updates"]) == STEPS and np.abs(state.objective["centre"]).max() > 0
  else:
    own = safetensors.numpy.load_file(beside)
    np.testing.assert_array_equal(own["kernel"], state.trained["objective"]["kernel"][:4])
    np.testing.assert_array_equal(own["bias"], state.trained["objective"]["bias"])


@pytest.mark.slow
def test_metrics_are_those_of_the_first_sub_network(tmp_path):
  assert runs.train(config("contrast"), tmp_path, show_progress=False)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert set(rows[0]) == {"step", "loss", "grad_norm", "same"}


def test_centre_and_average_follow_their_definitions():
  """One update against the method's own words: the mean of the teacher's logits, its decay."""
  run = build.build(config("centred"))
  step, batch = run.step, run.batches[0]
  state = step.init()
  model = step.supernet.model
  params = jax.device_get(state.trained["model"])
  logits = jax.jit(model.apply)({"params": params}, batch["image"])["logits"]
  after, _ = step(state, jax.device_put(batch), 0)
  np.testing.assert_allclose(after.objective["centre"], 0.2 * logits.mean(axis=0), atol=1e-6)
  jax.tree.map(lambda t, a, b: np.testing.assert_allclose(t, 0.9 * a + 0.1 * b, atol=1e-6),
               after.teacher["model"], params, after.trained["model"])
