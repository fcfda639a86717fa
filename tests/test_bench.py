"""Measured cost of nesting: what is measured, of whom, against which bar, and what is written."""

import json
import sys

import jax
import pytest

from nestnet import Space, bench, bench_bed, bench_table, cost, errors, recipes
from nestnet.space import volume

SIZES = ["layers=1,embed=8,heads=2,mlp=16", "layers=2,embed=16,heads=2,mlp=16"]
SPACE = dict(layers=(1, 2), embed=(8, 16), heads=(2,), mlp=(16,))


def config(recipe, space, **model):
  return dict(
    seed=0, model=dict(name="ViT", layers=2, embed=16, heads=2, mlp=16, patch=4) | model,
    space=space, recipe=recipe, data=dict(name="digits", data_dir="", augment="none"),
    optim=dict(name="sgd", learning_rate=0.1), mesh=dict(data=1),
    train=dict(steps=2, batch_size=4, checkpoint_every=10, log_every=1, eval_every=0))


def plausible(row):
  return row["base_ms"] > 0 and 0 < row["lower"] <= row["median"] <= row["upper"]


@pytest.fixture(scope="module")
def bed():
  # Two members, so that little is compiled.
  space = dict(couple={"layers embed": ((1, 8), (2, 16))}, heads=(2,), mlp=(16,))
  return bench_bed.Bed(config(recipes.recipe("sandwich"), space), 8, 2)


@pytest.mark.slow
def test_every_size_and_joint_training_are_measured(tmp_path):
  space = SPACE | dict(pool=SIZES[::-1])
  found = bench.bench(config(recipes.recipe("sandwich"), space), batch_size=8, pairs=2, only=["slices"])
  bench_table.write(tmp_path / "bench.json", found)
  assert json.loads((tmp_path / "bench.json").read_text()) == found
  assert (found["batch_size"], found["pairs"], found["slices"]["joint"]["members"]) == (8, 2, SIZES)
  assert [row["subnet"] for row in found["slices"]["members"]] == SIZES
  assert all(map(plausible, (*found["slices"]["members"], found["slices"]["joint"])))
  text = bench_table.table(found)
  assert all(size in text for size in SIZES) and text.count("bar 1.05: ") == 2


@pytest.mark.slow
def test_a_config_of_another_objective_is_measured_by_labels():
  recipe = recipes.recipe("matryoshka", sizes=(4, 8))
  bed = bench_bed.Bed(config(recipe, {"features": (4, 8)}, features=8), 8, 1)
  assert [str(member) for member in bed.listed] == ["features=4", "features=8"]
  assert bed.run.config["recipe"]["objective"]["name"] == "classification"


@pytest.mark.slow
def test_the_batch_is_doubled_until_steps_are_long_enough(monkeypatch):
  times = iter((20.0, 45.0, 55.0))
  monkeypatch.setattr(bench_bed, "median_ms", lambda call: next(times))
  made = bench_bed.Bed(config(recipes.recipe("truncate"), SPACE), 0, 1)
  assert made.batch_size == 16 and len(made.batch["label"]) == 16


@pytest.mark.slow
def test_one_program_is_measured_against_the_faster_way_to_train_alone(bed):
  rows = bench.one_program(bed)
  smallest, largest = map(str, bed.spread)
  assert [row["subnet"] for row in rows] == [smallest, largest]
  for row in rows:
    assert plausible(row) and set(row["against"]) == {"plain", "remat"}
    assert row["against"][next(iter(row["against"]))] == row["median"]
  # A sandwich of a space of two members: the very same programs.
  steps = bench.sandwich(bed)
  assert len(steps) == bench.SANDWICHES and all(map(plausible, steps))
  assert all(row["members"][::3] == [largest, smallest] for row in steps)


@pytest.mark.slow
def test_one_program_serves_all_where_slices_take_one_each(bed):
  found = bench.compilation(bed)
  # A gradient for each member, or one; zeros; an update.
  assert (found["slice"]["programs"], found["one_program"]["programs"]) == (4, 3)
  assert all(row["seconds"] > 0 and row["members"] == 2 for row in found.values())


@pytest.mark.slow
def test_memory_counts_parameters_gradients_and_batch(bed):
  found = bench.memory(bed)
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(bed.state().trained))
  batch = sum(leaf.nbytes for leaf in jax.tree.leaves(bed.batch))
  for execution in ("slice", "one_program"):
    assert 2 * weights + batch < found[execution] < 50 * weights


@pytest.mark.slow
def test_utilisation_is_flops_of_the_batch_over_the_time_of_a_step(bed, monkeypatch):
  monkeypatch.setattr(bench, "matmul_peak", lambda dtype: {"float32": 1e9}[dtype.name])
  found = bench.utilisation(bed)
  image = jax.ShapeDtypeStruct((8, 8, 8, 1), "float32")
  assert found["step_flops"] == cost.flops(bed.run.supernet.model, image, train=True)
  for row in (found["alone"], found["one_program"]):
    assert row["share"] == pytest.approx(found["step_flops"] / (row["ms"] / 1e3) / 1e9)


def test_members_are_spread_over_the_range_of_cost():
  space = Space(layers=(2, 4, 6), embed=(16, 32, 64, 128), heads=(2, 4), mlp=(32, 64, 128),
                per_layer=("mlp",))
  members = bench_bed.spread(space, 20)
  assert len(set(members)) == 20 and (members[0], members[-1]) == (space.smallest, space.largest)
  volumes = [volume(member) for member in members]
  assert volumes == sorted(volumes)
  assert max(b / a for a, b in zip(volumes, volumes[1:])) < 2
  few = Space(layers=(1, 2), mlp=(4, 8))
  assert bench_bed.spread(few, 20) == list(few)


def test_verdicts_name_the_worst():
  rows = [dict(median=m, against=dict(plain=m, remat=m - 0.1)) for m in (1.0, 1.2, 1.4)]
  found = bench.verdicts(dict(one_program=rows, sandwich=rows, memory=dict(slice=10, one_program=11)))
  assert [(row["value"], row["bar"]) for row in found] == [(1.2, 1.15), (1.4, 1.3), (1.4, 1.1), (1.1, 1.2)]


@pytest.mark.parametrize("options, message", [
  (dict(only=["slice"]), "unknown part of the bench 'slice'; did you mean 'slices'"),
  (dict(peer="tensorflow"), "unknown peer 'tensorflow'. Allowed: torch"),
  (dict(batch_size=-1), "batch_size: got -1"), (dict(pairs=0), "pairs: got 0")])
def test_wrong_options_are_said_at_once(options, message):
  with pytest.raises(errors.UserError, match=message):
    bench.bench(config(recipes.recipe("truncate"), SPACE), **options)


def test_a_missing_peer_is_said_before_anything_runs(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.delitem(sys.modules, "nestnet.peers.torch_peer", raising=False)
  with pytest.raises(errors.UserError, match="needs PyTorch, which is not here: pip install torch==2.13.0"):
    bench.bench({}, peer="torch")
