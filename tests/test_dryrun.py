"""What a step is said to need equals what it is made of, on 8 devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import build, cost, dryrun, evaluation, hlo, recipes, tpus
from nestnet.sharding import put_batch

pytestmark = pytest.mark.slow

CHIP = tpus.Chip(hbm=2**30, flops=1e12, bandwidth=1e11, link=1e9, ring=8, slices=("8",))
RING = tpus.Topology("test:8", CHIP, (8,))
SMALL, LARGE = ("layers=1,embed=8,heads=2,mlp=16", "layers=2,embed=16,heads=2,mlp=16")
BATCH = 16


def config(method="sandwich", optim="adamw", **recipe):
  made = recipes.recipe(method) | recipe
  if method == "sandwich":
    made["sampler"] |= {"random": 1}
  return dict(
    seed=0, model=dict(name="ViT", layers=2, embed=16, heads=2, mlp=16, patch=4),
    space=dict(layers=(1, 2), embed=(8, 16), heads=(2,), mlp=(16,), pool=(SMALL, LARGE)), recipe=made,
    data=dict(name="nowhere", shape=(8, 8, 1), classes=10), optim=dict(name=optim, learning_rate=0.1),
    mesh=dict(data=8),
    train=dict(steps=2, batch_size=BATCH, checkpoint_every=10, log_every=1, eval_every=0))


@pytest.fixture(scope="module")
def sandwich():
  said = []
  found = dryrun.compile_config(config(), RING, jax.devices(), say=said.append)
  return found, said


def tree_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_each_program_of_a_step_is_there_once(sandwich):
  found, said = sandwich
  rows = {(row["kind"], *row["subnets"]): row for row in found["programs"]}
  assert set(rows) == {("gradient", LARGE), ("gradient", SMALL), ("update",)}
  assert len(found["programs"]) >= 3 and sum(row["runs"] for row in found["programs"]) == 4
  assert len(said) == len(found["programs"])
  assert [m["subnet"] for m in found["subnets"]] == [LARGE, SMALL]


def test_flops_are_those_of_the_networks_passes(sandwich):
  found, _ = sandwich
  (phase,), _ = build.planned(config(), jax.devices())
  total = sum(row["runs"] * row["flops"] for row in found["programs"]) * found["chips"]
  assert total == evaluation.step_flops(phase.step)(0) * BATCH


def test_memory_by_kind(sandwich):
  """Of arrays whose sizes are known: nothing is padded on CPU."""
  found, _ = sandwich
  (phase,), batch = build.planned(config(), jax.devices())
  state, share = phase.step.abstract(), tree_bytes(batch) // 8
  params = tree_bytes(state.trained)
  for row in found["programs"]:
    memory = row["memory"]
    assert memory["total"] == (memory["arguments"] + memory["outputs"] - memory["aliased"]
                               + memory["temporaries"] + memory["program"] + memory["beside"])
    if row["kind"] == "gradient":
      # The optimizer's state waits; of the sums every byte comes back in its place.
      assert memory["beside"] == tree_bytes(state.opt_state)
      assert memory["arguments"] >= 2 * params + share and memory["aliased"] >= params
    else:
      assert memory["beside"] == share
      assert memory["arguments"] >= params + params + tree_bytes(state.opt_state)


def test_gradients_are_summed_over_the_chips_and_updates_are_not(sandwich):
  found, _ = sandwich
  sizes = {m["subnet"]: 4 * m["params"] for m in found["subnets"]}
  for row in found["programs"]:
    sums = [c for c in row["collectives"] if c["kind"] == "all-reduce"]
    if row["kind"] == "update":
      assert row["collectives"] == [] and row["seconds"]["network"] == 0
    else:
      assert all(c["devices"] == 8 for c in sums)
      assert sum(c["count"] * c["bytes"] for c in sums) >= sizes[row["subnets"][0]]


def test_the_bound_is_the_slowest_resource(sandwich):
  found, _ = sandwich
  for row in found["programs"]:
    assert row["seconds"]["compute"] == row["flops"] / CHIP.flops
    assert row["seconds"]["memory"] == row["traffic"] / CHIP.bandwidth
    assert row["seconds"][row["bound"]] == max(row["seconds"].values())


def test_a_fixed_list_is_one_program_and_need_not_fit(sandwich):
  assert all(row["fits"] for row in sandwich[0]["programs"])
  tight = tpus.Topology("test:8", dataclasses.replace(CHIP, hbm=1000), (8,))
  found = dryrun.compile_config(config("matformer_joint"), tight, jax.devices())
  (row,) = found["programs"]
  assert (row["kind"], row["runs"], set(row["subnets"])) == ("step", 1, {SMALL, LARGE})
  assert row["memory"]["beside"] == 0 and row["memory"]["total"] > 1000 and not row["fits"]


@pytest.mark.slow
def test_the_largest_is_planned_though_the_first_step_does_not_draw_it():
  drawn = config("matformer_sampled")
  drawn["recipe"]["sampler"] |= {"members": (SMALL, LARGE), "probabilities": (1.0, 0.0)}
  found = dryrun.compile_config(drawn, RING, jax.devices())
  runs = {tuple(row["subnets"]): row["runs"] for row in found["programs"] if row["kind"] == "gradient"}
  assert runs == {(SMALL,): 1, (LARGE,): 0}


@pytest.mark.slow
def test_teachers_candidates_and_members_asked_for_have_programs():
  made = config(teacher="ema")
  made["recipe"]["sampler"] |= {"random": 1, "candidates": 2}
  other = "layers=2,embed=8,heads=2,mlp=16"
  found = dryrun.compile_config(made, RING, jax.devices(), [other])
  kinds = [row["kind"] for row in found["programs"]]
  assert kinds[0] == "teacher" and kinds[-1] == "update" and "loss" in kinds
  assert found["programs"][0]["subnets"] == [LARGE]
  assert [(row["kind"], row["taught"]) for row in found["programs"] if row["runs"] == 0] == [
    ("gradient", True)]
  assert other in [m["subnet"] for m in found["subnets"]]


@pytest.mark.parametrize("options", [{}, {"teacher": "ema", "untouched": "freeze"}])
@pytest.mark.slow
def test_what_is_planned_is_what_runs(options):
  """The same programs with the same shapes, types and layouts, in the same order."""
  (phase,), batch = build.planned(config(**options), jax.devices())
  step, terms = phase.step, phase.step.recipe.sampler.terms(0)
  planned, ran = [], []

  def note(where, program, arguments):
    leaves = jax.tree.leaves(arguments)
    where.append((program.kind, program.members, program.call, [
      (jnp.shape(x), jnp.result_type(x)) for x in leaves], [getattr(x, "sharding", None) for x in leaves]))

  def abstractly(program, *arguments):
    note(planned, program, arguments)
    lowered = program.call.lower(*arguments)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        lowered.out_info, lowered.compile().output_shardings)

  def really(program, *arguments):
    note(ran, program, arguments)
    return program.call(*arguments)

  step.programs(terms, batch, abstractly)
  state = step.init()
  real = put_batch({k: np.zeros(v.shape, v.dtype) for k, v in batch.items()}, step.mesh)
  jax.block_until_ready(step._make(terms, state, real, step._start(state.trained), really))
  for one, other in zip(planned, ran, strict=True):
    assert one[:4] == other[:4]
    for (shape, _), wanted, got in zip(one[3], one[4], other[4], strict=True):
      # The key of randomness comes from one device.
      if wanted is not None and len(got.device_set) > 1:
        assert wanted.is_equivalent_to(got, len(shape))


def test_the_images_need_not_be_there():
  made = config()
  _, batch = build.planned(made, jax.devices())
  assert {k: v.shape for k, v in batch.items()} == {"image": (BATCH, 8, 8, 1), "label": (BATCH,)}
  del made["data"]["shape"]
  with pytest.raises(ValueError, match="unknown data set 'nowhere'"):
    build.planned(made, jax.devices())


@pytest.mark.parametrize("kind, factor", [
  ("all-reduce", 2 * 15 / 16), ("all-gather", 15 / 16), ("reduce-scatter", 15 / 16),
  ("all-to-all", 15 / 16), ("collective-permute", 1.0)])
def test_network_time_of_a_ring(kind, factor):
  """16 chips along an axis that closes to a ring send over two links."""
  places = [(x, y, 0) for x in range(16) for y in range(16)]
  collective = hlo.Collective(kind, 10**9, (tuple(range(16)),))
  found = dryrun.network_seconds(collective, places, tpus.topology("v5e:16x16"))
  assert found == pytest.approx(factor * 1e9 / 90e9)


@pytest.mark.slow
def test_members_of_every_shard_count_with_their_own_share():
  """Each on its part of the batch, its layers' forward pass twice: once to go back through them."""
  made = config("sorted") | {"mesh": dict(data=4)}
  made["train"] |= {"per_shard_subnets": True}
  made["recipe"]["sampler"] |= {"n": 1}
  found = dryrun.compile_config(made, tpus.Topology("test:4", CHIP, (4,)), jax.devices()[:4])
  (row,) = [row for row in found["programs"] if row["kind"] == "gradient" and row["runs"]]
  assert len(row["subnets"]) == 4 and set(row["subnets"]) == {SMALL, LARGE}
  passes = {m["subnet"]: cost_of(m["subnet"]) for m in found["subnets"]}
  least = sum(passes[name] for name in row["subnets"]) * BATCH / 4 / 4
  assert 1.2 * least < row["flops"] < 4 / 3 * least


def cost_of(name):
  (phase,), _ = build.planned(config(), jax.devices())
  supernet = phase.step.supernet
  return cost.flops(supernet.module(supernet.space.subnet(name)), *supernet.inputs, train=True)
