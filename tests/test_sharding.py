"""A family on a mesh is the family on one device, and a sub-network moves no more than it would alone."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import Space, hlo
from nestnet.execution import Supernet
from nestnet.models.vit import ViT
from nestnet.objectives import objective
from nestnet.sampling import Sampler, Term
from nestnet.sharding import local, make_mesh, put_batch
from nestnet.steps import Recipe, Step

MODEL = ViT(layers=3, embed=16, heads=8, mlp=32, classes=3, head_dim=4)
GROUPS = {"heads": 4, "mlp": 4}
SPACE = Space(layers=(2, 3), embed=(8, 16), heads=(4, 8), mlp=(16, 32), per_layer=("mlp",), groups=GROUPS)
MIDDLE = SPACE.subnet("layers=0+2,embed=8,heads=4,mlp=32:16")
MESHES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "model": {"data": 2, "model": 4},
          "mixed": {"data": 2, "fsdp": 2, "model": 2}}
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.normal(size=(8, 8, 8, 1)).astype(np.float32), "label": RNG.integers(0, 3, 8)}
INPUT = (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),)


def capture(mask):
  """An optimizer that keeps the gradient as its state, and moves nothing."""
  del mask
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))


def make(mesh, terms, execution="slice", model=MODEL, space=SPACE, tx=capture, **options):
  return Step(Supernet(model, space, INPUT), Recipe(Sampler(lambda step: terms), objective("classification")),
              tx, make_mesh(mesh), execution=execution, **options)


TERMS = (Term((SPACE.largest,)), Term((MIDDLE,), 0.5, taught=True), Term((SPACE.smallest,), taught=True))


@functools.cache
def one_device():
  return loss_and_gradient(make({"data": 1}, TERMS))


def loss_and_gradient(step):
  state, metrics = step(step.init(), put_batch(BATCH, step.mesh), 0)
  return metrics["loss"], state.opt_state


def close(found, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, execution", [
  *((mesh, "slice") for mesh in MESHES), ("model", "one_program"), ("mixed", "one_program")])
def test_loss_and_gradients_are_those_of_one_device(mesh, execution):
  """Largest, one with sizes of its own in each layer, and smallest, taught in place."""
  step = make(MESHES[mesh], TERMS, execution)
  close(loss_and_gradient(step), one_device())


def collectives(step, member):
  """`{kind: (number, bytes)}` of the gradient program of a member."""
  found = collections.defaultdict(lambda: np.zeros(2, int))

  def compiled(program, *arguments):
    outputs = jax.eval_shape(program.computes, *arguments)
    if program.kind == "gradient":
      for c in hlo.work(program.lower(*arguments).compile().as_text()).collectives:
        found[c.kind] += (c.count, c.count * c.bytes)
    return outputs

  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                       put_batch(BATCH, step.mesh))
  step.programs((Term((member,)),), batch, compiled)
  return dict(found)


# The plainer ones run with the longer checks.
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_sub_network_moves_what_it_would_alone(mesh):
  """On `fsdp` its layers are gathered whole: as many collectives, at most the supernet's bytes."""
  member = SPACE.subnet("layers=2,embed=8,heads=4,mlp=16")
  step = make(MESHES[mesh], TERMS)
  own = Space(couple={" ".join(member): [tuple(member.values())]}, groups=GROUPS)
  lone = make(MESHES[mesh], (Term((own.largest,)),), model=MODEL.clone(**member), space=own)
  found, alone = collectives(step, member), collectives(lone, own.largest)
  whole = collectives(step, SPACE.largest)
  assert found and set(found) == set(alone)
  for kind, (number, size) in found.items():
    assert number == alone[kind][0]
    assert size <= (whole if MESHES[mesh].get("fsdp", 1) > 1 else alone)[kind][1]


@pytest.mark.slow
def test_storage_is_shared_out():
  """Each device of `fsdp` and `model` holds its part of weights and of what the optimizer keeps."""
  step = make(MESHES["mixed"], TERMS, tx=lambda mask: optax.adam(0.1))
  state = step.init()
  kernel = lambda tree: tree["model"]["blocks"]["mlp"]["up"]["kernel"]
  for tree in (state.trained, state.opt_state[0].mu):
    assert kernel(tree).shape == (3, 16, 32)
    assert {s.data.shape for s in kernel(tree).addressable_shards} == {(3, 8, 16)}
  after = step(state, put_batch(BATCH, step.mesh), 0)[0]
  assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, step.abstract())
  whole = local(after.trained)
  assert {len(x.devices()) for x in jax.tree.leaves(whole)} == {1}


@pytest.mark.slow
def test_shards_train_members_of_their_own_on_a_mixed_mesh():
  members = (MIDDLE, SPACE.smallest)
  found = loss_and_gradient(make(MESHES["mixed"], (Term((members,)),), "one_program"))
  alone, total = make({"data": 1}, (Term((MIDDLE,)), Term((SPACE.smallest,)))), []
  for k, member in enumerate(members):
    half = {name: value[4 * k:4 * (k + 1)] for name, value in BATCH.items()}
    step = make({"data": 1}, (Term((member,), 0.5),))
    state, metrics = step(alone.init(), put_batch(half, step.mesh), 0)
    total.append((metrics["loss"], state.opt_state))
  close(found, jax.tree.map(jnp.add, *total))


@pytest.mark.parametrize("mesh, space, message", [
  ({"data": 16}, {}, "needs 16 devices, 8 are here"),
  ({"model": 3}, {}, r"mesh.model=3 does not divide the groups of heads, 4.*mesh.model of \[1, 2, 4\]"),
  ({"model": 4}, {"groups": {"heads": 4}}, r"groups of mlp, 1.*space.groups.mlp of \[4, 8, 16\]"),
  ({"model": 4}, {"heads": (8,), "mlp": (32,), "groups": {"heads": 2, "mlp": 4}}, r"groups of heads, 2.*\[4, 8\]"),
  ({"fsdp": 7}, {}, "mesh.fsdp=7 divides no axis")])
def test_what_does_not_divide_is_named(mesh, space, message):
  sizes = dict(layers=(2, 3), embed=(8, 16), heads=(4, 8), mlp=(16, 32), groups=GROUPS) | space
  with pytest.raises(ValueError, match=message):
    make(mesh, TERMS, space=Space(**sizes))


def test_axes_outside_the_space_must_divide_too():
  with pytest.raises(ValueError, match=r"mesh.model=8 does not divide mlp=12; allowed are \[1, 2, 3, 4, 6, 12\]"):
    make({"model": 8}, TERMS, model=MODEL.clone(mlp=12),
         space=Space(layers=(2, 3), heads=(8,), groups={"heads": 8}))


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["slice", "one_program"])
def test_a_batch_in_parts_is_the_batch(execution):
  """Losses are means over the batch: of four parts they are the whole's, teacher and candidates too."""
  terms = (*TERMS[:2], Term((SPACE.smallest, MIDDLE), taught=True))
  step = make({"data": 2}, terms, execution, accumulate=4)
  state, metrics = step(step.init(), put_batch(BATCH, step.mesh), 0)
  whole = make({"data": 1}, terms)
  expected, own = whole(whole.init(), put_batch(BATCH, whole.mesh), 0)
  close((metrics["loss"], state.opt_state), (own["loss"], expected.opt_state))
