"""One program for a whole space: equal to slices, whatever the member, and compiled once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import Space, Subnet, cost, recipes
from nestnet.evaluation import member_flops
from nestnet.execution import Supernet
from nestnet.models.vit import ViT
from nestnet.objectives import objective
from nestnet.objectives.base import Targets
from nestnet.one_program import OneProgram
from nestnet.optim import optimizer, schedule
from nestnet.sampling import on_shards, sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.slicing import scatter, take
from nestnet.steps import Recipe, Step

IMAGES = np.random.default_rng(9).normal(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])
INPUT = (jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype),)
MODEL = ViT(layers=3, embed=16, heads=4, mlp=16, classes=3, head_dim=4, drop_path=0.2, pool="token",
            features=8)
SPACES = {
  "free": Space(layers=(1, 2, 3), embed=(8, 16), heads=(2, 4), mlp=(4, 8, 16), features=(4, 8),
                per_layer=("heads", "mlp"), groups={"mlp": 2, "heads": 2}),
  "coupled": Space(couple={"layers embed": ((1, 8), ((0, 2), 8), (3, 16)), "heads mlp": ((1, 4), (2, 16), (4, 16))},
                   features=(8,)),
  "least slope": Space(couple={"layers mlp": ((3, (4, 8, 8)), (2, (4, 16)), (3, (16, 16, 16)))},
                       embed=(16,), heads=(4,), features=(8,)),
}


def quick(name):
  """All spaces; the others run with the longer checks."""
  return [n if n == name else pytest.param(n, marks=pytest.mark.slow) for n in SPACES]


@functools.cache
def family(name):
  net = Supernet(MODEL, SPACES[name], INPUT)
  return net, OneProgram(net)


@functools.cache
def variables(name):
  rng = np.random.default_rng(0)
  draw = lambda s: rng.normal(size=s.shape).astype(s.dtype)
  shapes = family(name)[0].shapes
  return {"params": jax.tree.map(draw, shapes["params"]),
          "constants": jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), shapes["constants"])}


def loss_and_gradient(runnable, variables):
  def loss(params):
    cut = runnable.cut({**variables, "params": params})
    cut |= {} if runnable.choice is None else {"choice": runnable.choice}
    logits = runnable.module.apply(cut, IMAGES)["logits"]
    return jnp.mean(jnp.sin(logits)), logits
  return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@functools.cache
def as_data(name):
  one = family(name)[1]

  def as_data(vector, v):
    return one.switch(loss_and_gradient, vector, v)

  return jax.jit(as_data)


def members(name, count):
  space = SPACES[name]
  drawn = [space.sample((5, i)) for i in range(count)]
  return [*drawn, space.smallest, space.largest]


@pytest.mark.parametrize("name", quick("coupled"))
def test_as_data_equals_the_slice_and_the_extracted_network(name, compiled):
  net, _ = family(name)
  for subnet in {*members(name, 1), *([Subnet(layers=(0, 2), embed=8, heads=(2, 4), mlp=(16, 4), features=4)]
                                       if name == "free" else [])}:
    (loss, logits), grads = jax.jit(lambda v: loss_and_gradient(net.runnable(subnet), v))(variables(name))
    alone = jax.jit(net.module(subnet).apply)(net.cut(variables(name), subnet), IMAGES)["logits"]
    vector = family(name)[1].vector(subnet)
    (found, found_logits), found_grads = as_data(name)(vector, variables(name))
    np.testing.assert_allclose(found_logits, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (found_grads, grads))):
      assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
      assert not np.asarray(a)[np.asarray(b) == 0].any()
  assert compiled.count("jit(as_data)") == 1


def make(name, space, execution, devices=1, model=MODEL, **options):
  group = recipes.recipe(name)
  own = dict(group["sampler"]) | options
  group["objective"].pop("name")
  net = Supernet(model, space, INPUT)
  return Step(net, Recipe(sampler(own.pop("name"), space, 0, **own),
                          objective("classification", **group["objective"])),
              optimizer("sgd", schedule("constant", 0.01, 0, 10), 0.01, 0.0), make_mesh({"data": devices}),
              execution=execution)


def train(step, steps, batch_of=lambda at: {"image": IMAGES, "label": LABELS}):
  state, metrics = step.init(), {}
  for at in range(steps):
    state, metrics = jax.block_until_ready(step(state, put_batch(batch_of(at), step.mesh), at))
  return state, metrics


SMALL = ViT(layers=2, embed=8, heads=2, mlp=8, classes=3, head_dim=4)
FEW = Space(layers=(1, 2), embed=(4, 8), heads=(1, 2), mlp=(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [
  ("sandwich", {"random": 1, "candidates": 2}), ("sorted", {"n": 2}),
  ("matformer_joint", {"members": ("layers=1,embed=4,heads=1,mlp=8", "layers=2,embed=8,heads=2,mlp=8")})], ids=str)
def test_training_is_that_of_slices(name, options):
  """In-place distillation, a choice among candidates, labels alone, a list that never changes."""
  (state, metrics), (own, own_metrics) = (
    train(make(name, FEW, execution, model=SMALL, **options), 3) for execution in ("slice", "one_program"))
  np.testing.assert_allclose(own_metrics["loss"], metrics["loss"], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own.trained, state.trained)


@pytest.mark.parametrize("name", quick("coupled"))
def test_what_a_vector_uses_is_what_the_slice_uses(name):
  net, one = family(name)
  for subnet in members(name, 3):
    axes, groups = net.axes["params"], SPACES[name].groups
    ones = jax.tree.map(lambda s: np.ones(s.shape), net.shapes["params"])
    small = take(ones, axes, subnet, groups)
    used = jax.tree.map(lambda x: np.asarray(x) > 0, scatter(small, axes, subnet, ones, groups))
    found = jax.jit(one.used)(one.vector(subnet), ones)
    jax.tree.map(np.testing.assert_array_equal, found, used)


@pytest.mark.slow
def test_untouched_weights_stay():
  group = make("sorted", FEW, "one_program", model=SMALL, n=1)
  step = Step(group.supernet, dataclasses.replace(group.recipe, untouched="freeze"),
              optimizer("adamw", schedule("constant", 0.01, 0, 10), 0.1, 0.0), group.mesh, execution="one_program")
  start, (subnet,) = step.init(), step.recipe.sampler.terms(0)[0].candidates
  state = train(step, 1)[0]
  used = step.one.used(step.one.vector(subnet), start.trained["model"])
  moved = jax.tree.map(lambda a, b: np.asarray(a != b), state.trained, start.trained)
  assert not all(leaf.all() for leaf in jax.tree.leaves(used))
  for own, other in zip(jax.tree.leaves(used), jax.tree.leaves(moved)):
    assert other.any() and not other[~np.asarray(own)].any()


@pytest.mark.slow
@pytest.mark.parametrize("name, options, gradients", [
  # The sandwich: the largest, which teaches, and one program for all that are taught.
  ("sandwich", {"random": 102}, 2), ("sorted", {"n": 100}, 1)], ids=str)
def test_a_thousand_members_compile_one_program_for_each_role(compiled, name, options, gradients):
  space = Space(layers=(8, 9, 10), embed=(4, 8), heads=(1, 2), mlp=(4, 8), per_layer=("heads", "mlp"))
  model = ViT(layers=10, embed=8, heads=2, mlp=8, classes=3, head_dim=4)
  assert space.size > 10 ** 6
  step = make(name, space, "auto", model=model, **options)
  train(step, 10)
  assert compiled.count("jit(_add)") == gradients
  assert compiled.count("jit(_updated)") == 1
  seen = {c for at in range(10) for t in step.recipe.sampler.terms(at) for c in t.candidates}
  assert len(seen) > 990 and len({s["embed"] for s in seen}) == 2


@pytest.mark.parametrize("execution, message", [
  ("one_program", "Dense has no stack of layers.*train.execution=slice"),
  ("sliced", "unknown train.execution 'sliced'.*auto, slice, one_program")])
def test_what_cannot_be_data_is_refused(execution, message):
  import flax.linen as nn
  from nestnet.axes import axes

  class Dense(nn.Module):
    mlp: int

    @nn.compact
    def __call__(self, x, *, train=False):
      kernel = self.param("w", axes(nn.initializers.ones, "pixels -> mlp"), (64, self.mlp))
      return {"logits": x.reshape(len(x), -1) @ kernel}

  with pytest.raises(ValueError, match=message):
    make("sorted", Space(mlp=(2, 3)), execution, model=Dense(3))


def test_sizes_that_do_not_reach_the_stack_are_told():
  import flax.linen as nn
  from nestnet.axes import axes
  from nestnet.models.stack import stack

  class Block(nn.Module):
    mlp: int

    @nn.compact
    def __call__(self, x, constants):
      return x + self.param("w", axes(nn.initializers.ones, "pixels -> mlp"), (64, self.mlp)).sum()

  class Net(nn.Module):
    layers: int
    mlp: int

    @nn.compact
    def __call__(self, x, *, train=False):
      block = lambda name: Block(self.mlp, name=name)
      return {"logits": stack(block, x.reshape(len(x), -1), layers=self.layers, sizes={})[0][:, :3]}

  with pytest.raises(ValueError, match=r"(?s)Net cannot run as one program.*stack\(sizes=...\).*execution=slice"):
    make("sorted", Space(layers=(1, 2), mlp=(2, 3)), "one_program", model=Net(2, 3))


def own_loss_and_gradient(step, state, subnet, batch, taught=None):
  """Of one sub-network alone, on one device."""
  def loss(params):
    variables = step.supernet.cut({"params": params, **state.fixed}, subnet)
    outputs = step.supernet.module(subnet).apply(variables, batch["image"])
    return step.recipe.objective.loss({}, {}, outputs, Targets(batch, taught), 0, None)[0]
  return jax.value_and_grad(loss)(state.trained["model"])


@pytest.mark.slow
def test_data_shards_train_members_of_their_own(compiled):
  """The averaged gradient is that computed sub-network by sub-network, and one program makes it."""
  shards, size = 4, 8
  step = make("sorted", FEW, "one_program", devices=shards, model=SMALL, n=1)
  drawn = on_shards([sampler("sorted_nested", FEW, k, n=2) for k in range(shards)])
  step = Step(step.supernet, dataclasses.replace(step.recipe, sampler=drawn), capture, step.mesh,
              execution="one_program")
  rng = np.random.default_rng(3)
  batch = {"image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32), "label": rng.integers(0, 3, size)}
  state, found = step.init(), []
  start = jax.tree.map(np.asarray, state)
  for at in range(2):
    state, metrics = jax.block_until_ready(step(state, put_batch(batch, step.mesh), at))
    found.append((metrics["loss"], jax.tree.map(np.asarray, state.opt_state["model"])))
  assert compiled.count("jit(_add)") == 1
  assert len({m for at in range(2) for t in drawn.terms(at) for m in t.candidates[0]}) > 8
  expected, total = jax.tree.map(jnp.zeros_like, start.trained["model"]), 0.0
  for term in drawn.terms(0):
    for k, subnet in enumerate(term.candidates[0]):
      share = {name: value[k * size // shards:(k + 1) * size // shards] for name, value in batch.items()}
      loss, grads = jax.jit(functools.partial(own_loss_and_gradient, step, start, subnet))(share)
      total += loss / shards
      expected = jax.tree.map(lambda e, g: e + g / shards, expected, grads)
  np.testing.assert_allclose(found[0][0], total, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0][1], expected)


def capture(mask):
  """An optimizer that keeps the gradient, exactly, as its state, and moves nothing."""
  del mask
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))


def test_shards_agree_on_what_is_the_same():
  space = SPACES["free"]
  terms = on_shards([sampler("sandwich", space, k) for k in range(3)]).terms(5)
  assert terms[0].candidates == (space.largest,) and terms[-1].candidates == (space.smallest,)
  assert all(len(t.candidates[0]) == 3 and t.taught for t in terms[1:-1])
  with pytest.raises(ValueError, match="differ in their sub-networks alone"):
    on_shards([sampler("sandwich", space, 0), sampler("sandwich", space, 0, reduce="mean")])


@pytest.mark.parametrize("name", quick("coupled"))
def test_flops_of_members_are_sums_over_layers(name):
  net, _ = family(name)
  count = member_flops(net)
  for subnet in members(name, 4):
    for train in (False, True):
      assert count(subnet, train) == cost.flops(net.module(subnet), *net.inputs, train=train)
