"""One program for free widths of stages: each layer chooses the sizes of what it reads and writes."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from nestnet import Space, build, cost, evaluation, predict, runs
from nestnet.axes import axes, statistics_axes
from nestnet.execution import Supernet
from nestnet.models.mobilenet import MobileNet
from nestnet.models.small_resnet import SmallResNet
from nestnet.models.stack import single, stack
from nestnet.objectives import objective
from nestnet.objectives.base import Targets
from nestnet.one_program import OneProgram
from nestnet.optim import optimizer, schedule
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.slicing import scatter, used
from nestnet.steps import Recipe, Step
from tests.test_evaluation import built
from tests.test_one_program import capture
from tests.test_one_program_conv import (IMAGES, INPUT, INPUTS, LABELS, WIDE, check_shards, close, evaluated,
                                         make, outcome, variables_of)

TINY = SmallResNet(3, layers_1=2, widths=(16,), strides=(1,), stem=16)
TWO = SmallResNet(3, layers_1=1, layers_2=3, widths=(16, 16), strides=(1, 2), stem=32)
HALVES = (50, 100)
# A block before the stages, residual in the members where it writes as many as the stem; so is the first
# block of the stage.
FIXED = dict(layers_1=2, expand_1=3, kernel_1=3, embed_0=16, embed_1=16, head_0=16, features=16,
             widths=(16, 16), head=(16, 16), strides=(1, 1), squeeze=(True, True),
             activations=("relu", "h_swish"))
# As BigNAS has it: a stage without expansion before the others, and projected shortcuts.
BIG = dict(layers_0=2, layers_1=2, expand_1=3, kernel_0=1, kernel_1=3, embed_0=16, embed_1=16, features=16,
           widths=(16, 16), head=(16,), strides=(1, 2), squeeze=(False, True), activations=("swish", "swish"),
           shortcuts=True, zero_gamma=True)
EIGHTS = {axis: (8, 16) for axis in ("stem", "embed_0", "embed_1", "features")}
FREE = Space(**EIGHTS, head_0=(8, 16), layers_1=(1, 2), expand_1=(1, 3), per_layer=("expand_1",))
NETS = {
  "tiny": Supernet(TINY, Space(layers_0=(1, 2), layers_1=(1, 2), width_0=HALVES, width_1=HALVES), INPUT),
  "two stages": Supernet(TWO, Space(
    layers_0=(1, 2), layers_2=(1, 2, 3), width_stem=HALVES, width_0=HALVES, width_1=HALVES, width_2=HALVES,
    expand_2=HALVES, per_layer=("expand_2",)), INPUT),
  "mobile": Supernet(MobileNet(3, **FIXED), FREE, INPUT),
  "bignas": Supernet(MobileNet(3, **BIG), Space(
    **EIGHTS, layers_0=(1, 2), layers_1=(1, 2), kernel_1=(1, 3)), INPUT)}
MEMBERS = {
  "tiny": ("layers_0=1,width_0=50,layers_1=2,width_1=50",),
  "two stages": ("layers_0=1,width_0=50,width_2=50,expand_2=100:50:50", "",
                 "width_stem=50,layers_2=0+2,width_1=50,expand_2=50:100"),
  "mobile": ("embed_0=8,embed_1=8,expand_1=3:1,features=8", "stem=8,embed_0=8,layers_1=1,head_0=8"),
  "bignas": ("stem=8,embed_1=8,layers_0=1,features=8", "embed_0=8,kernel_1=1")}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("two stages", "mobile", "bignas")]


class Block(nn.Module):
  """A residual MLP, from another width where that is given."""

  width: int
  mlp: int
  reads: str = "embed_1"

  @nn.compact
  def __call__(self, x, constants, bias):
    weights = lambda name, names, shape: self.param(name, axes(nn.initializers.normal(0.5), names), shape)
    up = weights("up", f"{self.reads} -> mlp", (x.shape[-1], self.mlp))
    down = weights("down", "mlp -> embed_1", (self.mlp, self.width))
    y = jnp.tanh(x @ up + bias) @ down
    if self.reads == "embed_1":
      return x + y
    return y + x @ weights("shortcut", f"{self.reads} -> embed_1", (x.shape[-1], self.width))


class Dense(nn.Module):
  names: str
  width: int

  @nn.compact
  def __call__(self, x):
    return x @ self.param("kernel", axes(nn.initializers.normal(0.5), self.names), (x.shape[-1], self.width))


class Plain(nn.Module):
  """Two widths, one behind the other; with `normalised` a norm that stands in no `single`."""

  layers: int
  embed_0: int
  embed_1: int
  mlp: int | tuple[int, ...]
  normalised: bool = False
  carried = ("embed_0", "embed_1")
  singles = ("stem", "head")

  @nn.compact
  def __call__(self, x, bias=0.0):
    x = single(functools.partial(Dense, "pixels -> embed_0"), x, name="stem", sizes={"width": self.embed_0},
               writes=self.embed_0)
    x, _ = stack(Block, x, layers=self.layers, lead=functools.partial(Block, reads="embed_0"),
                 sizes={"width": self.embed_1, "mlp": self.mlp}, reads=self.embed_0, writes=self.embed_1,
                 bias=bias)
    if self.normalised:
      scale = self.param("scale", axes(nn.initializers.ones, "-> embed_1"), x.shape[-1:])
      x = nn.standardize(x) * scale.reshape(1, -1)
    return single(functools.partial(Dense, "embed_1 -> classes", 2), x, name="head", sizes={},
                  reads=self.embed_1)


X = jnp.linspace(-1, 1, 10).reshape(5, 2)
PLAIN = Supernet(Plain(3, 4, 6, 4), Space(
  layers=(1, 2, 3), embed_0=(2, 3, 4), embed_1=(3, 5, 6), mlp=(2, 4), per_layer=("mlp",)),
  (jax.ShapeDtypeStruct(X.shape, X.dtype),))


@pytest.mark.slow
def test_a_plain_member_as_data_is_the_member(compiled):
  """Logits, gradients of weights and of an input beside `x`, and exactly zero outside of the slice."""
  one, rng = OneProgram(PLAIN), np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), PLAIN.shapes["params"])

  def run(runnable, params, bias):
    def loss(params, bias):
      choice = {"choice": runnable.choice} if runnable.choice else {}
      logits = runnable.module.apply({**runnable.cut({"params": params}), **choice}, X, bias)
      return jnp.sum(jnp.sin(logits)), logits
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, bias)

  @jax.jit
  def as_data(vector, *operands):
    return one.switch(run, vector, *operands)

  bias = jnp.float32(0.3)
  assert one.widths == [{}]
  for text in ("layers=1,embed_0=2,mlp=2", "layers=0+2,embed_0=3,embed_1=3,mlp=4:2", ""):
    subnet = PLAIN.space.subnet(text)
    expected = jax.jit(functools.partial(run, PLAIN.runnable(subnet)))(params, bias)
    found = as_data(one.vector(subnet), params, bias)
    close(found, expected, 1e-5, 1e-6)
    marks = jax.jit(one.used)(one.vector(subnet), params)
    for grad, mark in zip(*map(jax.tree.leaves, (found[1][0], marks))):
      assert not np.asarray(grad)[~np.asarray(mark)].any()
  assert compiled.count("jit(as_data)") == 1


@functools.cache
def family(name):
  """In float64; to be called with `wide`."""
  net = NETS[name]
  net = Supernet(net.model.clone(**WIDE), net.space, (jax.ShapeDtypeStruct(INPUTS.shape, jnp.float64),))
  return net, OneProgram(net), variables_of(net)


@functools.cache
def as_data(name):
  one = family(name)[1]

  def as_data(vector, v):
    return one.switch(outcome, vector, v)

  return jax.jit(as_data)


@pytest.fixture
def wide():
  """Gradients of normalised batches are differences of like numbers: equality is told in float64."""
  with jax.enable_x64(True):
    yield


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_as_data_equals_the_slice(name, wide, compiled):
  """Loss, logits, gradient, exactly zero outside of the slice, and moments; logits under given statistics,
  which are those of the extracted network too."""
  net, one, variables = family(name)
  names = statistics_axes(net.axes["params"], variables["batch_stats"])
  for subnet in map(net.space.subnet, MEMBERS[name]):
    loss, logits, grads, moments, own = jax.jit(functools.partial(outcome, net.runnable(subnet)))(variables)
    found_loss, found_logits, found_grads, found, found_own = as_data(name)(one.vector(subnet), variables)
    assert np.ptp(logits) > 1e-2
    close(own, jax.jit(lambda v: net.module(subnet).apply(v, INPUTS)["logits"])(net.cut(variables, subnet)))
    close((found_loss, found_logits, found_grads, found_own), (loss, logits, grads, own))
    own_weights = used(lambda p: net.cut({"params": p}, subnet)["params"], variables["params"])
    for grad, mark in zip(*map(jax.tree.leaves, (found_grads, own_weights))):
      assert not np.asarray(grad)[~np.asarray(mark)].any()
    close(found, scatter(moments, names, net.model.sizes(subnet), variables["batch_stats"]))
  assert compiled.count("jit(as_data)") == 1


@pytest.mark.parametrize("name", ["tiny", *SLOW])
def test_what_a_vector_uses_is_what_the_slice_uses(name):
  net = NETS[name]
  one = OneProgram(net)
  params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), net.shapes["params"])
  for subnet in map(net.space.subnet, MEMBERS[name]):
    expected = used(lambda p: net.cut({"params": p}, subnet)["params"], params)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(one.used)(one.vector(subnet), params), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two stages", "bignas"])
def test_a_member_alone_is_cut_layer_by_layer(name, wide):
  net, one, variables = family(name)
  subnet = net.space.subnet(MEMBERS[name][0])
  close(jax.jit(functools.partial(evaluated, one.only(subnet)))(variables),
        jax.jit(functools.partial(evaluated, net.runnable(subnet)))(variables))


def test_each_place_has_branches_for_its_own_axes_alone():
  net = NETS["two stages"]
  one = OneProgram(net)
  assert one.widths == [{}] and one.inner == ("expand_2",)
  # The stem's two, then the first blocks of both stages, the blocks behind in the second, the classifier.
  assert one.worth == (4 + 4 + 4 + 8 + 4 + 2) / 6
  members = [net.space.sample((3, i)) for i in range(50)]
  assert len({tuple(one.vector(m)) for m in members}) == len(set(members)) > 40


def test_blocks_of_a_mobile_network_have_branches_for_what_they_read_and_write_alone():
  net = NETS["mobile"]
  one = OneProgram(net)
  assert one.widths == [{}] and one.inner == ("expand_1",) and set(one.carried) == {*EIGHTS, "head_0"}
  run = lambda runnable, v: runnable.module.apply({**runnable.cut(v), "choice": runnable.choice}, IMAGES)
  jaxpr = jax.make_jaxpr(lambda vector, v: one.switch(run, vector, v))(
    one.vector(net.space.largest), {"params": net.shapes["params"]})
  # The stem, the block before the stage, its first and, absent too, the one behind; the head, the classifier.
  assert branches(jaxpr.jaxpr) == 2 + 4 + 8 + (1 + 4) + 4 + 4 + 2


def branches(jaxpr):
  """Of all switches, but those over platforms."""
  found = 0
  for equation in jaxpr.eqns:
    of_sizes = equation.primitive.name == "cond" and not equation.params.get("branches_platforms")
    found += len(equation.params["branches"]) if of_sizes else sum(
      map(branches, jex.jaxprs_in_params(equation.params)))
  return found


def test_few_combinations_are_left_outside():
  """Where widths go together, a network for each of them has fewer branches than a choice in each place."""
  widths = [f"width_{s}" for s in ("stem", 0, 1, 2)]
  tied = Space(couple={" ".join(widths): tuple((width,) * 4 for width in HALVES)}, layers_2=(2, 3))
  one = OneProgram(Supernet(TWO, tied, INPUT))
  assert one.carried == () and len(one.widths) == 2


def test_what_stands_in_no_place_keeps_a_width_of_its_own():
  """A norm would count the zeros behind a member's units: there is a network for each width instead."""
  net = Supernet(PLAIN.model.clone(normalised=True), PLAIN.space, PLAIN.inputs)
  one = OneProgram(net)
  assert "embed_1" in one.outer
  params = jax.tree.map(lambda s: jnp.full(s.shape, 0.3, s.dtype), net.shapes["params"])
  subnet = net.space.subnet("layers=1,embed_0=2,embed_1=3")
  run = lambda r, params: r.module.apply(
    {**r.cut({"params": params}), **({"choice": r.choice} if r.choice else {})}, X)
  close(one.switch(run, one.vector(subnet), params), run(net.runnable(subnet), params), 1e-5, 1e-6)


def test_a_model_that_counts_with_its_sizes_is_told():
  class Even(Plain):
    def __post_init__(self):
      super().__post_init__()
      if self.embed_0 % 1:
        raise ValueError

  with pytest.raises(ValueError, match=r"(?s)Even cannot run as one program: .*OneOf.*train.execution=slice"):
    OneProgram(Supernet(Even(3, 4, 6, 4), PLAIN.space, PLAIN.inputs)).check()


@pytest.mark.parametrize("name, texts", [
  ("two stages", ("layers_0=1,width_0=50,width_2=50", "width_stem=50,layers_2=0+2,width_1=50,expand_2=50")),
  ("mobile", ("stem=8,layers_1=1,embed_1=8,head_0=8", "embed_0=8,expand_1=1,features=8")),
  pytest.param("bignas", MEMBERS["bignas"], marks=pytest.mark.slow)], ids=["two stages", "mobile", "bignas"])
def test_each_member_costs_its_own_flops(name, texts):
  net = NETS[name]
  one = OneProgram(net)
  params = {"params": net.shapes["params"]}
  for subnet in map(net.space.subnet, texts):
    runnable = one.only(subnet)
    run = lambda v, x: runnable.module.apply({**runnable.cut(v), "choice": runnable.choice}, x)
    assert cost.count_flops(run, params, *net.inputs) == cost.flops(net.module(subnet), *net.inputs)


@pytest.mark.parametrize("name", ["tiny", "mobile"])
def test_features_whose_number_is_data_are_not_given(name):
  net = NETS[name]
  one = OneProgram(net)
  outputs = lambda runnable: jax.eval_shape(lambda v, x: runnable.module.apply(
    {**runnable.cut(v), "choice": runnable.choice}, x), {"params": net.shapes["params"]}, *INPUT)
  branch = one._branch({}, jax.tree.map(jnp.asarray, one.only(net.space.largest).choice))
  assert set(outputs(branch)) == {"logits"}
  assert set(outputs(one.only(net.space.smallest))) == {"logits", "features"}
  distil = objective("classification", space="features")
  with pytest.raises(ValueError, match="number is data to one program; .*space=logits, or .*execution=slice"):
    distil.loss({}, {}, {"logits": jnp.zeros((4, 3))}, Targets({"label": LABELS}, {}), 0, None)


@pytest.mark.slow
@pytest.mark.parametrize("name, model", [
  ("two stages", {"name": "SmallResNet", "layers_1": 1, "layers_2": 3, "widths": (16, 16), "strides": (1, 2),
                  "stem": 32}),
  ("bignas", {"name": "MobileNet", **BIG, "zero_gamma": False})], ids=["two stages", "bignas"])
def test_many_members_have_the_rows_of_each_alone(name, model, compiled):
  """Calibrated and evaluated by one program; the rows are those of members on their own."""
  run = built(model, NETS[name].space.to_json())
  state, family = run.step.init(), run.supernet.space
  members = [family.smallest, *predict.drawn(family, 8)][:9]
  rows = evaluation.evaluate(run, state, members)
  assert compiled.count("jit(all_scores)") == 1
  for row, member in zip(rows[:3], members):
    (alone,) = evaluation.evaluate(run, state, [member])
    for name, value in alone.items():
      assert row[name] == (pytest.approx(value, rel=1e-5) if name.endswith("loss") else value), name
  assert len({row["loss"] for row in rows}) == len(set(members))


@pytest.mark.slow
def test_ten_thousand_members_compile_one_program(compiled):
  net = NETS["tiny"]
  model = net.model.clone(layers_1=13)
  space = Space(layers_0=(1, 2), layers_1=(12, 13), width_0=HALVES, width_1=HALVES, expand_1=HALVES,
                per_layer=("expand_1",))
  assert space.size > 90_000
  step = make(Supernet(model, space, INPUT), sampler("sorted_nested", space, 0, n=1000))
  assert step.one.carried
  state, batch = step.init(), put_batch({"image": IMAGES, "label": LABELS}, step.mesh)
  for at in range(10):
    state, metrics = jax.block_until_ready(step(state, batch, at))
  assert compiled.count("jit(_add)") == compiled.count("jit(_updated)") == 1
  assert np.isfinite(metrics["loss"])
  assert len({c for at in range(10) for t in step.recipe.sampler.terms(at) for c in t.candidates}) > 9000


@pytest.mark.slow
def test_a_run_that_goes_on_ends_as_the_uninterrupted_one(tmp_path):
  """Bit for bit."""
  def run(steps, folder):
    model = {"name": "SmallResNet", "layers_1": 2, "widths": (16,), "strides": (1,)}
    run = built(model, NETS["tiny"].space.to_json())
    train = {**run.config["train"], "steps": steps, "execution": "one_program"}
    run = build.build({**run.config, "train": train})
    assert run.step.one.carried
    return jax.tree.map(np.asarray, runs.trained(run, tmp_path / folder, show_progress=False).trained)

  start = run(2, "stopped")
  whole, again = run(4, "whole"), run(4, "stopped")
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (start, whole))))


@pytest.mark.slow
def test_an_objective_is_given_what_every_member_has():
  """For its update it keeps the outputs of the first member; the largest alone has features too."""
  net = NETS["tiny"]
  keeps = dataclasses.replace(
    objective("classification"), init=lambda *_: ({}, {}, {"logits": jnp.zeros((4, 3))}),
    update=lambda state, params, outputs, step: {"logits": outputs["logits"]})
  recipe = Recipe(sampler("sorted_nested", net.space, 0, n=1), keeps)
  step = Step(net, recipe, capture, make_mesh({"data": 1}), execution="one_program")
  state, _ = step(step.init(), put_batch({"image": IMAGES, "label": LABELS}, step.mesh), 0)
  assert np.ptp(state.objective["logits"]) > 0


@pytest.mark.slow
def test_untouched_weights_stay():
  net = NETS["tiny"]
  drawn = sampler("sorted_nested", net.space, 0, n=1)
  recipe = Recipe(drawn, objective("classification"), untouched="freeze")
  step = Step(net, recipe, optimizer("adamw", schedule("constant", 0.01, 0, 10), 0.1, 0.0),
              make_mesh({"data": 1}), execution="one_program")
  start, (subnet,) = step.init(), drawn.terms(0)[0].candidates
  before = jax.tree.map(np.asarray, start.trained["model"])
  state, _ = step(start, put_batch({"image": IMAGES, "label": LABELS}, step.mesh), 0)
  mark = step.one.used(step.one.vector(subnet), before)
  for own, old, new in zip(*map(jax.tree.leaves, (mark, before, state.trained["model"]))):
    moved = old != np.asarray(new)
    assert not moved[~np.asarray(own)].any()
  assert not all(leaf.all() for leaf in jax.tree.leaves(mark))


@pytest.mark.slow
def test_a_mesh_has_the_gradient_of_one_device():
  """Also where weights lie in shares: GroupNorm's statistics are of each image."""
  net = NETS["tiny"]
  net = Supernet(net.model.clone(norm="group"), net.space, INPUT)
  recipe = Recipe(sampler("sorted_nested", net.space, 0, n=2), objective("classification"))
  found = []
  for sizes in ({"data": 1}, {"data": 2, "fsdp": 2}):
    step = Step(net, recipe, capture, make_mesh(sizes), execution="one_program")
    state, _ = step(step.init(), put_batch({"image": IMAGES, "label": LABELS}, step.mesh), 0)
    found.append(jax.tree.map(np.asarray, state.opt_state["model"]))
  close(found[1], found[0], 1e-4, 1e-6)


@pytest.mark.slow
def test_data_shards_train_members_of_their_own():
  check_shards(NETS["tiny"])
