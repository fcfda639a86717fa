"""Measured cost of slices: what is paired, in which order, and what is written."""

import json

import pytest

from nestnet import bench, errors, recipes

SIZES = ["layers=1,embed=8,heads=2,mlp=16", "layers=2,embed=16,heads=2,mlp=16"]


class Clock:
  """Calls take time by this clock only."""

  def __init__(self):
    self.seconds, self.calls = 0.0, []

  def __call__(self):
    return self.seconds

  def call(self, name, seconds):
    def run():
      self.calls.append(name)
      self.seconds += seconds[min(self.calls.count(name) - 1, len(seconds) - 1)]
    return run


def test_pairs_are_interleaved_and_the_first_alternates():
  clock = Clock()
  bench.ratio(clock.call("own", [1.0]), [clock.call("a", [1.0]), clock.call("b", [1.0])], 3, clock)
  assert clock.calls == ["own", "a", "b"] * 3 + ["own", "a", "b", "a", "b", "own", "own", "a", "b"]


def test_ratios_are_taken_pair_by_pair():
  clock = Clock()
  # After three calls to warm up. The machine is twice as slow in the second pair: no ratio changes.
  own, base = clock.call("own", [9, 9, 9, 1.5, 3.0, 1.5]), clock.call("base", [7, 7, 7, 1.0, 2.0, 1.0])
  found = bench.ratio(own, base, 3, clock)
  assert (found.lower, found.median, found.upper) == (1.5, 1.5, 1.5)
  assert (found.own_ms, found.base_ms) == (1500, 1000)
  with pytest.raises(errors.UserError, match="pairs: got 0"):
    bench.ratio(own, base, 0)


def config(recipe, space, **model):
  return dict(
    seed=0, model=dict(name="ViT", layers=2, embed=16, heads=2, mlp=16, patch=4) | model,
    space=space, recipe=recipe, data=dict(name="digits", data_dir="", augment="none"),
    optim=dict(name="sgd", learning_rate=0.1), mesh=dict(data=1),
    train=dict(steps=2, batch_size=4, checkpoint_every=10, log_every=1, eval_every=0))


def test_every_size_and_joint_training_are_measured(tmp_path):
  space = dict(layers=(1, 2), embed=(8, 16), heads=(2,), mlp=(16,), pool=SIZES[::-1])
  found = bench.bench(config(recipes.recipe("sandwich"), space), batch_size=8, pairs=2)
  bench.write(tmp_path / "bench.json", found)
  assert json.loads((tmp_path / "bench.json").read_text()) == found
  assert (found["batch_size"], found["pairs"], found["joint"]["members"]) == (8, 2, SIZES)
  assert [row["subnet"] for row in found["slices"]] == SIZES
  for row in (*found["slices"], found["joint"]):
    assert row["base_ms"] > 0 and 0 < row["lower"] <= row["median"] <= row["upper"]
  text = bench.table(found)
  assert all(size in text for size in SIZES) and text.count("bar 1.05: ") == 2


def test_a_config_of_another_objective_is_measured_too():
  recipe = recipes.recipe("matryoshka", sizes=(4, 8))
  found = bench.bench(config(recipe, {"features": (4, 8)}, features=8), batch_size=8, pairs=1)
  assert [row["subnet"] for row in found["slices"]] == ["features=4", "features=8"]
