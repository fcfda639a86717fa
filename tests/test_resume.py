"""Killed at any moment and started again, a run ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nestnet import runs

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, FIRST = 160, 80
MODEL = '''
import flax.linen as nn
import jax.numpy as jnp
from nestnet.models.layers import Linear

class Net(nn.Module):
  embed: int
  mlp: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1))
    h = jnp.tanh(Linear("embed -> mlp", (self.mlp,), name="up")(x))
    h = nn.Dropout(0.2, deterministic=not train)(h)
    x += Linear("mlp -> embed", (self.embed,), name="down")(h)
    return {"features": x, "logits": Linear("embed -> classes", (self.classes,), name="head")(x)}
'''
CONFIG = f'''
import ml_collections
from nestnet.recipes import recipe

def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="resume_model:Net", embed=16, mlp=16)
  config.space = dict(embed=(8, 16), mlp=(8, 16))
  config.recipe = recipe("sandwich")
  config.data = dict(name="digits", data_dir="", augment="digits")
  config.optim = dict(name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=5,
                      weight_decay=0.05, clip_norm=1.0)
  config.train = dict(steps={STEPS}, batch_size=16, checkpoint_every=10, log_every=1, eval_every=0)
  config.mesh = dict(data=1)
  # The second half has a teacher that the first had not, and begins with fresh moments.
  config.phases = [dict(steps={FIRST}), dict(
    steps={STEPS - FIRST}, recipe=dict(teacher="frozen"), optim=dict(learning_rate=5e-4))]
  return config
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("resume")
  (folder / "tiny.py").write_text(CONFIG)
  (folder / "resume_model.py").write_text(MODEL)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield folder


def launch(folder, workdir):
  """The command of the README, its compiled programs cached; output goes to a file."""
  environment = {
    **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
  command = [sys.executable, "-m", "experiments.train", f"--config={folder}/tiny.py",
             f"--workdir={workdir}"]
  with open(folder / f"{workdir.name}.log", "a") as log:
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(folder, workdir):
  process = launch(folder, workdir)
  assert process.wait(timeout=180) == 0, (folder / f"{workdir.name}.log").read_text()
  assert (workdir / "done").exists()
  return (folder / f"{workdir.name}.log").read_text()


def stop_when(process, moment, how=signal.SIGKILL, timeout=180):
  """Sends a signal as soon as `moment()` is true; fails if the run ended before."""
  deadline = time.monotonic() + timeout
  while not moment():
    assert process.poll() is None, "the run ended before the moment came"
    assert time.monotonic() < deadline, "the moment never came"
    time.sleep(0.001)
  process.send_signal(how)
  return process.wait(timeout=60)


def reached(workdir):
  """The last step in `metrics.jsonl`."""
  try:
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
  except FileNotFoundError:
    return 0
  return json.loads(lines[-1])["step"] if lines else 0


def saving(workdir):
  """Whether a checkpoint is being written: Orbax's temporary folders, not yet renamed."""
  checkpoints = workdir / "checkpoints"
  return checkpoints.exists() and any("tmp" in p.name for p in checkpoints.iterdir())


def final_state(workdir):
  _, step, state = runs.opened(workdir)
  assert step == STEPS
  return jax.device_get(state)


def same(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, final_state(found), final_state(wanted))
  rows = [(w / "metrics.jsonl").read_text() for w in (found, wanted)]
  assert rows[0] == rows[1]
  assert rows[0].count("\n") == STEPS


@pytest.fixture(scope="module")
def uninterrupted(folder):
  finish(folder, folder / "uninterrupted")
  return folder / "uninterrupted"


def test_kills_and_sigterm_at_moments_that_matter(folder, uninterrupted):
  """By SIGTERM at a random step, and during a save at the phase change: one run through both."""
  workdir, log = folder / "killed", folder / "killed.log"
  chosen = random.Random(os.getpid()).randint(1, 40)
  assert stop_when(launch(folder, workdir), lambda: reached(workdir) >= chosen, signal.SIGTERM) == 0
  _, step, _ = runs.opened(workdir)
  assert chosen <= reached(workdir) == step < STEPS
  assert f"goes on from the checkpoint in {workdir}" in log.read_text()

  stop_when(launch(folder, workdir), lambda: reached(workdir) >= FIRST and saving(workdir))
  assert saving(workdir) and FIRST <= reached(workdir) < STEPS
  assert not (workdir / "done").exists() and not (workdir / "subnets.json").exists()
  finish(folder, workdir)
  same(workdir, uninterrupted)


def remove(file):
  file.unlink()


def truncate(file):
  file.write_bytes(file.read_bytes()[:-16])


def flip(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


@pytest.mark.parametrize("damage", [
  flip, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (remove, truncate))])
def test_damaged_newest_checkpoint_falls_back(folder, uninterrupted, damage):
  workdir = folder / damage.__name__
  shutil.copytree(uninterrupted, workdir)
  (workdir / "done").unlink()
  newest = workdir / "checkpoints" / str(STEPS) / "state"
  damage(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
  log = finish(folder, workdir)
  assert f"checkpoint {STEPS} in" in log and "is damaged and skipped" in log
  assert f"{STEPS}/{STEPS}" in log
  same(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(3))
def test_kills_at_more_random_moments(folder, uninterrupted, draw):
  """Any moment of the wall clock counts: start-up, compilation, saves, evaluation."""
  workdir, rng = folder / f"random{draw}", random.Random(draw)
  for _ in range(3):
    process = launch(folder, workdir)
    try:
      process.wait(timeout=rng.uniform(2.0, 12.0))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait(timeout=60)
  finish(folder, workdir)
  same(workdir, uninterrupted)
