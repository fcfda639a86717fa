"""A run whose networks are for their features: evaluated, charted, chosen and compared by readouts."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nestnet
from nestnet import build, compare, evaluation, extraction, references, report, runs
from nestnet.data import arrays, load
from nestnet.errors import UserError
from nestnet.evaluators import readouts, representation
from nestnet.models.layers import Linear
from nestnet.objectives import Objective, health

SIZES = ("embed=8", "embed=16")
COLUMNS = ["knn", "knn_full", "logistic", "probe", "knn_k1", "knn_k5", "knn_k20", "knn_full_k1", "knn_full_k5",
           "knn_full_k20", "feature_std", "effective_rank"]


class Net(nn.Module):
  """A layer of features."""

  embed: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    x = jnp.tanh(Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1)))
    head = {"logits": Linear("embed -> classes", (self.classes,), name="head")(x)} if self.classes else {}
    return {"features": x} | head


def ones(task="representation"):
  """Features regress on ones; no label is read."""
  loss = lambda params, state, outputs, targets, step, rng: (jnp.mean((outputs["features"] - 1) ** 2), {})
  return Objective(loss, needs=("image",), task=task)


def config(name="truncate", objective=None, **options):
  return {
    "seed": 0, "model": {"name": f"{__name__}:Net", "embed": 16}, "space": {"embed": (8, 16)},
    "recipe": {"name": name, "sampler": {"name": "largest"},
               "objective": objective or {"name": f"{__name__}:ones"}},
    "data": {"name": "digits", "data_dir": "", "augment": "digits"},
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0}, "mesh": {"data": 1},
    "train": {"steps": 2, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "eval_every": 0},
    "eval": {"bank": 300, "examples": 90, **options}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("representation") / "run"
  assert runs.train(config(), workdir, show_progress=False)
  return workdir


def test_rows_are_readouts_of_each_members_features(finished):
  run, _, state = runs.opened(finished)
  rows = {row["subnet"]: row for row in report.read_rows(finished / "subnets.json")}
  assert list(rows) == list(SIZES) and run.supernet.model.classes == 0
  small = rows[SIZES[0]]
  names = [name for name in small if name not in ("subnet", "params", "flops", *evaluation.budget(run, 2))]
  assert names == [f"validation_{name}" for name in COLUMNS] + COLUMNS
  # Here from the member's own module, on whole splits in one batch.
  module, variables = evaluation.member(run.step, state, run.supernet.space.subnet(SIZES[0]), [])
  features = jax.jit(lambda x: module.apply(variables, x)["features"])
  splits = {split: arrays(run.dataset, split, 300 if split == "train" else 90)
            for split in ("train", "validation", "test")}
  bank, held, test = (np.asarray(features(data["image"])) for data in splits.values())
  labels, known, answers = (data["label"] for data in splits.values())
  share = lambda found: np.mean(found == answers)
  draws = readouts.stratified(labels, 10, 10, 20)
  each = [share(readouts.knn(bank[drawn], labels[drawn], test, (5,), 10)) for drawn in draws]
  near = lambda value: pytest.approx(value, abs=0.02)
  assert small["knn"] == small["knn_k5"] == near(np.mean(each)) and len(set(each)) > 1
  full = [share(x) for x in readouts.knn(bank, labels, test, (1, 5, 20), 10)]
  assert [small[f"knn_full_k{k}"] for k in (1, 5, 20)] == near(full)
  assert small["logistic"] == near(share(readouts.logistic(bank, labels, held, known)(test)))
  assert small["probe"] == near(share(readouts.probe(bank, labels, held, known, 10)(test)))
  chosen = max((1, 5, 20), key=lambda k: small[f"validation_knn_full_k{k}"])
  assert small["knn_full"] == small[f"knn_full_k{chosen}"]
  assert small["effective_rank"] == pytest.approx(float(health.effective_rank(test)), rel=1e-4)
  assert small["feature_std"] == pytest.approx(float(health.feature_std(test)), rel=1e-4)
  assert small["params"] == sum(x.size for x in jax.tree.leaves(variables))


def test_tables_charts_and_choices_are_by_neighbours(finished, tmp_path):
  rows = report.read_rows(finished / "subnets.json")
  header = " ".join(report.table(evaluation.shown(rows)).splitlines()[0].split())
  assert header == "subnet params FLOPs validation knn knn knn full logistic probe"
  assert (finished / "pareto.png").exists()
  row, difference = extraction.extract_run(finished, tmp_path / "out", max_params=1e9)
  assert row["validation_knn"] == max(row["validation_knn"] for row in rows) and difference <= 1e-5
  module, variables = nestnet.load(tmp_path / "out", Net)
  outputs = jax.jit(module.apply)(variables, jnp.zeros((1, 8, 8, 1)))
  assert outputs["features"].shape == (1, module.embed) and "logits" not in outputs


def test_what_did_not_train_stands_beside_it(finished):
  rows = {row["subnet"]: row for row in report.read_rows(finished / "references.json")}
  assert list(rows) == ["pixels", "pca=8", "pca=16", *(f"{size}, untrained" for size in SIZES)]
  run = build.build(config())
  whole = arrays(run.dataset, "train", 300)
  test, flat = arrays(run.dataset, "test", 90), lambda data: data["image"].reshape(-1, 64)
  found = readouts.knn(flat(whole), whole["label"], flat(test), (1,), 10)
  assert rows["pixels"]["knn_full_k1"] == np.mean(found == test["label"]) > 0.8
  assert rows["pca=8"]["knn"] < rows["pca=16"]["knn"]
  state = run.step.init()
  (row,) = evaluation.evaluate(run, state, [run.supernet.space.largest])
  assert row["logistic"] == rows[f"{SIZES[1]}, untrained"]["logistic"]
  text = references.written(finished)
  assert text.splitlines()[0].endswith("probe") and "untrained" in text and "pca=8" in text
  assert not references.references(build.build(config(objective={"name": "classification"})))


def test_what_an_objective_says_decides_what_its_networks_are_for():
  run = build.build(config(objective={"name": "classification"}))
  assert run.task.metric.name == "accuracy" and run.supernet.model.classes == 10
  with pytest.raises(UserError, match="unknown task of the objective 'guess'"):
    build.build(config(objective={"name": f"{__name__}:ones", "task": "guess"}))
  with pytest.raises(UserError, match="task language_modelling reads tokens; digits has image, label"):
    build.build(config(objective={"name": f"{__name__}:ones", "task": "language_modelling"}))


@pytest.mark.parametrize("options, message", [
  ({"knn_k": (1, 301)}, "config.eval.knn_k, bank of 300 training images: .* got 1, 301; allowed is 1 to 300"),
  ({"knn_k": (5.0,)}, "config.eval.knn_k: got .*5.0.*, allowed is a tuple of whole numbers"),
  ({"knn_labels": 31}, "config.eval.knn_labels: got 31 for each of 10 classes, allowed is 1 to 30"),
  ({"bank": 15}, "bank of 15 training images: .*got 1, 5, 20; allowed is 1 to 15"),
  ({"readouts": ("svm",)}, "unknown config.eval.readouts 'svm'. Allowed: logistic, probe")])
def test_what_cannot_be_evaluated_is_said_before_training(options, message):
  with pytest.raises(UserError, match=message):
    build.build(config(**options))


def test_settings_follow_the_bank():
  dataset = load("digits")
  assert representation.settings(dataset, {}) == representation.Settings(
    (1, 5, 20), 10, ("logistic", "probe"), 0, 0)
  assert representation.settings(dataset, {"readouts": ()}).readouts == ()
  batches = list(representation.bank_of(dataset, 300))
  assert [len(batch["label"]) for batch in batches] == [256, 44]
  np.testing.assert_array_equal(np.concatenate([batch["image"] for batch in batches]),
                                arrays(dataset, "train", 300)["image"])
  large = type("Large", (), {"classes": 10, "split": lambda self, name: range(representation.LARGE)})()
  assert representation.settings(large, {}).knn_k == (10, 20, 100, 200)


@pytest.mark.slow
def test_comparisons_have_intervals_of_every_readout_and_the_references(tmp_path):
  configs = [config(name) for name in ("separate", "truncate")]
  call = lambda: compare.compare(configs, 2, tmp_path, ("equal steps",))
  tables = call()
  for title in ("k-NN accuracy with few labels", "k-NN accuracy with all labels", "logistic regression",
                "a linear probe"):
    assert title in tables
  assert tables.count("### Equal steps\n") == 4 and "difference to separate" in tables
  pixels = next(line for line in tables.splitlines() if line.startswith("| pixels |"))
  assert pixels.count("± 0.0") == 4
  assert f"| {SIZES[0]}, untrained |" in tables and (tmp_path / f"{tmp_path.name}.png").exists()
  found = json.loads((tmp_path / "results.json").read_text())
  assert all(len(record["knn"]) == len(record["probe"]) == 2 for record in found["results"])
  assert len(found["references"][0]["rows"]) == 2
  assert call() == tables
