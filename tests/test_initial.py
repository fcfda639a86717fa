"""Runs that begin with the weights of a folder."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

import nestnet
from nestnet import build, cli, runs
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.initial import Parent
from nestnet.interop import hugging_face
from nestnet.models.decoder import Decoder
from nestnet.models.vit import ViT
from nestnet.training import Border

TOKENS = jax.ShapeDtypeStruct((1, 4), np.int32)
VIT = ViT(layers=2, embed=16, heads=4, mlp=16, classes=10, patch=4, head_dim=4)
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)


def config_of(folder, **recipe):
  """Networks of the default config, small, that hardly move in a step."""
  config = build.plain(cli.load_config("configs/digits_vit.py:truncate"))
  config["model"] = dict(name="ViT", layers=2, embed=16, heads=4, mlp=16, patch=4, head_dim=4)
  config["space"] = dict(layers=(1, 2), embed=(8, 16), heads=(4,), mlp=(16,))
  config["train"] |= dict(steps=1, batch_size=8, checkpoint_every=1, log_every=1)
  config["optim"] |= dict(learning_rate=1e-12, warmup_steps=0, weight_decay=0.0)
  return config | {"init_from": str(folder), "recipe": config["recipe"] | recipe}


def randomised(model, *inputs):
  rng = np.random.default_rng(3)
  shapes = Supernet(model, nestnet.Space(layers=(model.layers,)), inputs).shapes["params"]
  return {"params": jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)}


@pytest.fixture
def folder(tmp_path):
  nestnet.save(tmp_path / "parent", VIT.clone(dropout=0.3), randomised(VIT, IMAGES))
  return tmp_path / "parent"


def assert_near(found, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def train(config, workdir):
  run = build.build(config)
  runs.begun(run, workdir)
  return run, runs.trained(run, workdir, show_progress=False)


def border(run):
  return Border(None, run.phases[0].step, run.batches)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_goes_on_without_them(folder, tmp_path):
  expected = randomised(VIT, IMAGES)["params"]
  run, state = train(config_of(folder, teacher="frozen"), tmp_path / "run")
  assert int(state.step) == 1
  assert_near(state.trained["model"], expected)
  # The frozen teacher is the network that the run began with.
  assert_near(state.teacher["model"], expected)
  assert run.parent.member is None
  shutil.rmtree(folder)
  config = config_of(folder, teacher="frozen")
  config["train"]["steps"] = 2
  _, state = train(config, tmp_path / "run")
  assert int(state.step) == 2
  assert_near(state.trained["model"], expected)
  with pytest.raises(FileNotFoundError, match="no extracted network in .*parent"):
    train(config, tmp_path / "another")
  assert not (tmp_path / "another").exists()


@pytest.mark.slow
def test_a_member_that_trains_alone_begins_with_its_slice(folder):
  run = build.build(config_of(folder, subnet="layers=1,embed=8"))
  step = run.phases[0].step
  state = run.parent(step.init(), border(run))
  full = randomised(VIT, IMAGES)
  module, small = nestnet.extract(VIT, full, nestnet.Subnet(layers=1, embed=8, heads=4, mlp=16), IMAGES)
  assert module == run.supernet.model.clone(position_std=module.position_std)
  jax.tree.map(np.testing.assert_array_equal, state.trained["model"], small["params"])


def test_another_network_is_refused_before_anything_is_written(folder, tmp_path):
  config = config_of(folder)
  config["model"]["pool"] = "token"
  with pytest.raises(UserError, match="init_from: .*parent holds another ViT than config.model; allowed is "
                     "the same:\n  pool: mean there, token in config.model$"):
    train(config, tmp_path / "run")
  decoder = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=8)
  hugging_face.write_folder(tmp_path / "text", decoder, randomised(decoder, TOKENS))
  with pytest.raises(UserError, match="text holds a Decoder, got the class ViT"):
    train(config_of(tmp_path / "text"), tmp_path / "run")
  with pytest.raises(UserError, match="no extracted network in .*nowhere"):
    train(config_of(tmp_path / "nowhere"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_weights_of_another_shape_are_listed(folder):
  variables = randomised(VIT, IMAGES)
  variables["params"]["head"]["bias"] = np.ones(3, np.float32)
  nestnet.save(folder, VIT, variables)
  run = build.build(config_of(folder))
  with pytest.raises(UserError, match=r"1 of another shape\n .*head/bias: got \[3\], expected \[10\]"):
    run.parent(run.phases[0].step.init(), border(run))


def test_a_decoder_s_folder_is_checked_field_by_field(tmp_path):
  model = Decoder(layers=1, embed=8, heads=2, kv_heads=1, mlp=8, vocab=8, context=32)
  hugging_face.write_folder(tmp_path / "out", model, randomised(model, TOKENS))
  family = lambda **other: Supernet(model.clone(**other), nestnet.Space(layers=(1,)), (TOKENS,))
  Parent(tmp_path / "out", family(context=16, layer_dropout=0.1)).check()
  with pytest.raises(UserError, match="rope_theta: 10000.0 there, 500.0 in config.model\n  norm_eps: 1e-06"):
    Parent(tmp_path / "out", family(rope_theta=500.0, norm_eps=1e-3)).check()
