"""README's code does what README says."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import nestnet
from nestnet import cli
from nestnet.evaluators.classification import classification

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Recipes of configs that are named without one.
DEFAULTS = ("sandwich", "ofa", "matformer_sampled", "poa")
WEIGHTS = (ROOT / "docs" / "once_for_all.md").read_text()


def blocks(text=README, language="python"):
  """Fenced blocks with the comment that stands above them: `[(comment, code)]`."""
  pattern = rf"(?:<!-- ([^>]*) -->\n)?```{language}\n(.*?)```"
  return [(comment or "", code) for comment, code in re.findall(pattern, text, re.DOTALL)]


def test_readme_is_short():
  assert len(README.splitlines()) <= 200


def test_quick_start_opens_with_two_commands():
  first = README.split("## Quick start")[1].split("```")[1].strip("\n").splitlines()
  assert len(first) == 2
  assert "configs/digits_vit.py" in first[0] and "runs/digits_vit" in first[0]
  assert "pytest" in first[1]


def test_the_idea_runs():
  (code,) = [code for comment, code in blocks() if not comment]
  scope = {}
  exec(code, scope)
  assert scope["logits"].shape == (1, 10)


def test_named_files_exist():
  for path in re.findall(r"`((?:nestnet|configs|docs)/[\w/]+\.?\w*)", README):
    assert (ROOT / path).exists(), path


def test_named_configs_load():
  named = re.findall(r"(configs/\w+\.py(?::\w+)?)", README)
  assert len(set(named)) > 10
  for spec in set(named):
    method = spec.partition(":")[2]
    assert cli.load_config(str(ROOT / spec)).recipe.name in ([method] if method else DEFAULTS), spec


@pytest.mark.slow
def test_weights_of_the_authors_become_a_network_of_their_own(tmp_path, monkeypatch):
  """The page's lines, on names and shapes of the narrower network with fewer classes."""
  (code,) = [code for comment, code in blocks(WEIGHTS) if comment == "authors' weights"]
  keys = json.loads((ROOT / "tests/fixtures/once_for_all/mbv3_keys.json").read_text())
  monkeypatch.chdir(tmp_path)
  (file,) = re.findall(r"\w\S*safetensors", code)
  safetensors.numpy.save_file({key: np.ones(shape, np.float32) for key, shape in keys.items()}, file)
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  exec(code.replace("1000, width=1.2", "10"), {"nestnet": nestnet, "images": images, "batches": [images]})
  module, small = nestnet.load("small")
  assert set(small["batch_stats"]) == set(small["params"]) - {"head_1", "classifier"}
  assert "accuracy" in dict(classification(module, small, {"image": images, "label": np.zeros(2, np.int32)}))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A folder with README's own model, data and config, and a checkout on its path."""
  folder = tmp_path_factory.mktemp("own")
  for comment, code in blocks():
    if comment.startswith("file: "):
      (folder / comment.removeprefix("file: ")).write_text(code)
  return folder


def run(folder, *command):
  import os
  environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
  return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, text=True,
                        capture_output=True, timeout=300)


@pytest.mark.slow
def test_own_model_and_data_train_and_extract(own):
  trained = run(own, "experiments.train", "--config=my_config.py", "--workdir=runs/mine",
                "--config.train.steps=60")
  assert trained.returncode == 0, trained.stderr
  extracted = run(own, "experiments.extract", "--workdir=runs/mine", "--max_params=5000", "--out=mine")
  assert extracted.returncode == 0, extracted.stderr
  assert "difference from the slice in place: 0" in extracted.stdout
  loaded = run(own, "timeit", "-n1", "-r1",
               "import my_net, nestnet, numpy; m, v = nestnet.load('mine', my_net.Mlp); "
               "assert m.apply(v, numpy.zeros((1, 8, 8, 1)))['logits'].shape == (1, 2)")
  assert loaded.returncode == 0, loaded.stderr
