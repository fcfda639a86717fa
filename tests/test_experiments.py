"""Train, evaluate, extract, end to end; and every method of the default config, shrunken."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from nestnet import Space, build, cli, evaluation, extraction, importance, report, runs
from nestnet.data import arrays, load
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.interop import folder
from nestnet.recipes import RECIPES

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs" / "digits_vit.py"


def shrunken(method, steps=2):
  """The default config of a method at a fraction of its size: other numbers, the same keys."""
  config = cli.load_config(f"{DEFAULT}:{method}")
  with config.unlocked():
    config.model.update(layers=2, embed=16, heads=4, mlp=16, patch=4)
    steps = max(steps, len(config.get("phases", ())))
    config.train.update(steps=steps, batch_size=8, checkpoint_every=100, log_every=1)
    config.optim.warmup_steps = 0 if config.get("phases") else 1
    if method.startswith("matryoshka"):
      config.model.features = 16
      config.space.features = (4, 16)
      config.recipe.objective.sizes = (4, 16)
    else:
      config.space.update(layers=(1, 2), embed=(8, 16), heads=(2, 4), mlp=(8, 16), pool=(
        "layers=1,embed=8,heads=2,mlp=8", "layers=2,embed=16,heads=4,mlp=16"))
    if method == "sandwich":
      # A space of four members is enough to look at; the pool still decides what trains.
      config.space.update(heads=(4,), mlp=(16,), pool=("layers=1,embed=8", "layers=2,embed=16"))
      config.model.head_dim = 4
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "digits_vit"
  assert runs.train(shrunken("sandwich", steps=4), workdir, show_progress=False)
  return workdir


def test_what_a_run_leaves(finished):
  names = {p.name for p in finished.iterdir()}
  assert {"config.json", "metrics.jsonl", "checkpoints", "subnets.json", "pareto.png",
          "done"} <= names
  assert any(name.startswith("events.out.tfevents") for name in names)
  assert (finished / "pareto.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  saved = json.loads((finished / "config.json").read_text())
  assert saved["changes"] == [] and saved["config"] == build.plain(shrunken("sandwich", steps=4))
  rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)


def test_rows_are_the_whole_space_and_what_it_costs(finished):
  rows = report.read_rows(finished / "subnets.json")
  run = build.build(shrunken("sandwich", steps=4))
  assert {row["subnet"] for row in rows} == {str(m) for m in run.supernet.space}
  assert len(rows) == 4
  for row in rows:
    assert 0 <= row["accuracy"] <= 1 and 0 <= row["validation_accuracy"] <= 1
    assert (row["steps"], row["images"], row["seed"]) == (4, 32, 0) and row["train_flops"] > 0
  shapes = run.supernet.shapes["params"]
  assert max(r["params"] for r in rows) == sum(x.size for x in jax.tree.leaves(shapes))


def test_accuracy_of_a_row_is_that_of_its_slice(finished):
  """Counted here from the checkpoint, on the split that the name says."""
  run, step, state = runs.opened(finished)
  assert step == 4
  rows = {row["subnet"]: row for row in report.read_rows(finished / "subnets.json")}
  for member in (run.supernet.space.smallest, run.supernet.space.largest):
    module, variables = run.supernet.module(member), run.step.member(state, member)
    for split, name in (("test", "accuracy"), ("validation", "validation_accuracy")):
      data = arrays(run.dataset, split)
      found = jax.jit(module.apply)(variables, data["image"])["logits"].argmax(-1)
      assert abs(rows[str(member)][name] - np.mean(found == data["label"])) < 1e-6


def test_running_again_changes_nothing(finished):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  assert runs.train(shrunken("sandwich", steps=4), finished, show_progress=False)
  assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_whoever_looks_at_a_run_before_its_end_is_told(finished, tmp_path, capsys):
  runs.opened(finished)
  assert capsys.readouterr().err == ""
  shutil.copytree(finished, tmp_path / "run")
  config = json.loads((finished / "config.json").read_text())
  config["config"]["train"]["steps"] = 8
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  runs.opened(tmp_path / "run")
  assert capsys.readouterr().err == (
    "the run is not finished: step 4 of 8; only 2 sub-networks have trained\n")


def test_important_units_lead_before_members_are_cut(finished):
  """The whole network stays what it is; whatever order units had before, the same are kept."""
  run, _, state = runs.opened(finished)
  smallest, largest = run.supernet.space.smallest, run.supernet.space.largest
  def losses(state, *members):
    return [row["loss"] for row in evaluation.evaluate(run, state, members, splits=("test",))]
  sort = lambda state, by="activation": importance.sorted_for(run.step, state, [smallest], run.batches, by, 2)
  plain, whole = losses(state, smallest, largest)
  found = losses(sort(state), smallest, largest)
  assert found[1] == pytest.approx(whole, rel=1e-5) and abs(found[0] - plain) > 1e-4
  shuffled = importance.permuted(run.step, state, {"embed": np.random.default_rng(0).permutation(16)})
  assert abs(losses(shuffled, smallest)[0] - plain) > 1e-4
  assert losses(sort(shuffled), smallest) == pytest.approx(found[:1], rel=1e-5)
  assert abs(losses(sort(state, "l1"), smallest)[0] - found[0]) > 1e-5


def test_layers_that_change_most_are_kept(finished, monkeypatch):
  """And named; a member that does not keep leading ones stays."""
  run, _, state = runs.opened(finished)
  blocks = state.trained["model"]["blocks"]
  for part, name in (("attention", "out"), ("mlp", "down")):
    # The first layer adds next to nothing.
    blocks[part][name] = jax.tree.map(lambda leaf: leaf.at[0].multiply(1e-3), blocks[part][name])
  members = [run.supernet.space.subnet(text) for text in ("layers=1,embed=8", "layers=+1", "largest")]
  ranked = importance.with_ranked_layers(run.step, state, members, run.batches, 2)
  assert [*map(str, ranked)] == ["layers=+1,embed=8,heads=4,mlp=16", *map(str, members[1:])]
  step = run.step
  monkeypatch.setattr(step, "supernet", dataclasses.replace(step.supernet, space=Space(embed=(8, 16))))
  with pytest.raises(UserError, match="ViT: its members differ along embed; allowed .* an axis layers"):
    importance.with_ranked_layers(step, state, [], run.batches)


def test_extract_by_a_partial_spec_with_layer_ids(finished, tmp_path):
  row, difference = extraction.extract_run(finished, tmp_path / "out", "layers=+1,embed=8")
  assert difference == 0.0 and row["subnet"] == "layers=+1,embed=8,heads=4,mlp=16"
  module, variables = folder.load(tmp_path / "out")
  assert (module.layers, module.embed, module.heads, module.mlp) == (1, 8, 4, 16)
  run, _, state = runs.opened(finished)
  np.testing.assert_array_equal(variables["params"]["blocks"]["mlp"]["up"]["kernel"],
                                state.trained["model"]["blocks"]["mlp"]["up"]["kernel"][1:, :8])
  data = arrays(load("digits"), "test")
  accuracy = np.mean(jax.jit(module.apply)(variables, data["image"])["logits"].argmax(-1) == data["label"])
  assert abs(accuracy - row["accuracy"]) < 1e-6
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["parent"] == {"run": str(finished), "step": 4}
  # The layers asked for never trained together: these did.
  assert sorted(written["trained"]) == ["layers=1,embed=8,heads=4,mlp=16", "layers=2,embed=16,heads=4,mlp=16"]
  assert written["costs_and_metrics"]["params"] == row["params"] == sum(
    x.size for x in jax.tree.leaves(variables["params"]))
  assert not (tmp_path / "out" / "objective.safetensors").exists()


@pytest.mark.parametrize("limit, column", [("max_params", "params"), ("max_flops", "flops")])
def test_extract_by_a_budget_takes_the_most_accurate_that_fits(finished, tmp_path, limit, column):
  rows = report.read_rows(finished / "subnets.json")
  budget = sorted(row[column] for row in rows)[2]
  fitting = [row for row in rows if row[column] <= budget]
  row, difference = extraction.extract_run(finished, tmp_path / "out", **{limit: budget})
  assert difference == 0.0 and row[column] <= budget
  assert row["validation_accuracy"] == max(r["validation_accuracy"] for r in fitting)


def test_extract_by_latency_measures_here(finished, tmp_path):
  row, difference = extraction.extract_run(finished, tmp_path / "out", max_latency_ms=10_000.0)
  assert difference == 0.0 and 0 < row["latency_ms"] < 10_000


def test_extract_twice_replaces(finished, tmp_path):
  sizes = []
  for spec in ("embed=16", "embed=8,layers=1"):
    extraction.extract_run(finished, tmp_path / "out", spec)
    weights = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    sizes.append(sum(w.size for w in weights.values()))
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]
  assert sizes[1] < sizes[0] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_format_that_cannot_hold_a_network_is_refused(finished, tmp_path):
  with pytest.raises(UserError, match="written of a Decoder, got a ViT; allowed is --format=safetensors"):
    extraction.extract_run(finished, tmp_path / "out", "smallest", format="hugging_face")
  with pytest.raises(UserError, match="unknown format 'onnx'. Allowed: safetensors, hugging_face"):
    extraction.extract_run(finished, tmp_path / "out", "smallest", format="onnx")
  assert not (tmp_path / "out").exists()


# Exits are those of a decoder, self-distillation needs crops.
IMAGES = [name for name, make in RECIPES.items() if make()["objective"]["name"] not in ("exits", "self_distillation")]


@pytest.mark.slow
@pytest.mark.parametrize("method", IMAGES)
def test_every_method_of_the_default_config(method, tmp_path):
  """Two steps, or one for each phase, evaluation, and the smallest member extracted."""
  config = shrunken(method)
  with config.unlocked():
    config.space.pool = config.space.get("pool", ())[:2]
  assert runs.train(config, tmp_path / "run", show_progress=False)
  run, step, _ = runs.opened(tmp_path / "run")
  rows = report.read_rows(tmp_path / "run" / "subnets.json")
  assert step == config.train.steps and len(rows) == run.supernet.space.size
  smallest = str(run.supernet.space.smallest)
  assert extraction.extract_run(tmp_path / "run", tmp_path / "out", smallest)[1] == 0.0


@pytest.mark.parametrize("method", IMAGES)
def test_every_method_builds_at_full_size(method):
  """The config as it stands: names, sizes and pool go together; nothing is compiled."""
  run = build.build(cli.load_config(f"{DEFAULT}:{method}"))
  assert isinstance(run.supernet, Supernet) and run.steps == run.config["train"]["steps"]
  state = run.step.abstract()
  assert state.trained["model"]["patch"]["kernel"].shape[-1] == run.supernet.model.embed
  assert bool(jax.tree.leaves(state.trained["objective"])) == method.startswith("matryoshka")


def meshed(steps, **mesh):
  """A family of many members, each data shard drawing for itself."""
  config = shrunken("sorted", steps)
  with config.unlocked():
    config.model.update(head_dim=4, dtype="bfloat16")
    config.space.update(pool=(), groups=dict(heads=2, mlp=2))
    config.recipe.sampler.n = 1
    config.train.update(batch_size=16, per_shard_subnets=True, accumulate=2)
    config.mesh = mesh
  return config


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_is_extracted_to_one_device(tmp_path):
  """2 x 2 x 2 devices, then 2 x 4; rows and files are of one device."""
  workdir = tmp_path / "run"
  assert runs.train(meshed(2, data=2, fsdp=2, model=2), workdir, show_progress=False)
  before = runs.opened(workdir)[2].trained
  assert runs.train(meshed(3, data=2, fsdp=-1), workdir, show_progress=False)
  run, step, state = runs.opened(workdir)
  assert step == 3 and run.config["mesh"] == {"data": 2, "fsdp": 4}
  assert run.step.mesh.size == 1 and run.step.recipe.sampler.shards == 2
  saved = json.loads((workdir / "config.json").read_text())["changes"]
  assert saved == [{"mesh.fsdp": [2, 4], "mesh.model": [2, None], "train.steps": [2, 3]}]
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["model"], state.trained["model"])
  assert all(jax.tree.leaves(moved))
  rows = {row["subnet"]: row for row in json.loads((workdir / "subnets.json").read_text())}
  assert all(row["images"] == 3 * 16 and row["train_flops"] > 0 for row in rows.values())
  row, difference = extraction.extract_run(workdir, tmp_path / "out", next(iter(rows)))
  assert difference == 0.0 and row["accuracy"] == rows[row["subnet"]]["accuracy"]


def test_shards_that_draw_for_themselves_cannot_be_slices():
  config = meshed(2, data=2)
  config.train.execution = "slice"
  with pytest.raises(ValueError, match="per_shard_subnets needs train.execution=one_program"):
    runs.train(config, "nowhere")
