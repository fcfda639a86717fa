"""From a run on text to a Hugging Face folder, and from there to another run."""

from __future__ import annotations

import json

import jax
import ml_collections
import numpy as np
import pytest

import nestnet
from nestnet import build, extraction, recipes, runs
from nestnet.errors import UserError
from nestnet.interop import hugging_face
from nestnet.training import Border

pytestmark = pytest.mark.slow


class Rhyme:
  train = [{"text": f"{i} potato, {i + 1} potato"} for i in range(30)]
  test = [{"text": f"{i} potato more"} for i in range(5)]


def config(**groups):
  return {
    "seed": 0, "model": {"name": "Decoder", "layers": 2, "embed": 8, "heads": 2, "kv_heads": 1, "mlp": 16,
                         "dtype": "bfloat16", "context": 32},
    "space": {"mlp": (4, 16)},
    "recipe": recipes.recipe("truncate") | {"objective": {"name": "language_modelling"}},
    "data": {"name": f"{__name__}:Rhyme", "length": 8, "tokenizer": ""},
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0},
    "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "eval_every": 0},
    "eval": {"examples": 6}, "mesh": {"data": 1}} | groups


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir, run = tmp_path_factory.mktemp("runs") / "rhyme", build.build(config())
  runs.begun(run, workdir)
  runs.trained(run, workdir, show_progress=False)
  return workdir


def test_a_member_is_extracted_verified_and_trained_on(workdir, tmp_path):
  """The network computes in bfloat16, and its folder holds float32."""
  row, difference = extraction.extract_run(workdir, tmp_path / "out", "mlp=16", format="hugging_face")
  assert difference == 0.0
  page = (tmp_path / "out" / "README.md").read_text().splitlines()
  assert f"| costs and metrics: bits per byte | {row['bits_per_byte']:.6g} |" in page
  assert f"| costs and metrics: flops | {row['flops']:,} |" in page
  assert {f"| parent: run | {workdir} |", "| parent: step | 2 |", "| recipe: name | truncate |",
          "| subnet | mlp=16 |"} <= set(page)
  assert json.loads((tmp_path / "out" / "nestnet.json").read_text())["costs_and_metrics"] == row
  # Bytes, and what ends a document of the run.
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
  assert "| tokens | bytes; 0 ends a text |" in page
  module, variables = nestnet.load(tmp_path / "out")
  assert (module.mlp, module.context, str(np.dtype(module.param_dtype))) == (16, 32, "float32")
  fields = hugging_face.model_fields(tmp_path / "out")
  goes_on = build.build(ml_collections.ConfigDict(config(init_from=str(tmp_path / "out"), model=fields)))
  goes_on.parent.check()
  step = goes_on.phases[0].step
  state = goes_on.parent(step.init(), Border(None, step, goes_on.batches))
  jax.tree.map(np.testing.assert_array_equal, state.trained["model"], variables["params"])


def test_layers_that_differ_are_refused_before_they_are_evaluated(workdir, tmp_path):
  with pytest.raises(UserError, match="mlp=4:16: layers differ, .* uniform members: not larger: mlp=4; "
                     "larger: mlp=16; --format=safetensors"):
    extraction.extract_run(workdir, tmp_path / "out", "mlp=4:16", format="hugging_face")
  assert not (tmp_path / "out").exists()
