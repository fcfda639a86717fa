"""Comparisons: which runs, at what budget, done once, and paired by seed."""

import json

import ml_collections
import pytest

from nestnet import build, compare, errors, evaluation, jobs, recipes, report, runs

SIZES = ("layers=1,embed=8,heads=2,mlp=16", "layers=2,embed=16,heads=2,mlp=16")


def config(name, steps=2, features=False, **options):
  sizes = (4, 16)
  space = {"features": sizes} if features else dict(
    layers=(1, 2), embed=(8, 16), heads=(2,), mlp=(16,), pool=SIZES)
  model = dict(name="ViT", layers=2, embed=16, heads=2, mlp=16, patch=4)
  return dict(
    seed=0, model=model | ({"features": 16} if features else {}), space=space,
    recipe=recipes.recipe(name, **options), data=dict(name="digits", data_dir="", augment="none"),
    optim=dict(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0),
    train=dict(steps=steps, batch_size=8, checkpoint_every=10, log_every=1, eval_every=0),
    mesh=dict(data=1))


def test_equal_flops_are_the_sum_of_the_separate_runs(tmp_path):
  names = ("separate", "truncate", "sandwich", "matformer_sampled")
  tasks = compare.plan([config(name, 200) for name in names], 2, tmp_path)
  assert len(tasks) == 2 * (2 + 3 * 2) and not any(task.done for task in tasks)
  for seed in (0, 1):
    alone = [t for t in tasks if t.recipe == "separate" and t.seed == seed]
    assert [t.sizes for t in alone] == [(size,) for size in SIZES]
    assert all(t.budgets == ("equal steps", "equal FLOPs") and t.steps == 200 for t in alone)
    for name in names[1:]:
      steps, flops = (next(t for t in tasks if (t.recipe, t.seed, t.budgets) == (name, seed, (b,)))
                      for b in ("equal steps", "equal FLOPs"))
      assert steps.steps == 200 and flops.sizes == SIZES
      # The planned count is the one that the run itself reports.
      assert evaluation.budget(build.build(flops.config), flops.steps)["train_flops"] == pytest.approx(
        sum(t.train_flops for t in alone), rel=0.01)
  assert len({task.workdir for task in tasks}) == len(tasks)


def test_equal_shares_of_the_first_nested_run(tmp_path):
  names = ("separate", "sandwich", "truncate")
  tasks = compare.plan([config(name, 200) for name in names], 1, tmp_path, ("equal steps", "equal shares"))
  (nested,) = (t for t in tasks if t.recipe == "sandwich")
  assert nested.budgets == ("equal steps", "equal shares") and nested.steps == 200
  alone = [t for t in tasks if t.recipe == "separate" and t.budgets == ("equal shares",)]
  assert [t.sizes for t in alone] == [(size,) for size in SIZES]
  for task in alone:
    assert task.train_flops == pytest.approx(nested.train_flops / len(SIZES), rel=0.01)
  assert len({task.workdir for task in tasks}) == len(tasks) == 2 * len(SIZES) + 2
  with pytest.raises(errors.UserError, match="equal shares.*0 and 1 configs"):
    compare.plan([config("separate")], 1, tmp_path, ("equal shares",))


def test_phases_that_are_shares_follow_the_budget(tmp_path):
  """Members of the pool taught by the whole network, which trains in the first phase."""
  shrinking = config("ofa", 200)
  shrinking["phases"] = recipes.phases("ofa", shrinking["space"])
  tasks = compare.plan([config("separate", 200), shrinking], 1, tmp_path)
  alone = sum(t.train_flops for t in tasks if t.recipe == "separate")
  steps, flops = (next(t for t in tasks if (t.recipe, t.budgets) == ("ofa", (b,)))
                  for b in ("equal steps", "equal FLOPs"))
  assert (steps.steps, flops.train_flops) == (200, pytest.approx(alone, rel=0.01)) and flops.steps < 200
  run = build.build(flops.config)
  assert evaluation.budget(run, flops.steps)["train_flops"] == pytest.approx(flops.train_flops)
  assert [phase.steps / flops.steps for phase in run.phases] == pytest.approx(
    [180 / 430, 125 / 430, 125 / 430], abs=0.01)
  # The folder is that of these steps: with others the phases would begin elsewhere.
  runs.settle(flops.config, tmp_path / "run")
  longer = flops.config | {"train": flops.config["train"] | {"steps": flops.steps + 1}}
  with pytest.raises(errors.UserError, match="train.steps"):
    runs.settle(longer, tmp_path / "run")


def test_budgets_of_equal_steps_share_a_run(tmp_path):
  # Joint training costs what the separate runs cost together.
  tasks = compare.plan([config("separate"), config("matformer_joint")], 1, tmp_path)
  assert [t.budgets for t in tasks] == 3 * [("equal steps", "equal FLOPs")]


@pytest.mark.slow
def test_members_that_no_recipe_trains_are_shown_of_nested_ones(tmp_path):
  """Evaluated from its checkpoint where a run was made before they were asked for."""
  mixed = "layers=2,embed=8,heads=2,mlp=16"
  plain = [config(name) for name in ("separate", "truncate")]
  more = [c | {"eval": {"members": (mixed.removeprefix("layers=2,"),)}} for c in plain]
  before, after = (compare.plan(configs, 1, tmp_path, ("equal steps",)) for configs in (plain, more))
  assert [task.workdir for task in before] == [task.workdir for task in after]
  assert {t.recipe: t.sizes[-1] for t in after} == {"separate": SIZES[1], "truncate": mixed}
  task = before[-1]
  assert jobs.run_task(task) and task.done and not after[-1].done
  alone = report.read_rows(task.workdir / "subnets.json")[0]
  assert jobs.run_task(after[-1]) and after[-1].done
  found = report.read_rows(task.workdir / "subnets.json")
  assert [row["subnet"] for row in found] == [*SIZES, mixed] and found[0]["accuracy"] == alone["accuracy"]
  assert found[0]["seconds"] >= alone["seconds"]
  with pytest.raises(errors.UserError, match="config.eval.members: .*embed=9"):
    compare.plan([plain[0] | {"eval": {"members": ("embed=9",)}}], 1, tmp_path)


def test_nested_recipes_show_the_same_members(tmp_path):
  made = lambda name, *members: config(name) | {"eval": {"members": members}}
  call = lambda *configs: compare.plan(configs, 1, tmp_path, ("equal steps",))
  # As texts may differ that mean the same; `separate` shows none.
  assert len(call(config("separate"), made("truncate", "embed=8"), made("sandwich", "layers=2,embed=8"))) == 4
  for other in (config("sandwich"), made("sandwich", "layers=1,embed=16")):
    with pytest.raises(errors.UserError, match="sandwich differ in config.eval.members: .*embed=8"):
      call(made("truncate", "embed=8"), other)


def test_more_seeds_keep_the_runs_that_are_there(tmp_path):
  configs = [config("separate"), config("sandwich")]
  two, three = ({t.workdir: t for t in compare.plan(configs, n, tmp_path)} for n in (2, 3))
  assert two.items() <= three.items() and {t.seed for w, t in three.items() if w not in two} == {2}


@pytest.mark.slow
def test_missing_runs_only_are_done_and_seeds_are_paired(tmp_path):
  configs = [config("separate"), config("truncate")]
  call = lambda n: compare.compare(configs, 2, tmp_path, ("equal steps",), None, n, "the command")
  tables = call(min(2, len(jobs.cores())))
  tasks = compare.plan(configs, 2, tmp_path, ("equal steps",))
  written = {t.workdir: (t.workdir / "subnets.json").stat().st_mtime_ns for t in tasks}
  assert len(tasks) == 2 * (2 + 1) and all(task.done for task in tasks)

  records = json.loads((tmp_path / "results.json").read_text())["results"]
  assert {(r["recipe"], r["subnet"]) for r in records} == {
    (name, size) for name in ("separate", "truncate") for size in SIZES}
  for record in records:
    assert record["seeds"] == [0, 1] and record["steps"] == [2, 2]
    for seed, accuracy in zip(record["seeds"], record["accuracy"]):
      task = next(t for t in tasks if t.recipe == record["recipe"] and t.seed == seed
                  and record["subnet"] in t.sizes)
      row = next(r for r in report.read_rows(task.workdir / "subnets.json")
                 if r["subnet"] == record["subnet"])
      assert (row["seed"], row["accuracy"]) == (seed, accuracy)
  # Trained alone, the whole network is what truncation cuts: the same seeds give the same network.
  whole = {r["recipe"]: r["accuracy"] for r in records if r["subnet"] == SIZES[1]}
  assert whole["separate"] == whole["truncate"]
  assert "the command" in (tmp_path / f"{tmp_path.name}.md").read_text()

  again = tasks[1].workdir
  (again / "done").unlink()
  assert call(1) == tables
  assert {w for w in written if (w / "subnets.json").stat().st_mtime_ns != written[w]} == {again}

  other = [c | {"optim": c["optim"] | {"learning_rate": 0.2}} for c in configs]
  with pytest.raises(errors.UserError, match="learning_rate: 0.1 there, 0.2 asked for"):
    compare.compare(other, 2, tmp_path, ("equal steps",))


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
  bad = config("truncate")
  bad["optim"] = bad["optim"] | {"learning_rate": 1e30}
  bad["train"]["log_every"] = 1
  with pytest.raises(errors.Failure, match=r"(?s)1 of 3 runs failed.*truncate.*step \d: loss is"):
    compare.compare([bad, config("separate")], 1, tmp_path, ("equal steps",))
  tasks = compare.plan([bad, config("separate")], 1, tmp_path, ("equal steps",))
  assert {t.recipe: t.done for t in tasks} == {"separate": True, "truncate": False}


def test_runs_that_failed_by_mistakes_of_the_user_only_are_a_mistake_of_the_user(tmp_path):
  task, _ = compare.plan([config("separate")], 1, tmp_path, ("equal steps",))
  task.workdir.mkdir(parents=True)
  (task.workdir / "thesis.txt").write_text("years of work")
  with pytest.raises(errors.UserError, match="(?s)1 of 1 runs failed.*is not empty"):
    jobs.train_all([task])


def test_the_baseline_of_matryoshka_is_trained_alone_at_each_number_of_features(tmp_path):
  own = [config("separate", features=True), config("matryoshka", sizes=(4, 16), features=True)]
  tasks = compare.plan([config("separate"), *own], 1, tmp_path)
  assert [(t.recipe, t.sizes) for t in tasks] == [
    ("separate", (SIZES[0],)), ("separate", (SIZES[1],)), ("separate", ("features=4",)),
    ("separate", ("features=16",)), ("matryoshka", ("features=4", "features=16"))] + [
    ("matryoshka", ("features=4", "features=16"))] * (len(tasks) - 5)
  model = build.build(tasks[2].config).supernet.model
  assert (model.features, model.embed) == (4, 16)


def test_the_page_has_a_table_for_each_family_and_budget_with_every_cell(tmp_path):
  configs = [config(n, features=f, **({"sizes": (4, 16)} if n == "matryoshka" else {})) for n, f in (
    ("separate", False), ("truncate", False), ("separate", True), ("matryoshka", True))]
  tasks = compare.plan(configs, 2, tmp_path)
  for task in tasks:
    lift = 0.02 if task.recipe in ("truncate", "matryoshka") else 0.0
    report.write_rows(task.workdir / "subnets.json", [
      dict(subnet=size, params=100 * task.family.index(size) + 100, flops=10, seconds=1.0,
           accuracy=0.5 + 0.1 * task.seed + lift, validation_accuracy=0.5, steps=task.steps,
           train_flops=task.train_flops) for size in task.sizes])
  page = tmp_path / "results" / "tiny.md"
  compare.write_page(page, compare.gather(tasks), tasks, 1, "the command")
  text = page.read_text()
  # In each of two families and budgets: accuracies, then differences, whose seeds cancel.
  for size in (*SIZES, "features=4", "features=16"):
    assert text.count(f"| {size} |") == 4
  assert text.count("**+2.0** ± 0.0") == 8 and "| - |" not in text and text.count("### ") == 8
  assert (page.parent / "tiny.png").exists() and (page.parent / "tiny_features.png").exists()


def test_the_page_names_the_axes_of_all_stages_once(tmp_path):
  sizes = tuple(f"layers_1={n},layers_2={n},expand_1=2,expand_2={n}" for n in (1, 2))
  config = dict(data={"name": "digits"}, train={"batch_size": 8}, model={"name": "M"}, optim={"name": "sgd"})
  tasks = [jobs.Task("ofa", ("equal steps",), 0, sizes, sizes, config, tmp_path / "run", 1.0)]
  report.write_rows(tmp_path / "run" / "subnets.json", [
    dict(subnet=size, params=100 * n, flops=10, seconds=1.0, accuracy=0.5, validation_accuracy=0.5, steps=2,
         train_flops=1.0) for n, size in enumerate(sizes, 1)])
  records = compare.gather(tasks, ("equal steps",))
  assert [record["subnet"] for record in records] == list(sizes)
  compare.write_page(tmp_path / "page.md", records, tasks, 1, "")
  text = (tmp_path / "page.md").read_text()
  assert "## Sizes along layers, expand\n" in text
  assert "| layers=1,expand_1=2,expand_2=1 |" in text and "| layers=2,expand=2 |" in text


@pytest.mark.parametrize("configs, budgets, message", [
  (["truncate"], compare.USUAL, "equal FLOPs are those of the recipe 'separate'"),
  (["truncate", "truncate"], ("equal steps",), "each recipe is compared once"),
  (["truncate"], ("equal time",), "unknown budget 'equal time'"),
])
def test_what_cannot_be_compared(tmp_path, configs, budgets, message):
  with pytest.raises(errors.UserError, match=message):
    compare.plan([config(name) for name in configs], 1, tmp_path, budgets)


def test_recipes_must_share_what_they_train(tmp_path):
  with pytest.raises(errors.UserError, match=r"differ in config.train.steps: 2 and 3"):
    compare.plan([config("separate"), config("sandwich", 3)], 1, tmp_path)


def test_jobs_are_at_most_the_cores():
  with pytest.raises(errors.UserError, match="jobs: got 0, allowed is 1 to"):
    jobs.train_all([], jobs=0)


@pytest.mark.parametrize("text, key, value", [
  ("a.n=3", "n", 3), ("a.x=1e-3", "x", 1e-3), ("a.flag=false", "flag", False),
  ("a.sizes=(4, 8)", "sizes", (4, 8)), ("a.name=b=c", "name", "b=c"), ("a.n=0x10", "n", 16),
  ("a.sizes=4", "sizes", (4,)), ("a.pool=layers", "pool", ("layers",)),
  ("a.pool=('n=2,m=3', 'n=1')", "pool", ("n=2,m=3", "n=1"))])
def test_overrides(text, key, value):
  made = overridable()
  compare.override(made, text)
  assert made.a[key] == value and type(made.a[key]) is type(value)


@pytest.mark.parametrize("text", [
  "a.n", "a.n=", "a.n=1.5", "a.n=0xg", "a.m=1", "a.pool=n=2,m=3", "a.sizes=((", "a=3", "a={'n':",
  "a.none=3", "a.list=[2]"])
def test_overrides_that_are_none(text):
  made = overridable()
  with pytest.raises(errors.UserError):
    compare.override(made, text)
  assert made == overridable()


def overridable():
  return ml_collections.ConfigDict(dict(a=dict(
    n=1, x=1.0, flag=True, sizes=(1,), name="", pool=("n=1",), none=None, list=[1]))).lock()
