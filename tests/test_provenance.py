"""What has trained, said of the phases that have run and of nothing else."""

from __future__ import annotations

import pytest

from nestnet import Space, build, provenance, recipes, sampling

SPACE = {"layers": (6, 7), "mlp": (8, 16, 24), "embed": (8,), "heads": (2,), "per_layer": ("mlp",),
         "pool": ("layers=6,mlp=8", "layers=7,mlp=24")}
# Epochs of Once-for-All: the whole network, depths, some widths, all widths.
ENDS = 180, 305, 330, 455


def built(name, whole=None):
  recipe = recipes.recipe(name)
  if whole is not None:
    recipe["sampler"]["whole"] = whole
  return build.build({
    "seed": 0, "model": {"name": "ViT", "layers": 7, "embed": 8, "heads": 2, "mlp": 24, "patch": 4},
    "space": SPACE, "recipe": recipe, "phases": recipes.phases(name, SPACE),
    "data": {"name": "digits", "data_dir": "", "augment": "none"}, "mesh": {"data": 1},
    "optim": {"name": "sgd", "learning_rate": 0.1},
    "train": {"steps": ENDS[-1], "batch_size": 8, "checkpoint_every": 10, "log_every": 1, "eval_every": 0}})


def test_phases_that_have_not_run_count_for_nothing():
  run = built("ofa", whole=True)
  text = lambda spec: str(run.supernet.space.subnet(spec))
  largest, shallow = text("largest"), text("layers=6")
  assert provenance.trained(run, 0) == []
  assert provenance.trained(run, 1) == provenance.trained(run, ENDS[0]) == [largest]
  assert set(provenance.trained(run, ENDS[1])) == {largest, shallow}
  assert provenance.trained(run, ENDS[2]) == "members with mlp=16|24"
  assert provenance.trained(run, ENDS[3]) == "the whole space"
  # A few steps after the widths opened, each that trained can still be named.
  few = provenance.trained(run, ENDS[1] + 2)
  assert set(few) > {largest, shallow} and 2 < len(few) <= 10
  assert [provenance.whole(run, steps) for steps in (0, 180, 181, 455)] == [False, False, True, True]
  assert [provenance.unfinished(run, steps) for steps in (1, 180, 305, 330, 455)] == [
    "the run is not finished: step 1 of 455, phase 1 of 4; only the largest has trained",
    "the run is not finished: step 180 of 455, phase 1 of 4; only the largest has trained",
    "the run is not finished: step 305 of 455, phase 2 of 4; only 2 sub-networks have trained",
    "the run is not finished: step 330 of 455, phase 3 of 4; what has trained: members with mlp=16|24", ""]


def test_a_pool_is_told_from_the_whole():
  run = built("ofa", whole=False)
  # In the last phase only the pool trains; its largest is among those that are open before.
  assert provenance.trained(run, ENDS[3]) == f"members with mlp=16|24; {run.supernet.space.smallest}"
  assert not provenance.whole(run, ENDS[3])


@pytest.mark.parametrize("name, found", [("truncate", ["largest"]), ("sandwich", ["largest", "smallest"])])
def test_runs_of_one_phase(name, found):
  run = built(name)
  space = run.supernet.space
  assert set(provenance.trained(run, 455)) == {str(space.subnet(word)) for word in found}
  assert provenance.unfinished(run, 3).startswith("the run is not finished: step 3 of 455; only ")
  assert provenance.unfinished(run, 455) == ""


def test_members_of_each_data_shard_count():
  space = Space(mlp=tuple(range(1, 40)))
  shards = [sampling.sampler("uniform", space, seed, n=2) for seed in (0, 1)]
  both = provenance._few(sampling.on_shards(shards), 0, 3)
  assert set(both) == {m for s in shards for m in provenance._few(s, 0, 3)} and len(both) > 6
