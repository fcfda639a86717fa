"""What is read from compiled programs equals what was written: collectives, loops, bytes of memory."""

from __future__ import annotations

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import pytest

from nestnet import hlo

N = 64


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def spec(mesh, *axes, shape=(N, N), dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def work(function, *arguments):
  return hlo.work(jax.jit(function).lower(*arguments).compile().as_text())


def over(mesh, function, inputs, outputs):
  return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


WHOLE = N * N * 4
DATA = tuple((k, k + 2, k + 4, k + 6) for k in range(2))
MODEL = tuple((k, k + 1) for k in range(0, 8, 2))


@pytest.mark.parametrize("kind, size, groups, function, inputs, outputs", [
  ("all-reduce", WHOLE, DATA, lambda x: lax.psum(x, "data"), P(), P()),
  ("all-reduce", WHOLE // 2, MODEL, lambda x: lax.psum(x, "model"), P("model"), P()),
  ("all-reduce", WHOLE, (tuple(range(8)),), lambda x: lax.psum(x, ("data", "model")), P(), P()),
  ("all-gather", WHOLE, DATA, lambda x: lax.all_gather(x, "data", tiled=True), P("data"), P()),
  ("reduce-scatter", WHOLE, MODEL, lambda x: lax.psum_scatter(x, "model", tiled=True), P(), P("model")),
  ("all-to-all", WHOLE // 4, DATA, lambda x: lax.all_to_all(x, "data", 1, 0, tiled=True), P("data"),
   P("data")),
  ("collective-permute", WHOLE // 2, ((0, 1), (2, 3), (4, 5), (6, 7)),
   lambda x: lax.ppermute(x, "model", [(0, 1)]), P("model"), P("model")),
])
def test_a_collective_of_known_size(mesh, kind, size, groups, function, inputs, outputs):
  found = work(over(mesh, function, inputs, outputs), spec(mesh, *inputs))
  (collective,) = found.collectives
  assert (collective.kind, collective.bytes, collective.count) == (kind, size, 1)
  # Pairs of devices may be listed in any order.
  assert sorted(collective.groups) == sorted(groups)


def test_the_partitioner_s_own_collectives_are_found():
  """A product whose contracted dimension is sharded ends in one sum over the shards."""
  mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
  product = jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P()))
  found = work(product, spec(mesh, None, "model"), spec(mesh, "model", None))
  assert [(c.kind, c.bytes, len(c.groups[0]), c.count) for c in found.collectives] == [
    ("all-reduce", WHOLE, 8, 1)]


def test_nothing_is_found_where_nothing_is_sharded(mesh):
  assert work(lambda x: x @ x, spec(mesh)).collectives == ()


def test_collectives_in_loops_count_as_often_as_the_loops_run(mesh):
  def inner(x, _):
    return lax.psum(x, "data") * 0.5, None

  def outer(x, _):
    return lax.scan(inner, lax.psum(x, "model"), length=3)[0], None

  found = work(over(mesh, lambda x: lax.scan(outer, x, length=5)[0], P(), P()), spec(mesh))
  assert {len(c.groups[0]): c.count for c in found.collectives} == {2: 5, 4: 15}
  assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_counts_once_and_is_reported(mesh):
  def loop(x):
    return lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: lax.psum(x, "data"), x)
  found = work(over(mesh, loop, P(), P()), spec(mesh))
  assert [c.count for c in found.collectives if c.bytes == WHOLE] == [1]
  assert found.unknown_loops == 1


LOOP = """HloModule loop, num_partitions=4

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%arg), index=0
  %step = s32[]{:S(6)} constant(STEP)
  %next = s32[]{:S(6)} CHANGE(%i, %step)
  %x = f32[8]{0:T(8)S(1)} get-tuple-element(%arg), index=1
  %sum = f32[8]{0:T(8)S(1)} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %out = (s32[], /*index=1*/f32[8]{0}) tuple(%next, %sum)
}

%cond (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %bound = s32[] constant(BOUND)
  ROOT %less = pred[] compare(%i.1, %bound), direction=DIRECTION
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[]{:S(6)} constant(FIRST)
  %first = s32[]{:S(6)} copy(%zero)
  %init = (s32[], f32[8]{0}) tuple(%first, %x.1)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("first, change, step, direction, bound, times", [
  (0, "add", 1, "LT", 24, 24), (0, "add", 1, "LE", 24, 25), (2, "add", 3, "LT", 12, 4),
  (23, "subtract", 1, "GE", 0, 24), (5, "add", -1, "GT", 0, 5), (0, "add", 1, "NE", 7, 7),
  (9, "add", 1, "LT", 3, 0), (0, "multiply", 2, "LT", 8, None)])
def test_loops_as_the_tpu_compiler_prints_them(first, change, step, direction, bound, times):
  """It states no trip count: the counter's bounds are read."""
  text = LOOP
  for name, value in (("FIRST", first), ("CHANGE", change), ("STEP", step), ("DIRECTION", direction),
                      ("BOUND", bound)):
    text = text.replace(name, str(value))
  found = hlo.work(text)
  assert found.unknown_loops == (times is None)
  times = 1 if times is None else times
  counts = [(c.kind, c.bytes, c.groups, c.count) for c in found.collectives]
  assert counts == [("all-reduce", 32, ((0, 1, 2, 3),), times)] * (times > 0)
  # What lies on the chip is no traffic of the main memory.
  assert found.traffic == 0


SPREAD = """HloModule spread, num_partitions=4

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %c = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (p.1: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%scatter (input: f32[8,8]) -> f32[2,8] {
  %input = f32[8,8]{1,0} parameter(0)
  %reduce = f32[8,8]{1,0} all-reduce(%input), channel_id=9, replica_groups=mesh['x'=2,'y'=2] {'x'}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%reduce, %zero, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (a: bf16[2,8], b: f32[8,8]) -> f32[2,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %fusion.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %fusion.2 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%go_on
  ROOT %fusion.3 = f32[2,8]{1,0} fusion(%b), kind=kCustom, calls=%scatter
}
"""


def test_collectives_inside_fusions_as_the_tpu_compiler_prints_them():
  """One gather that two fusions overlap with other work is one; a sum that is then cut is a scatter."""
  found = hlo.work(SPREAD)
  assert [(c.kind, c.bytes, c.groups, c.count) for c in found.collectives] == [
    ("all-gather", 128, ((0, 1, 2, 3),), 1), ("reduce-scatter", 256, ((0, 2), (1, 3)), 1)]


@pytest.mark.parametrize("text, groups", [
  ("replica_groups={{0,1},{2,3}}, x=1", ((0, 1), (2, 3))),
  ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
  ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
  ("replica_groups=mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
  ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
  ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
  ("replica_groups={}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
  ("channel_id=1, source_target_pairs={{0,4},{4,0}}", ((0, 4), (4, 0))),
])
def test_every_form_of_groups(text, groups):
  assert hlo.groups(text, 8) == groups


def test_traffic_is_xla_s_own_where_nothing_loops():
  """Products, element-wise work and reductions, several in a fusion."""
  x = jax.ShapeDtypeStruct((N, 2 * N), jnp.float32)
  y = jax.ShapeDtypeStruct((2 * N, N), jnp.float32)
  for function in (jnp.dot, lambda x, y: jnp.tanh(x) * 2 + y.T, lambda x, y: x.sum() + jnp.sin(y)):
    compiled = jax.jit(function).lower(x, y).compile()
    assert hlo.work(compiled.as_text()).traffic == compiled.cost_analysis()["bytes accessed"]


def test_traffic_of_a_scan_reads_each_layer_once():
  """A loop over stacked weights reads a layer in each iteration, not the stack."""
  layers, size = 32, 128
  weights = jax.ShapeDtypeStruct((layers, size, size), jnp.float32)
  x = jax.ShapeDtypeStruct((8, size), jnp.float32)
  found = work(lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], weights, x)
  stack = layers * size * size * 4
  # Read by the slice, written, and read by the product at most; with activations beside it.
  assert stack <= found.traffic <= 3.5 * stack


def test_traffic_of_a_scan_that_stacks_writes_each_slice_once():
  """Outputs are written in place: an iteration does not copy what the others wrote."""
  x = jax.ShapeDtypeStruct((256,), jnp.float32)
  def stacked(length):
    return work(lambda x: lax.scan(lambda x, _: (x * 2, x), x, length=length)[1], x).traffic
  assert stacked(200) < 2.1 * stacked(100)


def test_the_dearest_branch_counts():
  x = jax.ShapeDtypeStruct((N, N), jnp.float32)
  index = jax.ShapeDtypeStruct((), jnp.int32)
  branches = [lambda x: x, lambda x: jnp.tanh(x @ x) @ x, lambda x: x @ x]
  alone = [work(branch, x).traffic for branch in branches]
  found = work(lambda i, x: lax.switch(i, branches, x), index, x)
  assert max(alone) <= found.traffic <= max(alone) + 6 * WHOLE
