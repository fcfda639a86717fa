"""Search in a trained run, through its command line."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from nestnet import cli, errors, evaluation, predict, report, runs, search_run
from nestnet.data import load

DEFAULT = pathlib.Path(__file__).resolve().parents[1] / "configs" / "digits_vit.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prepared_data):
  load("digits")
  workdir = tmp_path_factory.mktemp("runs") / "digits_vit"
  config = cli.load_config(str(DEFAULT))
  with config.unlocked():
    config.model.update(layers=2, embed=16, heads=4, mlp=16, patch=4, head_dim=4)
    config.train.update(steps=4, batch_size=8, log_every=1)
    config.space.update(layers=(1, 2), embed=(8, 16), heads=(4,), mlp=(16,),
                        pool=("layers=1,embed=8", "layers=2,embed=16"))
    config.optim.warmup_steps = 1
  assert runs.train(config, workdir, show_progress=False)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("method", search_run.METHODS)
def test_the_result_is_the_best_that_fits(finished, tmp_path, method):
  run, step, state = runs.opened(finished)
  space = run.supernet.space
  rows = evaluation.evaluate(run, state, space, splits=("validation",))
  limit = sorted(row["flops"] for row in rows)[2]
  result = search_run.search_run(finished, tmp_path, {"flops": limit}, method, beyond_pool=True, population=8)
  best = max(row["validation_accuracy"] for row in rows if row["flops"] <= limit)
  assert result["row"]["validation_accuracy"] == best and result["row"]["flops"] <= limit
  assert result["members_looked_at"] == 3 and result["accuracy"] == "measured" and result["step"] == step
  assert all(row["flops"] <= limit for row in result["found"])
  if method == "nsga2":
    front = report.pareto([r for r in rows if r["flops"] <= limit], "flops", "validation_accuracy")
    assert [r["subnet"] for r in result["found"]] == [r["subnet"] for r in front]
  assert json.loads((tmp_path / "search.json").read_text()) == result
  assert result["subnet"] in (tmp_path / "search.md").read_text()
  assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  # Nothing is evaluated twice.
  lines = (finished / f"members_{step}.jsonl").read_text().splitlines()
  assert len({json.loads(line)["subnet"] for line in lines}) == len(lines) == 3


def changed(finished, workdir, **sampler):
  """The same run, as if its sampler had had other options."""
  shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("members_*"))
  saved = json.loads((workdir / "config.json").read_text())
  saved["config"]["recipe"]["sampler"].update(sampler)
  (workdir / "config.json").write_text(json.dumps(saved))
  return workdir


@pytest.mark.slow
def test_where_only_the_pool_trained_it_is_not_left_and_that_is_said(finished, tmp_path, capsys):
  result = search_run.search_run(finished, tmp_path / "out", {"params": 1e9})
  pool = runs.opened(finished)[0].supernet.space.pool
  assert result["members_looked_at"] == len(pool) and result["subnet"] in map(str, pool)
  scope = "only the 2 members of space.pool, of 4; --beyond_pool searches all"
  assert f"searched: {scope}" in (tmp_path / "out" / "search.md").read_text()
  with pytest.raises(errors.UserError, match=f"the cheapest: params .*{scope}"):
    search_run.search_run(finished, tmp_path / "out", {"params": 1})
  # Refused before anything is evaluated.
  fresh = changed(finished, tmp_path / "fresh")
  with pytest.raises(errors.UserError, match=f"there are 2: {scope}. Allowed: --accuracy=measured"):
    search_run.search_run(fresh, tmp_path / "out", {"params": 1e9}, accuracy="predicted")
  assert not list(fresh.glob("members_*"))


@pytest.mark.slow
def test_where_the_whole_space_trained_it_is_searched(finished, tmp_path, capsys):
  workdir = changed(finished, tmp_path / "run", whole=True)
  result = search_run.search_run(workdir, tmp_path / "out", {"params": 1e9})
  assert result["members_looked_at"] == 4 and result["searched"] == "all members, 4"
  assert "evaluate 4/4 " in capsys.readouterr().err
  search_run.search_run(workdir, tmp_path / "out", {"params": 1e9}, show_progress=False)
  assert capsys.readouterr().err == ""


def test_what_is_not_finite_is_null():
  assert search_run._json({"a": [float("nan"), 1.5, {"b": -float("inf")}], "c": "x", "d": None}) == {
    "a": [None, 1.5, {"b": None}], "c": "x", "d": None}


@pytest.mark.slow
def test_latency_is_a_budget_and_its_table_is_kept(finished, tmp_path):
  result = search_run.search_run(finished, tmp_path, {"latency_ms": 1e6}, beyond_pool=True)
  assert result["members_looked_at"] == 4 and result["row"]["latency_ms"] > 0
  table = (finished / "latency.json").read_text()
  again = search_run.search_run(finished, tmp_path, {"latency_ms": 1e6}, beyond_pool=True)
  assert again["row"] == result["row"] and (finished / "latency.json").read_text() == table
  with pytest.raises(errors.UserError, match="latency_ms of at most 1e-09; the cheapest: latency_ms "):
    search_run.search_run(finished, tmp_path, {"latency_ms": 1e-9}, beyond_pool=True)


@pytest.mark.slow
def test_a_predictor_is_judged_on_members_it_did_not_learn_and_its_best_are_measured(
    finished, tmp_path_factory, tmp_path):
  run, _, _ = runs.opened(finished)
  config = cli.load_config(str(DEFAULT))
  with config.unlocked():
    config.update(run.config)
    config.space.update(layers=(1, 2), embed=(8, 16), mlp=(4, 8, 12, 16), per_layer=("mlp",), pool=())
  workdir = tmp_path_factory.mktemp("runs") / "many"
  assert runs.train(config, workdir, show_progress=False)
  result = search_run.search_run(workdir, tmp_path, {"params": 2600}, accuracy="predicted", samples=30,
                                 population=8, generations=3, seed=5)
  run, step, state = runs.opened(workdir)
  space = run.supernet.space
  members = predict.drawn(space, 30, 5)
  known = {row["subnet"]: row["validation_accuracy"] for row in map(
    json.loads, (workdir / f"members_{step}.jsonl").read_text().splitlines())}
  accuracies = [known[str(m)] for m in members]
  made = predict.train(space, members[6:], accuracies[6:], 5)
  assert result["predictor"] == predict.quality(made(members[:6]), accuracies[:6]) | {
    "held_out": 6, "learned_from": 24}
  # Found are the best by prediction, with what they were taken for, and measured.
  found = [row["subnet"] for row in result["found"]]
  assert len(set(found)) == search_run.VERIFIED and all(row["params"] <= 2600 for row in result["found"])
  taken_for = [row["searched_accuracy"] for row in result["found"]]
  np.testing.assert_allclose(taken_for, made([space.subnet(text) for text in found]), rtol=1e-5)
  assert taken_for == sorted(taken_for, reverse=True)
  assert result["row"]["validation_accuracy"] == max(row["validation_accuracy"] for row in result["found"])
  assert "Kendall's tau" in (tmp_path / "search.md").read_text()
