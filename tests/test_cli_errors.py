"""Wrong input to the experiments' command lines: exit code 2, one message, nothing half-written."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import warnings

import jax
import pytest
from absl import app, flags

from nestnet import build, extraction, runs
from nestnet.data import load

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = '''
import ml_collections
from nestnet.recipes import recipe

def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="ViT", layers=1, embed=16, heads=4, mlp=16, patch=4)
  config.space = dict(embed=(8, 16), pool=("embed=8", "embed=16"))
  config.recipe = recipe("sandwich")
  config.recipe["sampler"]["random"] = 0
  config.data = dict(name="digits", data_dir="", augment="none")
  config.optim = dict(
    name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, momentum=0.9)
  config.train = dict(steps=2, batch_size=8, checkpoint_every=1, log_every=1, eval_every=0)
  config.mesh = dict(data=1)
  return config
'''


@pytest.fixture(scope="module", autouse=True)
def digits(prepared_data):
  """Prepared beforehand: the first who asks for them is told so, on a line of its own."""
  load("digits")


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a script of `experiments` in this process, as `python -m` would."""
  monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
  monkeypatch.chdir(ROOT)
  # The flags that absl and the libraries define once stay; those of a script go with it.
  assert extraction.runs
  app.define_help_flags()

  def run(script, *arguments):
    before = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [f"experiments/{script}.py", *map(str, arguments)])
    try:
      with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"experiments.{script}", run_name="__main__")
    finally:
      for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err

  return run


@pytest.fixture
def refused(command):
  """Asserts that a command is refused, with these words."""
  def check(script, *arguments, words, lines=1):
    code, out, err = command(script, *arguments)
    assert code == 2, err
    assert "Traceback" not in err and err.count("\n") <= lines, err
    assert err.startswith(f"{script}: ") and not out
    for word in words:
      assert word in err
  return check


def write(folder, *replacements, name="tiny.py"):
  text = CONFIG
  for old, new in replacements:
    assert old in text
    text = text.replace(old, new)
  (folder / name).write_text(text)
  return f"--config={folder / name}"


@pytest.mark.parametrize("replacement, words", [
  (('space = dict(embed=(8, 16)', 'space = dict(embde=(8, 16)'), ["axis", "'embed'", "embde"]),
  (('pool=("embed=8",', 'pool=("embed=9",'), ["embed=9 is outside the space", "8, 16"]),
  (('pool=("embed=8",', 'pool=("embde=8",'), ["'embde'; did you mean 'embed'"]),
  (('pool=("embed=8",', 'pool=("embed:8",'), ["'embed:8' is not axis=size", "layers=4"]),
  (('pool=("embed=8", "embed=16")', 'groups=dict(embed=3)'), ["embed=8", "3 groups"]),
  (('(8, 16), pool=("embed=8", "embed=16")', "(8, 32)"), ["embed=32", "16"]),
  (("heads=4", "heads=3"), ["embed=16", "heads=3", "head_dim"]),
  (("patch=4", "patch=3"), ["8 x 8", "patches of 3"]),
  (("mlp=16", "mpl=16"), ["config.model 'mpl'", "did you mean 'mlp'", "layers, embed"]),
  (('name="ViT"', 'name="VIT"'), ["'VIT'", "Allowed: ViT"]),
  (('name="digits"', 'name="digist"'), ["unknown data set 'digist'", "'digits'"]),
  (('name="digits"', 'name="cifar10"'), ["cifar10", "tfds build"]),
  (('"none"', '"flip"'), ["'flip'"]),
  (('name="sgd"', 'name="sdg"'), ["optimizer 'sdg'", "adamw, sgd"]),
  (("momentum=0.9", "nesterov=True"), ["config.optim 'nesterov'", "momentum"]),
  (('"constant"', '"stairs"'), ["schedule 'stairs'", "cosine, linear, constant"]),
  (("steps=2", "steps=0"), ["config.train.steps", "got 0", "at least 1"]),
  (("data=1", "data=16"), ["16 devices", "8 are here"]),
  (("batch_size=8", "batch_size=6"), []),
  (('recipe("sandwich")', 'recipe("sandwhich")'), ["unknown recipe", "did you mean 'sandwich'"]),
  (('["random"] = 0', '["rnadom"] = 0'), ["'rnadom'", "did you mean 'random'"]),
  (("  return config", "  config.phases = [dict(steps=1), dict(steps=2)]\n  return config"),
   ["config.phases", "train.steps=2", "[1, 2]"]),
  (("  return config", "  config.phases = ['share']\n  return config"),
   ["config.phases[0]: got 'share'", "list of dicts"]),
  (("  return config", "  config.phases = [dict(shre=1)]\n  return config"),
   ["config.phases[0] 'shre'", "did you mean 'share'"]),
  # Said before any model is built: that of the first phase would not be.
  (("  return config", "  config.model.heads = 3\n  config.phases = [dict(steps=1), dict(steps=1, optim=dict("
    "warmup_steps=1))]\n  return config"), ["phase 2 of 2, config.phases[1]", "1 step:", "warmup_steps=1"]),
  (("  return config", "  config.trian = 3\n  return config"), ["'trian'", "did you mean 'train'"]),
])
def test_configs_that_do_not_go_together(tmp_path, refused, replacement, words):
  if "batch_size=6" in replacement:
    replacements, words = (replacement, ("data=1", "data=4")), ["batch_size: got 6", "4 devices"]
  else:
    replacements = (replacement,)
  refused("train", write(tmp_path, *replacements), f"--workdir={tmp_path}/run", words=words,
          lines=2 if "cifar10" in words else 1)
  assert not (tmp_path / "run").exists()


def test_overrides_are_checked(tmp_path, refused):
  config, workdir = write(tmp_path), f"--workdir={tmp_path}/run"
  refused("train", config, workdir, "--config.model.embd=8",
          words=["'embd'", "did you mean 'embed'", "heads"])
  refused("train", config, workdir, "--config.train.steps=many",
          words=["train.steps", "'many'", "int"])
  refused("train", config, words=["--workdir", "required"])
  assert not (tmp_path / "run").exists()


def contents(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A finished run, through the real command."""
  folder = tmp_path_factory.mktemp("finished")
  environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                 "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
  done = subprocess.run(
    [sys.executable, "-m", "experiments.train", write(folder), f"--workdir={folder}/run"], cwd=ROOT,
    env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture
def run(finished, tmp_path):
  """A copy to damage."""
  shutil.copytree(finished / "run", tmp_path / "run")
  write(tmp_path)
  return tmp_path / "run"


def test_workdir_of_another_config(run, refused):
  before = contents(run)
  refused("train", f"--config={run.parent}/tiny.py", f"--workdir={run}", "--config.seed=1",
          "--config.optim.learning_rate=0.2", lines=5,
          words=["another config", "seed: 0 there, 1 asked for",
                 "optim.learning_rate: 0.1 there, 0.2"])
  assert contents(run) == before


@pytest.fixture
def phased(tmp_path):
  """A workdir that belongs to a run of two phases, and its config."""
  def settle(share, *more, steps=4, **changed):
    scope = {}
    exec(CONFIG, scope)
    config = build.plain(scope["get_config"]())
    config["train"]["steps"] = steps
    config["phases"] = [{"share": 1, "open": {"embed": 1}}, {"share": share, "recipe": {"ema": 0.5}}, *more]
    return runs.settle(config | changed, tmp_path / "run")

  assert not settle(3)
  return settle


def test_a_phase_that_differs_is_named_by_its_key(phased):
  """And what phases hang on is not among what may differ."""
  assert not phased(3) and not phased(3, eval={"calibrate_images": 8})
  with pytest.raises(ValueError, match=r"undo:\n  phases\[1\].share: 3 there, 2 asked for\n\("):
    phased(2)
  with pytest.raises(ValueError, match=r"undo:\n  phases\[2\]: None there, \{'share': 5\} asked for\n\("):
    phased(3, {"share": 5})
  with pytest.raises(ValueError, match=r"undo:\n  phases: .{,120} there, None asked for\n\(train.eval_every"):
    phased(3, phases=None)
  with pytest.raises(ValueError) as caught:
    phased(3, steps=8)
  refused, allowed = str(caught.value).split("\n")[1:]
  assert refused == "  train.steps: 4 there, 8 asked for"
  assert allowed.startswith("(train.eval_every,") and "train.steps may not" in allowed


@pytest.mark.slow
def test_what_may_differ_is_recorded(run, command):
  code, _, err = command("train", f"--config={run.parent}/tiny.py", f"--workdir={run}",
                         "--config.train.steps=3", "--config.train.checkpoint_every=2",
                         "--config.train.eval_every=2", "--config.mesh.data=2")
  assert code == 0, err
  saved = json.loads((run / "config.json").read_text())
  assert saved["changes"] == [{"mesh.data": [1, 2], "train.checkpoint_every": [1, 2],
                               "train.eval_every": [0, 2], "train.steps": [2, 3]}]
  assert saved["config"]["train"]["steps"] == 3 and (run / "done").exists()
  assert json.loads((run / "subnets.json").read_text())[0]["steps"] == 3


def test_fewer_steps_than_made(run, refused):
  refused("train", f"--config={run.parent}/tiny.py", f"--workdir={run}", "--config.train.steps=1",
          words=["step 2", "train.steps is 1"])


def test_workdir_that_holds_something_else(tmp_path, refused):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "thesis.txt").write_text("mine")
  refused("train", write(tmp_path), f"--workdir={tmp_path}/run",
          words=["no config.json", "empty folder"])
  assert contents(tmp_path / "run") == {pathlib.Path("thesis.txt"): b"mine"}


@pytest.mark.parametrize("choice, words", [
  (["--max_params=10"], ["no evaluated sub-network has params of at most 10", "the cheapest: "]),
  (["--max_flops=10", "--max_params=1e9"], ["flops of at most 10", "flops "]),
  (["--max_params=few"], ["max_params", "few"]),
  (["--subnet=embed=9"], ["embed=9 is outside the space", "8, 16"]),
  (["--subnet=embde=8"], ["'embde'; did you mean 'embed'"]),
  (["--subnet=embed"], ["'embed' is not axis=size"]),
  ([], ["--subnet", "--max_params"]),
  (["--subnet=embed=8", "--max_params=1e9"], ["either"]),
])
def test_extract_refuses(finished, tmp_path, refused, choice, words):
  refused("extract", f"--workdir={finished}/run", f"--out={tmp_path}/out", *choice, words=words)
  assert not list(tmp_path.iterdir())


def test_extract_says_what_the_smallest_costs(finished, tmp_path, refused):
  rows = json.loads((finished / "run" / "subnets.json").read_text())
  smallest = min(row["params"] for row in rows)
  refused("extract", f"--workdir={finished}/run", f"--out={tmp_path}/out", "--max_params=10",
          words=[f"params {smallest:g}"])


def test_extract_does_not_replace_what_is_not_its_own(finished, tmp_path, refused):
  (tmp_path / "notes.txt").write_text("mine")
  refused("extract", f"--workdir={finished}/run", f"--out={tmp_path}", "--subnet=embed=8",
          words=["is no extracted network"])
  assert contents(tmp_path) == {pathlib.Path("notes.txt"): b"mine"}


@pytest.mark.parametrize("script, arguments", [
  ("evaluate", ["--subnets=embed=8"]), ("extract", ["--subnet=embed=8", "--out=/nonexistent/out"])])
def test_runs_that_are_not_there_or_damaged(run, refused, script, arguments):
  refused(script, f"--workdir={run.parent}/none", *arguments, words=["no run in", "config.json"])
  whole = (run / "config.json").read_text()
  for damaged in (whole[:-20], "[]", '{"config": {}}', "\x00"):
    (run / "config.json").write_text(damaged)
    refused(script, f"--workdir={run}", *arguments, words=[str(run / "config.json"), "damaged"])
  (run / "config.json").write_text(whole)
  shutil.rmtree(run / "checkpoints")
  refused(script, f"--workdir={run}", *arguments, words=["no checkpoint in", "experiments.train"])
  assert not (run / "checkpoints").exists()


def test_damaged_config_of_a_run_to_go_on_with(run, refused):
  (run / "config.json").write_text("{")
  refused("train", f"--config={run.parent}/tiny.py", f"--workdir={run}",
          words=["config.json", "damaged"])


def test_damaged_rows(run, tmp_path, refused):
  arguments = ("extract", f"--workdir={run}", f"--out={tmp_path}/out", "--max_params=1e9")
  for damaged in ("[", "{}", "[1]", '[{"subnet": "embed=8"}]'):
    (run / "subnets.json").write_text(damaged)
    refused(*arguments, words=["subnets.json"])
  (run / "subnets.json").unlink()
  refused(*arguments, words=["subnets.json"])
  assert not (tmp_path / "out").exists()


def test_every_checkpoint_damaged(run, command):
  for step in (run / "checkpoints").iterdir():
    shutil.rmtree(step / "state")
  code, _, err = command("evaluate", f"--workdir={run}")
  assert code == 2 and "Traceback" not in err
  assert err.splitlines()[-1].startswith("evaluate: every checkpoint in")


def test_evaluate_checks_its_members(run, refused):
  before = contents(run)
  refused("evaluate", f"--workdir={run}", "--subnets=embed=8;embed=7",
          words=["embed=7 is outside", "8, 16"])
  assert contents(run) == before


@pytest.mark.parametrize("arguments, words", [
  (["--sort_by=l3"], ["sort_by", "l3", "activation|l1|l2"]),
  (["--sort_by=activation", "--sort_batches=0"], ["batches=0", "at least 1"]),
  (["--against=/nonexistent"], ["has a ViT", "a Decoder of text"])])
def test_evaluate_refuses(run, refused, arguments, words):
  before = contents(run)
  refused("evaluate", f"--workdir={run}", *arguments, words=words)
  assert contents(run) == before


def test_another_order_of_units_leaves_the_run_as_it_is(run, command):
  before = contents(run)
  code, out, err = command("evaluate", f"--workdir={run}", "--sort_by=activation", "--sort_batches=1")
  assert code == 0, err
  assert out.endswith("2 of 2 sub-networks, at step 2 of 2, units sorted by activation\n")
  assert contents(run) == before
