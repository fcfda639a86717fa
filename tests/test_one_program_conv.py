"""One program for spaces of convolutional networks: choices, rules, first blocks and batch statistics."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet, cost
from nestnet.axes import statistics_axes
from nestnet.evaluation import member_flops
from nestnet.execution import Supernet
from nestnet.models import mobilenet, resnet50d
from nestnet.models.mobilenet import MobileNet
from nestnet.models.resnet50d import ResNet50D
from nestnet.objectives import objective
from nestnet.one_program import OneProgram
from nestnet.optim import optimizer, schedule
from nestnet.sampling import on_shards, sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.slicing import scatter, used
from nestnet.steps import Recipe, Step
from tests.test_one_program import capture, own_loss_and_gradient

IMAGES = np.random.default_rng(9).normal(size=(4, 6, 6, 1)).astype(np.float32)
INPUTS = IMAGES.astype(np.float64)
LABELS = np.array([0, 1, 2, 0])
INPUT = (jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype),)
# The first stage is a first block alone; squeeze-excite in the second.
MODEL = MobileNet(3, widths=(8, 8, 16), head=(8,), strides=(1, 2, 1), squeeze=(False, False, True),
                  activations=("relu", "relu", "h_swish"), layers_1=1, layers_2=3, expand_1=2, expand_2=2,
                  kernel_1=3, kernel_2=5, stem=8)
SPACE = mobilenet.space(MODEL, (1, 2, 3), (1, 2), (3, 5))
# What compiles faster: the centre of a kernel may be a single number, and blocks have little inside.
CENTRE = MODEL.clone(kernel_1=1, kernel_2=3, squeeze=(False,) * 3, activations=("relu",) * 3)
WIDE = dict(dtype=jnp.float64, param_dtype=jnp.float64)
NETS = {"transforms": Supernet(MODEL.clone(transforms=True), SPACE, INPUT),
        "centre": Supernet(CENTRE, mobilenet.space(CENTRE, (1, 2, 3), (1, 2), (1, 3)), INPUT)}
WEIGHTS = np.random.default_rng(8).normal(size=(4, 3))
MEMBERS = {
  "transforms": ("layers_2=1,expand_2=1,kernel_2=3,expand_1=1", "layers_2=0+2,expand_2=2:1,kernel_2=3:5", ""),
  "centre": ("layers_2=0+2,expand_2=1:2,kernel_2=3:1", "layers_2=1,expand_2=1,kernel_2=1,expand_1=1")}


@pytest.fixture
def wide():
  """Gradients of normalised batches are differences of like numbers: equality is told in float64."""
  with jax.enable_x64(True):
    yield


@functools.cache
def family(name):
  """In float64; to be called with `wide`."""
  net = NETS[name]
  net = Supernet(net.model.clone(**WIDE), net.space, (jax.ShapeDtypeStruct(INPUTS.shape, jnp.float64),))
  return net, OneProgram(net), variables_of(net)


def variables_of(net):
  """Random parameters, norms too, and random statistics in the shapes of the largest."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), net.shapes["params"])

  def statistics(node):
    if "scale" in node:
      draw = {"mean": rng.normal(size=node["scale"].shape), "var": rng.uniform(0.5, 2, node["scale"].shape)}
      return {key: value.astype(np.float64) for key, value in draw.items()}
    found = {key: statistics(child) for key, child in node.items() if isinstance(child, dict)}
    return {key: child for key, child in found.items() if child}

  return {"params": params, "batch_stats": statistics(params)}


def outcome(runnable, variables):
  """The loss under batch statistics, its gradient, the logits, the batch's moments; and `evaluated`."""
  def loss(params):
    cut = runnable.cut({"params": params})
    cut |= {} if runnable.choice is None else {"choice": runnable.choice}
    outputs, moments = runnable.module.apply(cut, INPUTS, mutable=["batch_stats"])
    return jnp.sum(WEIGHTS * jnp.sin(outputs["logits"])), (outputs["logits"], moments["batch_stats"])
  (loss, (logits, moments)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return loss, logits, grads, moments, evaluated(runnable, variables)


def evaluated(runnable, variables):
  """The logits under given statistics."""
  cut = runnable.cut(variables)
  cut |= {} if runnable.choice is None else {"choice": runnable.choice}
  return runnable.module.apply(cut, INPUTS)["logits"]


@functools.cache
def as_data(name):
  one = family(name)[1]

  def as_data(vector, v):
    return one.switch(outcome, vector, v)

  return jax.jit(as_data)


def close(found, expected, share=1e-8, least=1e-12):
  """Each array to a share of its own largest number; what is zero but for rounding may differ by `least`."""
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.abs(a - b).max() <= share * np.abs(b).max() + least


@pytest.mark.slow
@pytest.mark.parametrize("name", ["centre", "transforms"])
def test_as_data_equals_the_slice_and_the_extracted_network(name, wide, compiled):
  """Logits, gradients and moments of the batch; statistics that are given are used."""
  net, one, variables = family(name)
  names = statistics_axes(net.axes["params"], variables["batch_stats"])
  for subnet in map(net.space.subnet, MEMBERS[name]):
    loss, logits, grads, moments, own = jax.jit(functools.partial(outcome, net.runnable(subnet)))(variables)
    alone = jax.jit(lambda v: net.module(subnet).apply(v, INPUTS)["logits"])(net.cut(variables, subnet))
    close(own, alone)
    assert np.ptp(logits) > 1e-2 and not np.allclose(own, logits)

    vector = one.vector(subnet)
    found_loss, found_logits, found_grads, found, found_own = as_data(name)(vector, variables)
    close((found_loss, found_logits, found_grads, found_own), (loss, logits, grads, own))
    own_weights = used(lambda p: net.cut({"params": p}, subnet)["params"], variables["params"])
    for grad, mark in zip(*map(jax.tree.leaves, (found_grads, own_weights))):
      assert not np.asarray(grad)[~np.asarray(mark)].any()
    close(found, scatter(moments, names, net.model.sizes(subnet), variables["batch_stats"]))
  assert compiled.count("jit(as_data)") == 1


def test_a_member_alone_is_cut_layer_by_layer(wide):
  net, one, variables = family("transforms")
  subnet = SPACE.subnet(MEMBERS["transforms"][1])
  close(jax.jit(functools.partial(evaluated, one.only(subnet)))(variables),
        jax.jit(functools.partial(evaluated, net.runnable(subnet)))(variables))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_what_a_vector_uses_is_what_the_slice_uses(name, wide):
  net, one, variables = family(name)
  subnet = net.space.subnet(MEMBERS[name][0])
  expected = used(lambda p: net.cut({"params": p}, subnet)["params"], variables["params"])
  found = jax.jit(one.used)(one.vector(subnet), variables["params"])
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert not all(leaf.all() for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_statistics_of_absent_blocks_are_zero(wide):
  net, one, variables = family("centre")
  vector = one.vector(net.space.subnet(MEMBERS["centre"][0]))
  moments = as_data("centre")(vector, variables)[3]
  rest = moments["stage_2"]["rest"]["expand"]["norm"]["var"]
  assert rest.shape == (2, 32) and not rest[0].any() and rest[1].all()
  lead = moments["stage_2"]["layers_2_0"]["expand"]["norm"]["var"]
  assert lead.shape == (16,) and lead[:8].all() and not lead[8:].any()


@pytest.mark.slow
def test_moments_are_those_of_the_batch_whatever_statistics_are_given(wide):
  net, one, variables = family("centre")
  vector = one.vector(net.space.subnet(MEMBERS["centre"][0]))
  moments = as_data("centre")(vector, variables)[3]
  close(jax.jit(one.moments)(vector, variables, INPUTS), moments)

  def again(runnable, variables):
    v = {**runnable.cut(variables), "choice": runnable.choice}
    return runnable.module.apply(v, INPUTS, mutable=["batch_stats"])[1]["batch_stats"]

  kept = jax.jit(lambda v: one.switch(again, vector, v))(variables)
  given, rest, found = (tree["stage_2"]["rest"]["expand"]["norm"]["var"]
                        for tree in (variables["batch_stats"], moments, kept))
  np.testing.assert_array_equal(found[0], given[0])
  np.testing.assert_allclose(found[1], rest[1], rtol=1e-4)


def make(net, drawn, execution="auto", devices=1, tx=None):
  tx = tx or optimizer("sgd", schedule("constant", 0.01, 0, 10), 0.01, 0.0)
  return Step(net, Recipe(drawn, objective("classification")), tx, make_mesh({"data": devices}),
              execution=execution)


@pytest.mark.slow
def test_ten_thousand_members_compile_one_program(compiled):
  model = CENTRE.clone(layers_1=4, layers_2=4, kernel_1=3)
  space = mobilenet.space(model, (3, 4), (1, 2), (1, 3))
  assert space.size > 10 ** 5
  step = make(Supernet(model, space, INPUT), sampler("sorted_nested", space, 0, n=1000, by="members"))
  state, batch = step.init(), put_batch({"image": IMAGES, "label": LABELS}, step.mesh)
  for at in range(10):
    state, metrics = jax.block_until_ready(step(state, batch, at))
  assert compiled.count("jit(_add)") == compiled.count("jit(_updated)") == 1
  assert np.isfinite(metrics["loss"])
  assert len({c for at in range(10) for t in step.recipe.sampler.terms(at) for c in t.candidates}) > 9500


@pytest.mark.slow
def test_data_shards_train_members_of_their_own_on_their_own_statistics():
  check_shards(NETS["centre"])


def check_shards(net):
  """A step's loss and gradient are the means of those of each shard's member alone on its share."""
  shards, size = 2, 4
  drawn = on_shards([sampler("sorted_nested", net.space, k, n=1) for k in range(shards)])
  step = make(net, drawn, devices=shards, tx=capture)
  batch = {"image": IMAGES, "label": LABELS}
  state = step.init()
  start = jax.tree.map(np.asarray, state)
  state, metrics = step(state, put_batch(batch, step.mesh), 0)
  expected, total = jax.tree.map(jnp.zeros_like, start.trained["model"]), 0.0
  for k, subnet in enumerate(drawn.terms(0)[0].candidates[0]):
    share = {name: value[k * size // shards:(k + 1) * size // shards] for name, value in batch.items()}
    loss, grads = jax.jit(functools.partial(own_loss_and_gradient, step, start, subnet))(share)
    total += loss / shards
    expected = jax.tree.map(lambda e, g: e + g / shards, expected, grads)
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
  close(jax.tree.map(np.asarray, state.opt_state["model"]), expected, 1e-4, 1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_flops_of_members_are_sums_over_layers(train):
  net = NETS["transforms"]
  count = member_flops(net)
  for subnet in map(SPACE.subnet, MEMBERS["transforms"][:2]):
    assert count(subnet, train) == cost.flops(net.module(subnet), *net.inputs, train=train)


def test_a_first_block_is_never_absent():
  with pytest.raises(ValueError, match="layers_2 leaves out layer 0"):
    OneProgram(NETS["transforms"]).vector(Subnet(**{**SPACE.largest.chosen, "layers_2": (1, 2)}))


@functools.cache
def resnet():
  model = ResNet50D(3, layers_1=2, layers_2=2, layers_3=2, layers_4=2, widths=(16, 24, 32, 40), stem=16)
  return Supernet(model, resnet50d.space(model, (1, 0)), (jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32),))


def test_too_many_combinations_run_as_slices(caplog):
  space = Space(layers_2=(2, 3), resolution=tuple(range(8, 41)))
  net = Supernet(CENTRE, space, (jax.ShapeDtypeStruct((4, 40, 40, 1), jnp.float32),))
  assert make(net, sampler("sorted_nested", net.space, 0)).one is None
  assert "(33 combinations of resolution): each new one that is drawn is compiled" in caplog.text
  with pytest.raises(ValueError, match="combination of resolution, here 33, of at most 32.*execution=slice"):
    make(net, sampler("sorted_nested", net.space, 0), "one_program")


def test_many_widths_of_the_head_are_data():
  space = Space(layers_2=(2, 3), features=tuple(range(8, 272, 8)))
  net = Supernet(CENTRE.clone(head=(264,), features=264), space, INPUT)
  assert make(net, sampler("sorted_nested", net.space, 0)).one.carried == ("features",)


def test_what_stands_outside_of_the_layers_is_chosen_once():
  """Widths of stages are read by other stages; expansions only by their own."""
  one = OneProgram(resnet())
  assert set(one.inner) == {f"expand_{s}" for s in (1, 2, 3, 4)} and one.outer == ()
  assert set(one.carried) == {"layers_0", "width_stem", *(f"width_{s}" for s in range(5))}
  assert OneProgram(NETS["centre"]).outer == ()
  space = Space(layers_2=(2, 3), expand_2=(1, 2))
  assert OneProgram(Supernet(MODEL, space, INPUT)).inner == ("expand_2",)
