"""A decoder of text, from config to extracted network: what a run knows of its data it asks the task."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import (
  against, build, cli, compare, cost, evaluation, extraction, jobs, recipes, report, runs, training)
from nestnet.errors import UserError
from nestnet.evaluators import TASKS
from nestnet.evaluators.language_modelling import language_modelling, windows
from nestnet.interop import folder
from nestnet.one_program import OneProgram
from nestnet.pieces import shared

CONFIG = "configs/stdlib_matformer.py"
METHODS = ("matformer_sampled", "matformer_joint", "sorted", "sandwich", "separate", "truncate")
SIZES = ("mlp=4", "mlp=16")
# Of both, and in no recipe.
MIXED = "mlp=4:16"


class Rhyme:
  train = [{"text": f"{i} potato, {i + 1} potato"} for i in range(30)]
  test = [{"text": f"{i} potato more"} for i in range(5)]


def config(name="matformer_sampled", steps=4, **groups):
  return {
    "seed": 0, "model": {"name": "Decoder", "layers": 2, "embed": 8, "heads": 2, "kv_heads": 1, "mlp": 16},
    "space": {"mlp": (4, 16)}, "recipe": recipes.recipe(name) | {"objective": {"name": "language_modelling"}},
    "data": {"name": f"{__name__}:Rhyme", "length": 8, "tokenizer": ""},
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0},
    "train": {"steps": steps, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "eval_every": 0},
    "eval": {"examples": 6, "members": (MIXED,)}, "mesh": {"data": 1}} | groups


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "rhyme"
  assert runs.train(config(), workdir, show_progress=False)
  return workdir


def test_rows_are_bits_per_byte_of_the_windows_that_are_evaluated(finished):
  rows = {row["subnet"]: row for row in report.read_rows(finished / "subnets.json")}
  run, step, state = runs.opened(finished)
  assert step == 4 and [row.removeprefix("layers=2,") for row in rows] == [SIZES[0], MIXED, SIZES[1]]
  member = run.supernet.space.smallest
  module, variables = run.supernet.module(member), run.step.member(state, member)
  for split, prefix in (("test", ""), ("validation", "validation_")):
    source = run.dataset.split(split)
    chosen = np.arange(min(6, len(source))) * len(source) // min(6, len(source))
    tokens = source.batch(chosen)["tokens"]
    logits = np.asarray(jax.jit(module.apply)(variables, np.maximum(tokens[:, :-1], 0))["logits"], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    known = [logs[i, j, tokens[i, j + 1]] for i, j in np.argwhere(tokens[:, 1:] >= 0)]
    row = rows[str(member)]
    assert row[f"{prefix}loss"] == pytest.approx(-np.mean(known), rel=1e-5)
    assert row[f"{prefix}bits_per_byte"] == pytest.approx(-np.mean(known) / math.log(2), rel=1e-5)
    assert row[f"{prefix}perplexity"] == pytest.approx(np.exp(-np.mean(known)), rel=1e-5)
  assert (row["steps"], row["tokens"], row["seed"]) == (4, 4 * 4 * 8, 0) and "images" not in row
  assert evaluation.budget_text(row).startswith("4 steps, 128 tokens, ")
  columns = [row.keys() for row in evaluation.shown(rows.values())]
  assert list(columns[0]) == ["subnet", "params", "flops", "validation_bits_per_byte", "bits_per_byte",
                              "perplexity"]


def test_members_agree_with_the_largest_network_of_a_run(finished, monkeypatch):
  """With itself wholly; else by numpy, over the places at which an evaluation predicts a token."""
  run, step, state = runs.opened(finished)
  # All windows: the last one is not full.
  run = dataclasses.replace(run, config=run.config | {"eval": {}})
  space = run.supernet.space
  small, same = against.compared(run, state, space, against.largest(finished, run))
  assert same == {"agreement": 1.0, "kl": 0.0}
  tokens = evaluation.held(run, "test")["tokens"]
  known = tokens[:, 1:] >= 0
  assert not known.all()

  def logs(state, member):
    module, variables = run.supernet.module(member), run.step.member(state, member)
    logits = np.asarray(jax.jit(module.apply)(variables, np.maximum(tokens[:, :-1], 0))["logits"], np.float64)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[known]

  def by_hand(own, other):
    return {"agreement": pytest.approx(np.mean(own.argmax(-1) == other.argmax(-1))),
            "kl": pytest.approx((np.exp(own) * (own - other)).sum(-1).mean(), rel=1e-3, abs=1e-6)}

  assert small == by_hand(logs(state, space.smallest), logs(state, space.largest)) and small["kl"] > 0
  columns = list(evaluation.shown([{"subnet": "", "perplexity": 2.0, "kl": 0.0, "agreement": 1.0}])[0])
  assert columns == ["subnet", "perplexity", "agreement", "kl"]
  # Trained apart: the other run's own weights.
  other = run.step.init()
  monkeypatch.setattr(runs, "opened", lambda workdir: (run, step, other))
  apart = against.compared(run, state, [space.largest], against.largest("other", run))
  assert apart == [by_hand(logs(state, space.largest), logs(other, space.largest))]
  assert apart[0]["kl"] > small["kl"]


@pytest.mark.slow
def test_agreement_is_shown_and_not_kept(finished):
  """By the command, whose table of the largest says that it agrees with itself."""
  tests = pathlib.Path(__file__).resolve().parent
  paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
  before = (finished / "subnets.json").read_bytes()
  done = subprocess.run(
    [sys.executable, "-m", "experiments.evaluate", f"--workdir={finished}", f"--against={finished}"],
    cwd=tests.parent, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  header, *_, largest, _ = done.stdout.splitlines()
  assert header.split()[-3:] == ["perplexity", "agreement", "kl"]
  assert largest.split()[-2:] == ["100.0%", "0.0000"]
  assert (finished / "subnets.json").read_bytes() == before


def test_runs_whose_texts_cannot_be_compared_are_said(finished, monkeypatch):
  run, step, state = runs.opened(finished)
  text = dataclasses.replace(run.dataset, hashes={"tokenizer_sha256": "another"})
  vit = {"name": "ViT", "layers": 2, "embed": 8, "heads": 2, "mlp": 16, "patch": 4}
  images = config() | {"model": vit, "recipe": recipes.recipe("truncate"), "data": {"name": "digits"}}
  longer = config() | {"data": config()["data"] | {"length": 16}}
  short = config() | {"model": config()["model"] | {"context": 8}}
  wide = config() | {"model": config()["model"] | {"vocab": 300}}
  images, longer, short, wide = map(build.build, (images, longer, short, wide))
  for own, other, message in (
      (run, images, "^agreement on the next token: other has a ViT; allowed is a Decoder of text$"),
      (images, run, "^agreement on the next token: the run to evaluate has a ViT"),
      (run, wide, "^other: its network has 300 tokens, that of the run to evaluate has 256; allowed"),
      (run, dataclasses.replace(run, dataset=text), "^other: its tokenizer is not that of"),
      (longer, short, "^other: the context of its network is 8; allowed is at least the 16")):
    monkeypatch.setattr(runs, "opened", lambda workdir: (other, step, state))
    with pytest.raises(UserError, match=message):
      against.largest("other", own)


def test_bits_of_a_byte_are_not_those_of_a_token():
  """Windows whose targets stand for three bytes each, some of them behind the end; equal logits."""
  data = {"tokens": np.array([[1, 2, 3], [0, 3, -1]], np.int32), "bytes": np.array([6.0, 3.0])}
  apply = lambda variables, tokens: {"logits": jnp.zeros((*tokens.shape, 8))}
  module = type("Even", (), {"apply": staticmethod(apply)})()
  found = dict(language_modelling(module, {}, data))
  assert found == {"bits_per_byte": pytest.approx(1.0), "perplexity": pytest.approx(8), "loss": pytest.approx(
    math.log(8))}


def test_windows_come_in_equal_batches_of_a_bounded_size():
  tokens = np.arange(5 * 1025).reshape(5, 1025).astype(np.int32)
  found = list(windows({"tokens": tokens}))
  assert [batch.shape for batch in found] == [(3, 1025), (3, 1025)]
  np.testing.assert_array_equal(np.concatenate(found)[:5], tokens)
  assert (found[1][2] == -1).all()
  assert [batch.shape for batch in windows({"tokens": np.zeros((1, 10 ** 5), np.int32)})] == [(1, 10 ** 5)]


def test_the_fewest_bits_that_fit_are_extracted_and_equal(finished, tmp_path):
  rows = report.read_rows(finished / "subnets.json")
  best = min(rows, key=lambda row: row["validation_bits_per_byte"])
  row, difference = extraction.extract_run(finished, tmp_path / "out", max_params=1e9)
  assert row["subnet"] == best["subnet"] and difference == 0.0


@pytest.mark.slow
def test_widths_that_differ_by_layer_are_extracted(finished, tmp_path):
  row, difference = extraction.extract_run(finished, tmp_path / "mixed", "mlp=4:16")
  assert row["subnet"] == "mlp=4:16" and difference == 0.0 and row["bits_per_byte"] > 0
  module, variables = folder.load(tmp_path / "mixed")
  logits = jax.jit(module.apply)(variables, jnp.zeros((1, 3), int))["logits"]
  assert module.mlp == (4, 16) and logits.shape == (1, 3, 256)


def test_latency_is_of_a_window(finished):
  run, _, state = runs.opened(finished)
  (row,) = extraction.latencies(run, state, report.read_rows(finished / "subnets.json")[:1])
  assert row["latency_ms"] > 0 and run.supernet.inputs == (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


def test_what_training_costs_is_that_of_the_network_alone():
  supernet = build.build(config()).supernet
  for text in (*SIZES, "mlp=4:16"):
    member = supernet.space.subnet(text)
    module, pieces = supernet.module(member), shared(supernet)
    assert pieces.train_flops(member) == cost.flops(module, *supernet.inputs, train=True)
    assert pieces.costs(member) == {"params": cost.count_params(module, *supernet.inputs),
                                    "flops": cost.flops(module, *supernet.inputs)}


def test_a_run_that_goes_on_is_the_one_that_was_not_interrupted(finished, tmp_path):
  _, _, straight = runs.opened(finished)
  for steps in (2, 4):
    run = build.build(config(steps=steps))
    outcome = training.train(run.phases, run.batches, tmp_path, checkpoint_every=2, log_every=1,
                             show_progress=False)
  jax.tree.map(np.testing.assert_array_equal, outcome.state.trained, straight.trained)


def test_the_run_says_which_text_it_saw(finished, tmp_path, capsys):
  made = build.plain(config())
  made["data"] = {"name": "stdlib_text", "length": 8}
  run = build.build(made)
  assert run.config["data"] == made["data"] | run.dataset.facts and "sha256" in run.config["data"]
  shutil.copytree(finished, tmp_path / "run")
  saved = json.loads((finished / "config.json").read_text())
  assert saved["config"]["data"]["vocab"] == 256
  saved["config"]["data"] = run.config["data"] | {"sha256": "of another Python"}
  (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
  with pytest.raises(UserError, match="data.sha256: got of another Python, .*, as stdlib_text has it"):
    runs.opened(tmp_path / "run")
  (task,) = compare.plan([made], 1, tmp_path, ("equal steps",))
  assert task.config["data"] == run.config["data"]


@pytest.mark.parametrize("groups, message", [
  ({"recipe": recipes.recipe("matformer_joint")}, "objective.name=classification learns from image, label; "
   ".* has tokens, no image; allowed with it: language_modelling"),
  ({"model": config()["model"] | {"vocab": 255}}, "config.model.vocab: got 255, allowed is at least 256"),
  ({"data": {"name": "digits"}}, "language_modelling learns from tokens; digits has image, label, no tokens"),
  ({"data": config()["data"] | {"vocab": 300}}, "config.data.vocab: got 300, allowed is 256, as .* has it"),
  ({"data": config()["data"] | {"length": 0}}, "config.data.length: got 0, allowed is a whole number"),
  ({"eval": {"examples": 0}}, "config.eval.examples: got 0"),
  ({"model": config()["model"] | {"context": 4}}, "a sequence of 8 tokens; allowed are at most context=4"),
])
def test_what_does_not_go_together(groups, message):
  with pytest.raises(UserError, match=message):
    build.build(config(**groups))


def test_a_plan_reads_no_text_that_the_config_describes():
  made = config()
  made["data"] = {"name": "nowhere", "length": 8, "vocab": 1000}
  (phase,), batch = build.planned(made, jax.devices()[:1])
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {"tokens": ((4, 9), jnp.int32)}
  assert phase.step.supernet.model.vocab == 1000


def fake(task, size, bits):
  return {"subnet": size, "params": len(size), "flops": 10, "bits_per_byte": bits, "perplexity": 2.0,
          "validation_bits_per_byte": bits, "steps": task.steps, "train_flops": 1e6, "seconds": 1.0}


def test_a_page_of_recipes_is_in_bits(tmp_path):
  tasks = compare.plan([config("separate"), config("matformer_joint")], 2, tmp_path, ("equal steps",))
  for task in tasks:
    lift = 0.25 * (task.recipe == "separate") + 0.1 * task.seed
    report.write_rows(task.workdir / "subnets.json", [fake(task, size, 2.0 + lift) for size in task.sizes])
  records = compare.gather(tasks, ("equal steps",))
  assert all(set(r) >= {"bits_per_byte", "validation_bits_per_byte"} and "accuracy" not in r for r in records)
  text = compare.write_page(tmp_path / "page.md", records, tasks, 1, "")
  assert text.count("**-0.250** ± 0.000") == 2 and "less that of separate (below 0 is better)" in text
  assert "![Bits per byte against size](page.png)" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_members_as_data_have_the_same_bits(finished):
  run, _, state = runs.opened(finished)
  one, data = OneProgram(run.supernet), run.dataset.split("train").evaluated(np.arange(9))
  members = [run.supernet.space.subnet(text) for text in (*SIZES, "mlp=4:16")]
  task, variables = TASKS["language_modelling"], {"params": state.trained["model"], **state.fixed}
  together = dict(task.evaluate_all(one, variables, {}, np.stack(list(map(one.vector, members))), data))
  for i, member in enumerate(members):
    alone = dict(task.evaluate(run.supernet.module(member), run.step.member(state, member), data))
    assert {name: values[i] for name, values in together.items()} == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_recipes_of_text_are_compared(tmp_path):
  configs = [config("separate", 2), config("matformer_joint", 2)]
  text = compare.compare(configs, 1, tmp_path, ("equal steps",), None, 1, "the command")
  assert "lower is better" in text and all(map(jobs.Task.done.fget, compare.plan(configs, 1, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_config(method, tmp_path):
  """Two steps, shrunken."""
  made = cli.load_config(f"{CONFIG}:{method}")
  with made.unlocked():
    made.model.update(layers=2, embed=8, heads=2, kv_heads=1, mlp=16, context=16)
    made.space.mlp = (4, 16)
    made.data.length, made.eval.examples = 16, 8
    made.train.update(steps=2, batch_size=4, log_every=1)
    made.optim.warmup_steps = 1
  assert runs.train(made, tmp_path / "run", show_progress=False)
  rows = report.read_rows(tmp_path / "run" / "subnets.json")
  assert len(rows) == (1 if method == "separate" else 3) and all(0 < row["bits_per_byte"] < 9 for row in rows)
  assert extraction.extract_run(tmp_path / "run", tmp_path / "out", "smallest")[1] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_mixtures_of_the_config_have_half_of_the_layers_at_each_of_two_sizes(method):
  run = build.build(cli.load_config(f"{CONFIG}:{method}"))
  pairs = [(64, 128), (128, 256), (256, 512)]
  assert [member.chosen["mlp"] for member in run.also] == (
    [] if method == "separate" else [(low,) * 4 + (high,) * 4 for low, high in pairs])


def test_the_config_has_two_million_parameters():
  run = build.build(cli.load_config(CONFIG))
  costs = [evaluation.costs(run.supernet, member)["params"] for member in run.supernet.space]
  assert 1.9e6 < max(costs) < 2.1e6 and min(costs) < 0.35 * max(costs) and len(costs) == 4
  assert run.batches[0]["tokens"].shape == (run.config["train"]["batch_size"], 257)
