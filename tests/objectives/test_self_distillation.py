"""The loss of POA against its table written out by hand."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import Space, take
from nestnet.choices import spaced
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.models.layers import Linear
from nestnet.models.vit import ViT
from nestnet.objectives import Targets, objective
from nestnet.objectives.self_distillation import sinkhorn, spreading
from nestnet.optim import optimizer, rising
from nestnet.sampling import on_shards, sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.steps import Recipe, Step


class Net(nn.Module):
  """A network of patches that is quick to compile: two layers, and their mean over an image of any size."""

  embed: int
  mlp: int
  width_scaling: str = "ratio"

  @nn.compact
  def __call__(self, images, *, train=False):
    b, h, w, c = images.shape
    x = images.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, -1, 4 * c)
    x = jnp.tanh(Linear("pixels -> mlp", (self.mlp,), name="up")(x))
    x = Linear("mlp -> embed", (self.embed,), scaling=self.width_scaling, name="down")(x)
    return {"features": x.mean(1), "tokens": x}

  @property
  def representation(self):
    return "embed", self.embed


MODEL = Net(embed=24, mlp=48)
SPACE = Space(couple={"embed mlp": ((8, 16), (12, 24), (16, 32), (24, 48))})
OPTIONS = dict(prototypes=(5, 7), hidden=12, bottleneck=6, warmup_steps=10)
B, LOCALS = 16, 3


def example_batch(masks=False):
  rng = np.random.default_rng(3)
  batch = {"global": rng.standard_normal((B, 2, 8, 8, 1)).astype(np.float32),
           "local": rng.standard_normal((B, LOCALS, 4, 4, 1)).astype(np.float32)}
  return batch | ({"mask": rng.random((B, 2, 16)) < 0.4} if masks else {})


def supernet(model, space):
  return Supernet(model, space, (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),))


@functools.cache
def family():
  return supernet(MODEL, SPACE)


def make(drawn=None, devices=1, of=None, **options):
  made = objective("self_distillation", **OPTIONS | options)
  recipe = Recipe(drawn or sampler("intact", SPACE, seed=1, n=2), made, teacher="ema",
                  ema=rising(0.9, 1.0, 0, 10), hands_out="teacher")
  rate = optax.constant_schedule(0.1)
  return Step(of or family(), recipe, optimizer("sgd", rate, momentum=0.0), make_mesh({"data": devices}))


def randomised(tree, seed):
  """Random weights, so that no norm is without effect."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [
    x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves])


def started(step):
  """From zeros and not from `step.init()`, which takes long to compile."""
  state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), step.abstract())
  state = state.replace(trained=randomised(state.trained, 1), teacher=randomised(state.teacher, 2))
  return jax.device_put(state, jax.tree.map(lambda s: s.sharding, step.abstract()))


# The table of the method by hand, in float64.

def unit(x, axis=-1):
  return x / np.sqrt((x ** 2).sum(axis, keepdims=True))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def by_hand_scores(head, x, ratio=1.0):
  head = jax.tree.map(np.float64, head)
  n = x.shape[-1]
  x = gelu(ratio * x @ head["up"]["kernel"][:n] + head["up"]["bias"])
  x = gelu(x @ head["middle"]["kernel"] + head["middle"]["bias"])
  x = unit(x @ head["down"]["kernel"] + head["down"]["bias"])
  return x @ unit(head["prototypes"]["kernel"], 0) * head["prototypes"]["gain"]


def by_hand_sinkhorn(x):
  q = np.exp(x.reshape(-1, x.shape[-1])).T
  q /= q.sum()
  for _ in range(3):
    q /= q.sum(1, keepdims=True) * q.shape[0]
    q /= q.sum(0, keepdims=True) * q.shape[1]
  return (q * q.shape[1]).T.reshape(x.shape)


def features(params, subnet, images, **options):
  small = take(params["model"], family().axes["params"], subnet)
  crops = images.reshape(-1, *images.shape[2:])
  apply = jax.jit(lambda v, x: family().module(subnet).apply({"params": v}, x, **options))
  return np.float64(apply(small, crops)["features"]).reshape(*images.shape[:2], -1)


def entropy(p, q):
  return -(p * np.log(q)).sum(-1)


def koleo(x):
  x = unit(x)
  near = [min(np.sqrt(((a - b) ** 2).sum()) for j, b in enumerate(x) if i != j) for i, a in enumerate(x)]
  return -np.log(near).mean()


def by_hand(state, batch, members, temperature, weight=0.8, koleo_share=0.05):
  """Rows of the table: cross-view and same-view terms, and KoLeo, of the intact and of elastic students."""
  student, teacher = jax.device_get(state.trained), jax.device_get(state.teacher)
  whole = SPACE.largest
  seen = {view: features(student, whole, batch[view]) for view in ("global", "local")}
  heads = student["objective"]
  targets = {h: by_hand_sinkhorn(by_hand_scores(teacher["objective"][h], features(teacher, whole, batch["global"]))
                                 / temperature) for h in heads}
  of_intact = {h: {v: softmax(by_hand_scores(heads[h], x) / 0.1) for v, x in seen.items()} for h in heads}

  def cross(h, own):
    g, l = own["global"], own["local"]
    pairs = [entropy(targets[h][:, 1], g[:, 0]).mean(), entropy(targets[h][:, 0], g[:, 1]).mean()]
    more = [entropy(targets[h][:, t], l[:, n]).mean() for t in range(2) for n in range(LOCALS)]
    return np.mean(pairs + more)

  spread = lambda x: koleo_share * (koleo(x[:, 0]) + koleo(x[:, 1]))
  total = weight * np.mean([cross(h, of_intact[h]) for h in heads]) + spread(seen["global"])
  for member in members:
    x = {view: features(student, member, batch[view]) for view in ("global", "local")}
    own = {h: {v: softmax(by_hand_scores(heads[h], f, 24 / member["embed"]) / 0.1) for v, f in x.items()}
           for h in heads}
    same = np.mean([sum(entropy(of_intact[h][v], own[h][v]).mean() for v in own[h]) for h in heads])
    crosses = np.mean([cross(h, own[h]) for h in heads])
    total += ((1 - weight) * (crosses + same) + spread(x["global"])) / len(members)
  return total


def test_a_step_has_the_loss_of_the_table():
  step = make()
  state, batch = started(step), example_batch()
  # The temperature is at 4 of 10 steps of its warm-up.
  state = state.replace(step=jnp.asarray(4, jnp.int32))
  members = [term.candidates[0] for term in step.recipe.sampler.terms(4)[1:]]
  assert len(members) == 2 and SPACE.largest not in members
  expected = by_hand(state, batch, members, 0.04 + 0.4 * 0.03)
  before = jax.device_get((state.trained, state.teacher))
  state, metrics = step(state, put_batch(batch, step.mesh), 4)
  np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=1e-6)
  # The teacher moves towards what the students have become, by the cosine's share at this step.
  share = 0.1 * 0.5 * (1 + math.cos(math.pi * 0.4))
  jax.tree.map(lambda old, new, teacher: np.testing.assert_allclose(
    teacher, old + share * (new - old), rtol=1e-5, atol=1e-6), before[1], *jax.device_get((state.trained, state.teacher)))


def test_the_teacher_is_handed_out():
  step = make()
  state = started(step)
  small = step.member(state, SPACE.smallest)["params"]
  expected = take(state.teacher["model"], family().axes["params"], SPACE.smallest)
  jax.tree.map(np.testing.assert_array_equal, small, expected)


# Terms of the loss on features as they might be.

@functools.cache
def heads(seed):
  made = objective("self_distillation", **OPTIONS)
  params, _, _ = jax.eval_shape(lambda: (made.init(jax.random.key(0), MODEL, SPACE)[0], 0, 0))
  return randomised(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), params), seed)


def example_outputs(seed):
  rng = np.random.default_rng(seed)
  return {"global": rng.standard_normal((B, 2, 24)).astype(np.float32),
          "local": rng.standard_normal((B, LOCALS, 24)).astype(np.float32),
          "patches": rng.standard_normal((B, 2, 16, 24)).astype(np.float32)}


def term(params, batch, step, elastic=False, **options):
  """The loss of one term and its metrics, its teacher's targets, and the state after an update."""
  made = objective("self_distillation", **OPTIONS | options)
  _, _, state = made.init(jax.random.key(0), MODEL, SPACE)
  teacher = made.teach(heads(2), state, example_outputs(5), batch, step)
  first = made.share(params, state, example_outputs(6), batch, step) if elastic else None
  value, metrics = made.loss(params, state, example_outputs(7), Targets(batch, teacher, first), step, None)
  return value, metrics, teacher, made.update and made.update(state, None, teacher, step)


def terms(elastic=False, step=0, batch=None, **options):
  return jax.jit(functools.partial(term, elastic=elastic, **options))(heads(1), batch or {}, step)


def spread(weight):
  x = np.float64(example_outputs(7)["global"])
  return weight * (koleo(x[:, 0]) + koleo(x[:, 1]))


def test_options_where_paper_and_code_differ():
  value, _, teacher, _ = terms(koleo=0.0, pairs="separate")
  found = []
  for name, head in heads(1).items():
    own = {v: softmax(by_hand_scores(head, np.float64(example_outputs(7)[v])) / 0.1) for v in ("global", "local")}
    t = np.float64(teacher["global"][name])
    near = [entropy(t[:, 1], own["global"][:, 0]).mean(), entropy(t[:, 0], own["global"][:, 1]).mean()]
    far = [entropy(t[:, i], own["local"][:, n]).mean() for i in range(2) for n in range(LOCALS)]
    found.append(np.mean(near) + np.mean(far))
  np.testing.assert_allclose(value, 0.8 * np.mean(found), rtol=1e-5)
  whole = {kind: terms(kind, koleo=0.0)[0] for kind in (False, True)}
  both = [terms(kind, koleo_reduce=reduce)[0] - whole[kind] for reduce in ("mean", "sum") for kind in whole]
  np.testing.assert_allclose(both, [spread(0.05)] * 2 + [spread(0.1)] * 2, rtol=1e-3)
  crossed = terms(True, koleo=0.0, same_view=0.0)[0]
  np.testing.assert_allclose(crossed / 0.2, whole[False] / 0.8, rtol=1e-5)


def test_masked_patches_are_learned_from_the_teachers_whole_image():
  batch = example_batch(masks=True)
  value, metrics, _, _ = terms(patches=0.5, patch_delay=3, batch=batch)
  expected = []
  for name, head in heads(1).items():
    raw = by_hand_scores(heads(2)[name], np.float64(example_outputs(5)["patches"])) / 0.04
    targets = np.zeros_like(raw)
    targets[batch["mask"]] = by_hand_sinkhorn(raw[batch["mask"]])
    own = softmax(by_hand_scores(head, np.float64(example_outputs(7)["patches"])) / 0.1)
    each = entropy(targets, own) * batch["mask"]
    expected.append((each.sum(-1) / np.maximum(batch["mask"].sum(-1), 1)).mean())
  np.testing.assert_allclose(metrics["patches"], np.mean(expected), rtol=1e-5)
  without = terms(batch=batch)[0]
  np.testing.assert_allclose(value, without, rtol=1e-6)
  begun = terms(patches=0.5, patch_delay=3, step=3, batch=batch)[0] - terms(step=3, batch=batch)[0]
  np.testing.assert_allclose(begun, 0.8 * 0.5 * terms(patches=0.5, step=3, batch=batch)[1]["patches"], rtol=1e-4)


def test_students_see_masks_and_teachers_do_not():
  made, batch, seen = objective("self_distillation", **OPTIONS, patches=1.0), example_batch(masks=True), []

  def apply(images, mask=None):
    seen.append((images.shape, None if mask is None else mask.shape))
    return {"features": images[:, 0, :, 0], "tokens": jnp.zeros((len(images), 17, 24))}

  outputs = made.forward(apply, batch)
  assert {name: x.shape[:2] for name, x in outputs.items()} == {
    "global": (B, 2), "local": (B, LOCALS), "patches": (B, 2)}
  assert outputs["patches"].shape == (B, 2, 16, 24)
  np.testing.assert_array_equal(outputs["local"], batch["local"][:, :, 0, :, 0])
  assert set(made.forward_teacher(apply, batch)) == {"global", "patches"}
  assert seen == [((2 * B, 8, 8, 1), (2 * B, 16)), ((LOCALS * B, 4, 4, 1), None), ((2 * B, 8, 8, 1), None)]


def test_cells_of_a_mask_take_the_nearest_token_of_a_coarser_map():
  made, batch = objective("self_distillation", **OPTIONS, patches=1.0), example_batch(masks=True)
  give = lambda count: lambda images, mask=None: {
    "features": images[:, 0, :, 0], "tokens": jnp.broadcast_to(jnp.arange(count)[None, :, None], (len(images), count, 24))}
  found = made.forward(give(4), batch)["patches"][0, 0, :, 0]
  np.testing.assert_array_equal(found.reshape(4, 4), [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
  with pytest.raises(UserError, match="masks of 16 patches, and the network gives 9 tokens"):
    made.forward(give(9), batch)


def test_centers_follow_the_teachers_scores():
  _, _, teacher, state = terms(centering="ema", center_momentum=0.75)
  for name, head in heads(2).items():
    raw = by_hand_scores(head, np.float64(example_outputs(5)["global"]))
    np.testing.assert_allclose(state["global"][name], 0.25 * raw.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(teacher["global"][name], softmax(raw / 0.04), rtol=1e-3, atol=1e-5)
  made = objective("self_distillation", **OPTIONS | {"centering": "ema"})
  moved = jax.jit(made.teach)(heads(2), state, example_outputs(5), {}, 0)["global"]["head_1"]
  raw = by_hand_scores(heads(2)["head_1"], np.float64(example_outputs(5)["global"]))
  np.testing.assert_allclose(moved, softmax((raw - np.float64(state["global"]["head_1"])) / 0.04), rtol=1e-3, atol=1e-5)


def test_prototypes_that_are_frozen_have_no_gradient():
  gradient = jax.jit(jax.grad(lambda params, step: term(params, {}, step, frozen_steps=2)[0]))
  for step, learns in ((1, False), (2, True)):
    found = gradient(heads(1), step)
    for head in found.values():
      assert all(np.any(leaf) == learns for leaf in jax.tree.leaves(head["prototypes"]))
      assert np.any(head["up"]["kernel"])


@pytest.mark.slow
def test_elastic_students_of_their_own_on_shards_are_those_one_by_one():
  shards, space = 8, Space(layers=spaced(3, (2, 3)), couple={
    "embed heads mlp": ((8, 1, 16), (16, 2, 32), (24, 3, 48))})
  vit = supernet(ViT(layers=3, embed=24, heads=3, mlp=48, classes=0, patch=2, head_dim=8, pool="token",
                     layer_scale=0.5, width_scaling="ratio"), space)
  step = make(on_shards([sampler("intact", space, seed=k) for k in range(shards)]), shards, vit)
  state, batch = started(step), example_batch()
  drawn = step.recipe.sampler.terms(0)[1].candidates[0]
  assert isinstance(drawn, tuple) and len(set(drawn)) > 2
  whole, before = make(sampler("intact", space, seed=1), of=vit), jax.device_get(state)
  terms, gradients = whole.recipe.sampler.terms(0), whole._gradients
  operands = before.trained, before.fixed, before.objective
  seen = gradients.teacher.call(before.teacher, *operands[1:], batch, 0)
  sums = whole._zeros(before.trained)
  sums, shared, _ = gradients.gradient(space.largest, terms[0], "share").call(
    *operands, batch, (seen, None), 0, whole._key, 0, 1.0, sums)
  part = B // shards
  for k, member in enumerate(drawn):
    rows = jax.tree.map(lambda x: x[k * part:(k + 1) * part], (batch, seen, shared))
    sums, _, _ = gradients.gradient(member, terms[1], None).call(
      *operands, rows[0], rows[1:], 0, whole._key, 1, 1 / shards, sums)
  after, metrics = step(state, put_batch(batch, step.mesh), 0)
  np.testing.assert_allclose(float(metrics["loss"]), float(sums["loss"]), rtol=1e-5)
  jax.tree.map(lambda old, new, grad: np.testing.assert_allclose(
    old - 0.1 * grad, new, rtol=1e-4, atol=1e-5), before.trained, *jax.device_get((after.trained, sums["grads"])))


def test_sinkhorn_uses_all_prototypes_alike_and_counts_only_its_rows():
  x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32) * 5
  found = sinkhorn(jnp.asarray(x), jnp.ones(6, bool), 50)
  np.testing.assert_allclose(found.sum(0), 2, rtol=1e-3)
  np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
  rows = np.array([True] * 4 + [False] * 2)
  np.testing.assert_allclose(sinkhorn(jnp.asarray(x), jnp.asarray(rows), 3)[:4], sinkhorn(
    jnp.asarray(x[:4]), jnp.ones(4, bool), 3), rtol=1e-5)


def test_koleo_is_finite_where_images_repeat():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
  x = x.at[3].set(x[2])
  value, gradient = jax.jit(jax.value_and_grad(spreading))(x)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  np.testing.assert_allclose(spreading(x[:3]), koleo(np.float64(x[:3])), rtol=1e-5)


def test_a_collapse_is_told_once_it_lasts():
  made = objective("self_distillation", **OPTIONS, told_after=20)
  healthy = {"cross_view": 1.0, "effective_rank": 9.0, "teacher_entropy_of_mean": 1.5}
  assert made.watch(100, healthy) == ""
  uniform = healthy | {"cross_view": (math.log(5) + math.log(7)) / 2}
  assert made.watch(19, uniform) == ""
  assert "ln K" in made.watch(20, uniform)
  assert "one direction" in made.watch(20, healthy | {"effective_rank": 1.0})
  assert "one prototype" in made.watch(20, healthy | {"teacher_entropy_of_mean": 0.0})


@pytest.mark.parametrize("options, message", [
  (dict(prototypes=(1, 8)), r"prototypes=\[1, 8\].*at least 2"),
  (dict(prototypes=()), "prototypes"),
  (dict(centering="mean"), "sinkhorn, ema"),
  (dict(intact_weight=1.5), r"intact_weight=1.5.*\[0, 1\] for the next two"),
  (dict(iterations=0), "iterations=0.*at least 1 for the first three"),
  (dict(center_momentum=-0.1), "center_momentum=-0.1"),
  (dict(teacher_temperature=0.0), "temperatures 0.1, 0.0, 0.04"),
  (dict(koleo=-0.1), "koleo=-0.1"),
])
def test_options_out_of_range(options, message):
  with pytest.raises(UserError, match=message):
    objective("self_distillation", **OPTIONS | options)


def test_a_term_without_a_teacher_is_an_error():
  made = objective("self_distillation", **OPTIONS)
  with pytest.raises(UserError, match="recipe.teacher=ema"):
    made.loss({}, {}, {}, Targets({}), 0, None)
