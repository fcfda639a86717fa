"""Plans: what is refused before anything compiles, what a table says, and the real compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from nestnet import cli, dryrun, errors, plan, tpus

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = '''
import ml_collections
from nestnet.recipes import recipe

def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="ViT", layers=2, embed=16, heads=2, mlp=16, patch=4)
  config.space = dict(layers=(1, 2), embed=(8, 16), heads=(2,), mlp=(16,), pool=(
    "layers=1,embed=8,heads=2,mlp=16", "layers=2,embed=16,heads=2,mlp=16"))
  config.recipe = recipe("sandwich")
  config.recipe["sampler"]["random"] = 1
  config.data = dict(name="nowhere", shape=(8, 8, 1), classes=10)
  config.optim = dict(name="adamw", learning_rate=0.1)
  config.train = dict(steps=2, batch_size=16, checkpoint_every=1, log_every=1, eval_every=0)
  config.mesh = dict(data=1)
  return config
'''


@pytest.fixture
def config(tmp_path):
  (tmp_path / "tiny.py").write_text(CONFIG)
  return tmp_path / "tiny.py"


def run(config, *arguments):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-m", "experiments.plan", f"--config={config}", *arguments], cwd=config.parent,
    env=environment, capture_output=True, text=True, timeout=600)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("mesh, words", [
  ("data:32", ["mesh data:32: 32 chips", "v5e:4x4 has 16", "product is 16"]),
  ("data:8", ["8 chips", "product is 16"]), ("data:-1,model:3", ["3 chips", "product is 16"]),
  ("data:-1,model:-1", ["-1 in one place"]), ("data8", ["'data8'", "axis:size"]),
  ("data:0", ["'data:0'", "axis:size"]), ("data:4,data:4", ["each axis once"]),
])
def test_meshes_that_are_not_of_the_slice(config, mesh, words):
  with pytest.raises(errors.UserError) as error:
    plan.plan(cli.load_config(str(config)), "v5e:4x4", mesh)
  assert all(word in str(error.value) for word in words)


def test_a_missing_compiler_is_said_with_its_remedy(config, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match="libtpu, is not installed.*requirements-plan.txt"):
    plan.plan(cli.load_config(str(config)), "v5e:2x2", "data:4")
  assert (ROOT / "requirements-plan.txt").is_file()


def test_wrong_flags_exit_with_2(config):
  code, out, err = run(config, "--topology=v5f:4x4")
  assert (code, out) == (2, "") and err.count("\n") == 1
  assert err.startswith("plan: unknown topology 'v5f:4x4'; did you mean 'v5e:4x4'")


@pytest.fixture(scope="module")
def found():
  """A plan for devices that are here."""
  scope = {}
  exec(CONFIG, scope)
  made = plan.build.plain(scope["get_config"]()) | {"mesh": {"data": 8}}
  chip = tpus.Chip(2**20, 1e12, 1e11, 1e9, 8, ("8",))
  return dryrun.compile_config(made, tpus.Topology("test:8", chip, (8,)), jax.devices())


@pytest.mark.slow
def test_the_table_names_every_program_with_its_numbers(found):
  text = plan.table(found)
  for row in found["programs"]:
    name = dryrun.label(row["kind"], row["subnets"], row["taught"])
    lines = [line for line in text.splitlines() if line.startswith(name)]
    assert any(f"{row['memory']['total'] / 2**20:.1f}" in line for line in lines)
    assert any(row["bound"] in line for line in lines)
  assert "all-reduce" in text and "one step at best" in text and "8 chips, mesh data:8, batch 16" in text
  assert plan.fits(found) == (" NO" not in text)


@pytest.mark.slow
def test_what_the_compiler_refused_is_quoted(found):
  damaged = json.loads(json.dumps(found))
  damaged["programs"][0] |= {"refused": "Ran out of memory on HBM", "fits": False,
                             "memory": {"arguments": 2**20, "beside": 0, "total": 2**20}}
  text = plan.table(damaged)
  assert not plan.fits(damaged) and "Ran out of memory on HBM" in text and "one step at best" not in text
  assert "NO" in text and "?" in text


@pytest.mark.interop
def test_the_tpu_compiler_itself(config, tmp_path):
  """A step for 4 chips that are not here fits; with a batch of millions it does not."""
  out = tmp_path / "plan.json"
  code, text, err = run(config, "--topology=v5e:2x2", "--mesh=data:4", f"--json={out}", "--subnets=layers=1")
  assert code == 0, err
  written = json.loads(out.read_text())
  assert written["chips"] == 4 and written["mesh"]["data"] == 4
  kinds = [(row["kind"], row["subnets"]) for row in written["programs"]]
  assert kinds[-1] == ("update", []) and sum(kind == "gradient" for kind, _ in kinds) >= 2
  for row in written["programs"]:
    assert row["fits"] and row["unknown_loops"] == 0
    gradient = row["kind"] == "gradient"
    assert gradient == bool(row["collectives"]) == (row["flops"] > 0)
    assert all(c["devices"] == 4 for c in row["collectives"])
  assert "libtpu" in text and "yes" in text

  code, text, err = run(config, "--topology=v5e:2x2", "--mesh=data:4", f"--config.train.batch_size={2**24}")
  assert code == 1, err
  assert " NO" in text and "exceeds available HBM" in text


@pytest.mark.interop
def test_members_of_every_shard_are_planned(config):
  """Which these are stands in an array, which chips that are not here cannot hold."""
  code, text, err = run(config, "--topology=v5e:2x2", "--mesh=data:4", "--config.train.per_shard_subnets=True",
                        "--config.train.execution=one_program", "--config.recipe.sampler.random=2")
  assert code == 0, err
  assert "gradient, taught, layers=1" in text


@pytest.mark.interop
def test_mistakes_that_only_the_compiling_process_sees(config):
  code, out, err = run(config, "--topology=v5e:2x2", "--mesh=data:4", "--config.train.batch_size=6")
  assert (code, out) == (2, "") and "batch_size: got 6" in err and "Traceback" not in err


@pytest.mark.slow
def test_vit_l_is_planned_without_its_images():
  """The config stands by itself: its programs are named, its size is that of ViT-L/16."""
  made = cli.load_config(str(ROOT / "configs" / "imagenet_vit_l16.py"))
  phases, batch = plan.build.planned(made, jax.devices())
  params = sum(x.size for x in jax.tree.leaves(phases[0].step.abstract().trained))
  assert 303e6 < params < 305e6 and batch["image"].shape == (4096, 224, 224, 3)


@pytest.mark.slow
def test_shrinking_of_a_mobile_network_is_planned_without_its_images():
  """Six phases over the paper's space, which opens from one member to all; few pixels make it quick."""
  made = cli.load_config(str(ROOT / "configs" / "imagenet_ofa_mbv3.py"))
  made.data.shape, made.mesh.data = (32, 32, 3), 1
  # One program for all members is another matter.
  made.train.execution = "slice"
  phases, batch = plan.build.planned(made, jax.devices()[:1])
  assert [round(p.steps / made.train.steps * 605) for p in phases] == [180, 125, 25, 125, 25, 125]
  assert [p.step.supernet.space.size for p in phases] == [
    1, 3 ** 20, (3 ** 3 + 3 ** 4) ** 5, (3 ** 2 + 3 ** 3 + 3 ** 4) ** 5, (6 ** 2 + 6 ** 3 + 6 ** 4) ** 5,
    (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5]
  assert [p.fresh_optimizer for p in phases] == [False] + 5 * [True]
  assert [p.step.recipe.teacher for p in phases] == ["largest"] + 5 * ["frozen"]
  assert batch["image"].shape == (2048, 32, 32, 3)
