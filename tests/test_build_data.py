"""The data group of a config: crops, and which entries batches have."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import build
from nestnet.errors import UserError
from nestnet.models.layers import Linear
from nestnet.objectives import Objective

CROPS = {"augment": "digits", "global_crops_size": 8, "local_crops_number": 1, "local_crops_size": 4,
         "mask_sample_probability": 0.5, "mask_patch": 2}


class Net(nn.Module):
  """The mean of an image's pixels, so that crops of every size go through it."""

  embed: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("channels -> embed", (self.embed,), name="stem")(images.mean((1, 2)))
    return {"features": x, "logits": Linear("embed -> classes", (self.classes,), name="head")(x)}


def alike(*needs):
  """Features of both global crops, and of the local one, are to be near each other."""
  def forward(apply, batch):
    crops = [batch["global"][:, 0], batch["global"][:, 1], batch["local"][:, 0]]
    return {"crops": jnp.stack([apply(x)["features"] for x in crops])}

  def loss(params, state, outputs, targets, step, rng):
    return jnp.mean(jnp.var(outputs["crops"], axis=0)), {}

  return Objective(loss, forward=forward, needs=needs)


def of_crops():
  return alike("global", "local")


def of_anything():
  return alike()


def config(objective=f"{__name__}:of_crops", **of_data):
  return {
    "model": {"name": f"{__name__}:Net", "embed": 4}, "space": {"embed": (2, 4)},
    "recipe": {"name": "test", "sampler": {"name": "largest"}, "objective": {"name": objective}},
    "data": {"name": "digits", "crops": CROPS} | of_data,
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant"},
    "train": {"steps": 2, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "eval_every": 0,
              "execution": "slice"},
    "mesh": {"data": 1}}


def test_a_run_has_the_entries_that_its_objectives_read():
  run = build.build(config())
  assert set(run.batches[0]) == {"label", "global", "local"}
  assert set(build.build(config("classification")).batches[0]) == {"image", "label"}
  run = build.build(config(f"{__name__}:of_anything"))
  assert set(run.batches[0]) == set(run.dataset.entries) == {"image", "label", "global", "local", "mask"}
  # An override of the command line, and of a file, gives a list or a tuple.
  scaled = build.build(config(crops=CROPS | {"local_crops_scale": [0.1, 0.2]})).dataset.crops
  assert scaled.local_crops_scale == (0.1, 0.2)


def test_a_plan_has_the_batch_of_the_run():
  made = config()
  run = build.build(made)
  _, here = build.planned(made, jax.devices()[:1])
  (phase,), there = build.planned(config(name="elsewhere", shape=(8, 8, 1), classes=10), jax.devices()[:1])
  for batch in (here, there):
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
      k: (x.shape, x.dtype) for k, x in run.batches[0].items()}
  assert [x.shape for x in phase.step.supernet.inputs] == [(1, 8, 8, 1)]


def test_networks_are_made_for_the_size_of_global_crops():
  run = build.build(config(crops=CROPS | {"global_crops_size": 6}))
  assert [x.shape for x in run.supernet.inputs] == [(1, 6, 6, 1)]


@pytest.mark.slow
def test_crops_train():
  run = build.build(config())
  state = run.step.init()
  before = jax.device_get(state.trained["model"])
  state, metrics = run.step(state, run.batches[0], 0)
  assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, before, jax.device_get(state.trained["model"]))
  assert moved["stem"]["kernel"]


@pytest.mark.parametrize("made, message", [
  (config(crops=None), "learns from global, local; digits has image, label, no global; allowed with it: "
   "classification, or with config.data.crops that make global"),
  (config(crops=CROPS | {"local_crops_number": 0}), "no local; .* config.data.crops that make local"),
  (config(crops={"global_crop_size": 8}), "unknown key of config.data.crops 'global_crop_size'; did you mean "
   "'global_crops_size'"),
  (config(crops={"global_crops_size": 12, "local_crops_number": 0}), "data.crops.global_crops_size: got 12"),
  (config(crops={}), "config.data.crops.global_crops_size: got 224, allowed: at most 8: the images of digits"),
  (config(crops=8), "config.data.crops: got 8, allowed is a dict, such as"),
  (config("language_modelling", name="stdlib_text", length=32), "config.data.crops are of images; stdlib_text is "
   "text; allowed with it: none"),
])
def test_what_is_wrong_is_said_at_the_start(made, message):
  with pytest.raises(UserError, match=message):
    build.build(made)
