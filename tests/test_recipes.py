"""A step of the recipes of Once-for-All's family is its paper's formula by hand; phases resume exactly."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import build, recipes, training
from nestnet.axes import axes
from nestnet.execution import Supernet
from nestnet.models.layers import Linear
from nestnet.objectives import objective
from nestnet.phases import SORT
from nestnet.sampling import Context, sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.space import Space
from nestnet.steps import Recipe, Step

CLASSES, BATCH, AT = 5, 8, 7


class Net(nn.Module):
  """A perceptron with the axes of a mobile network: quick to compile, its forward easy to write by hand."""

  kernel_1: int
  layers_1: int
  expand_1: int
  classes: int = CLASSES

  @nn.compact
  def __call__(self, images, *, train=False):
    x = jnp.tanh(Linear("pixels -> kernel_1", (self.kernel_1,), name="stem")(images.reshape(len(images), -1)))
    x = Linear("kernel_1 -> expand_1", (self.expand_1,), name="up")(x)
    for gate in self.param("gates", axes(nn.initializers.normal(), "-> layers_1"), (self.layers_1,)):
      x = x + gate * jnp.tanh(x)
    return {"features": x, "logits": Linear("expand_1 -> classes", (self.classes,), name="head")(x)}


SIZES = dict(kernel_1=(4, 6, 8), layers_1=(1, 2, 3), expand_1=(4, 6, 8))
SPACE = Space(**SIZES)


def capture(mask):
  """An optimizer that steps against the gradient and keeps it, exactly, as its state."""
  del mask
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.negative, grads), grads))


def made(name, context=Context(), **changes):
  """The recipe called `name` as a run makes it, on the tiny space."""
  config = recipes.recipe(name)
  options = config["sampler"] | changes
  kept = {k: config[k] for k in ("teacher", "ema", "select", "judge", "untouched")}
  drawn = sampler(options.pop("name"), SPACE, 3, context=context, **options)
  return Recipe(drawn, objective(**config["objective"]), **kept)


def example(seed=0):
  rng = np.random.default_rng(seed)
  return {"image": rng.normal(size=(BATCH, 4, 4, 1)).astype(np.float32),
          "label": rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def noisy(tree, seed):
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [
    jnp.asarray(np.asarray(x) + rng.normal(0, 0.5, x.shape), x.dtype) for x in leaves])


# The formulas.


def logits(params, images, kernel_1, layers_1, expand_1):
  """The output of a member, its leading slices written out."""
  k, e = slice(kernel_1), slice(expand_1)
  x = images.reshape(len(images), -1)
  x = jnp.tanh(x @ params["stem"]["kernel"][:, k] + params["stem"]["bias"][None, k])
  x = x @ params["up"]["kernel"][k, e] + params["up"]["bias"][None, e]
  for layer in range(layers_1):
    x = x + params["gates"][layer] * jnp.tanh(x)
  return x @ params["head"]["kernel"][e] + params["head"]["bias"][None]


def log_softmax(x):
  x = x - x.max(axis=1, keepdims=True)
  return x - jnp.log(jnp.exp(x).sum(axis=1, keepdims=True))


def ce(x, labels, smoothing=0.1):
  target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
  return -(target * log_softmax(x)).sum(axis=1).mean()


def kd(x, teacher):
  return -(jnp.exp(log_softmax(teacher)) * log_softmax(x)).sum(axis=1).mean()


def adaptive(x, teacher):
  """AlphaNet: for each example the α of -1 and 1 whose divergence is larger, w clamped to 5."""
  p, log_q = jnp.exp(log_softmax(teacher)), log_softmax(x)
  q = jax.lax.stop_gradient(jnp.exp(log_q))
  r = p / q
  w = jnp.minimum(1 / r, 5.0)
  low, high = (q * (w / 2 - 1 / 2)).sum(axis=1), (q * r * jnp.log(r)).sum(axis=1)
  rho = jnp.where((low > high)[:, None], -w + 1 / 2, r)
  return -(q * jax.lax.stop_gradient(rho) * log_q).sum(axis=1).mean()


def family(trained, frozen, batch):
  """`out(member)`, and what the largest of this step and the frozen network say, gradients stopped."""
  out = lambda member: logits(trained["model"], batch["image"], **member)
  largest = jax.lax.stop_gradient(out(SPACE.largest))
  return out, largest, None if frozen is None else logits(frozen["model"], batch["image"], **SPACE.largest)


def shrinking(trained, frozen, batch, drawn):
  """Once-for-All: labels, smoothed, and the frozen network, summed over four random members."""
  out, _, teacher = family(trained, frozen, batch)
  assert len(drawn) == 4
  return sum(ce(out(m), batch["label"]) + kd(out(m), teacher) for (m,) in drawn)


def alone(trained, frozen, batch, drawn):
  """RSS: one random member, labels."""
  ((member,),) = drawn
  return ce(family(trained, frozen, batch)[0](member), batch["label"], 0.0)


def sandwich(relation, weight=1.0):
  """The largest by labels, two others and the smallest by the largest alone."""
  def total(trained, frozen, batch, drawn):
    out, largest, _ = family(trained, frozen, batch)
    (first,), *others, (last,) = drawn
    assert first == SPACE.largest and last == SPACE.smallest and len(others) == 2
    return ce(out(first), batch["label"]) + weight * sum(
      relation(out(m), largest) for m in (*(m for (m,) in others), last))
  return total


def picked(pick, trained, batch, drawn):
  """AttentiveNAS: two of the members are each the best or the worst by labels of three."""
  loss = lambda m: float(ce(logits(trained["model"], batch["image"], **m), batch["label"]))
  assert [len(candidates) for candidates in drawn] == [1, 3, 3, 1]
  return [(pick(candidates, key=loss),) for candidates in drawn]


# In DεpS 3 of 10 steps of the ramp are over at step 7, in a phase of 20 steps that began at step 4.
CASES = {
  "ofa": (shrinking, {"n": 4}), "rss": (alone, {}), "bignas": (sandwich(kd), {}),
  "deps": (sandwich(kd, 0.3), {"context": Context(4, 20), "ramp": 0.5}),
  "attentive_nas": (sandwich(kd), {"table": 60, "buckets": 4}),
  "attentive_nas_worst_up": (sandwich(kd), {"table": 60, "buckets": 4}),
  "alphanet": (sandwich(adaptive), {}),
}


PICKS = {"attentive_nas": min, "attentive_nas_worst_up": max}
SLOW = ("bignas", "ofa", "attentive_nas_worst_up")


@pytest.mark.parametrize("name", [
  pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_gradient_is_the_formula(name):
  formula, options = CASES[name]
  supernet = Supernet(Net(8, 3, 8), SPACE, (jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32),))
  step = Step(supernet, made(name, **options), capture, make_mesh({"data": 1}), seed=1)
  # Zeros compile nothing, and noise comes on top.
  state, batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), step.abstract()), example()
  trained, frozen = noisy(state.trained, 0), noisy(state.trained, 5)
  frozen = frozen if step.recipe.teacher == "frozen" else None
  state = jax.device_put(state.replace(trained=trained, teacher=frozen, step=jnp.int32(AT)),
                         jax.tree.map(lambda x: x.sharding, step.abstract()))
  trained, frozen = jax.device_get((trained, frozen))
  drawn = [term.candidates for term in step.recipe.sampler.terms(AT)]
  if name in PICKS:
    drawn = picked(PICKS[name], trained, batch, drawn)
  loss, wanted = jax.jit(jax.value_and_grad(lambda trained: formula(trained, frozen, batch, drawn)))(trained)
  state, metrics = step(state, put_batch(batch, step.mesh), AT)
  found = jax.device_get(state.opt_state)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, wanted)
  np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
  assert any(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(found))


def test_compofa_differs_from_ofa_in_its_space_and_phases_alone():
  ofa, compofa = (recipes.recipe(name) for name in ("ofa", "compofa"))
  # The phases of the one say how many members train at a step.
  ofa["sampler"]["n"] = 4
  assert ofa | {"name": "compofa"} == compofa


def test_ofa_regularises_its_members_and_sandwiches_their_largest_alone():
  assert [t.regularised for t in made("ofa", n=4).sampler.terms(0)] == 4 * [True]
  for name in ("bignas", "deps", "alphanet"):
    assert [t.regularised for t in made(name).sampler.terms(0)] == [True, False, False, False]


# Progressive shrinking as one run.


class Data:
  """Batches as a function of the step; what `at` names for a step is called."""

  def __init__(self, at=None):
    self.at = at or {}

  def __getitem__(self, step):
    if step in self.at:
      self.at[step]()
    return example(step)


def phased_run(name, steps, enter, space=SIZES):
  config = {
    "seed": 0, "model": {"name": "recipe_net:Net", "kernel_1": 8, "layers_1": 3, "expand_1": 8},
    "space": space, "recipe": recipes.recipe(name), "phases": recipes.phases(name, space, enter),
    "data": {"name": "nowhere", "shape": (4, 4, 1), "classes": CLASSES},
    "optim": recipes.optim("ofa") | {"learning_rate": 0.1},
    "train": {"steps": steps, "batch_size": BATCH, "checkpoint_every": 1, "log_every": 1, "eval_every": 0},
    "mesh": {"data": 1}}
  return build.planned(config, jax.devices()[:1])[0]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def die():
  raise KeyboardInterrupt


@pytest.fixture
def network(tmp_path, monkeypatch):
  """The network of this file, where a config finds it."""
  (tmp_path / "recipe_net.py").write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  import recipe_net
  recipe_net.Net = Net


@pytest.mark.slow
@pytest.mark.parametrize("sorts", [False, True])
def test_shrinking_is_one_run_that_resumes_at_every_boundary(sorts, tmp_path, network):
  phases = phased_run("ofa", 14, SORT if sorts else "")
  lengths = [phase.steps for phase in phases]
  assert sum(lengths) == 14 and len(lengths) == 6
  assert [phase.step.supernet.space.size for phase in phases] == [1, 3, 6, 9, 18, 27]
  assert [len(phase.step.recipe.sampler.terms(0)) for phase in phases] == [1, 1, 2, 2, 4, 4]
  seen = {}

  def watch(step, state):
    seen[int(state.step)] = jax.device_get((state.trained, state.teacher))
    return {}

  def train(workdir, data=Data(), **options):
    return training.train(
      phases, data, workdir, checkpoint_every=1, log_every=1, show_progress=False, **options)

  whole = train(tmp_path / "whole", eval_every=1, evaluate=watch).state
  ends = np.cumsum(lengths)
  original = seen[ends[0]][0]
  assert seen[ends[0]][1] is None
  # Sorting gives a teacher's units another order, and leaves what it computes as it is.
  for step in range(ends[0] + 1, ends[3] + 1 if sorts else 14):
    same(seen[step][1], original)
  image = example()["image"]
  says = lambda trained: logits(jax.device_get(trained)["model"], image, **SPACE.largest)
  np.testing.assert_allclose(says(whole.teacher), says(original), atol=1e-6)
  if not sorts:
    same(whole.teacher, original)
  assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, jax.device_get((whole.trained, original)))))
  # The schedule began anew with the optimizer.
  assert optax.tree_utils.tree_get(whole.opt_state, "count") == lengths[-1]

  for end in ends[:-1]:
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path / "killed", Data({int(end): die}))
  again = train(tmp_path / "killed").state
  same(again, whole)


COUPLED = {"kernel_1": (8,), "couple": {"layers_1 expand_1": ((1, 4), (2, 6), (3, 8))}}


@pytest.mark.slow
@pytest.mark.parametrize("name, space", [("deps", SIZES), ("compofa", COUPLED)], ids=["deps", "compofa"])
def test_other_phases_resume_at_their_boundaries(name, space, tmp_path, network):
  """Units are sorted at the first, in DεpS those of the optimizer's momentum too."""
  phases = phased_run(name, 9, SORT, space)
  train = lambda folder, data=Data(): training.train(
    phases, data, tmp_path / folder, checkpoint_every=1, log_every=1, show_progress=False).state
  whole = train("whole")
  for end in np.cumsum([phase.steps for phase in phases])[:-1]:
    with pytest.raises(KeyboardInterrupt):
      train("killed", Data({int(end): die}))
  same(train("killed"), whole)
  counted = phases[-1].steps if name == "compofa" else 9
  assert optax.tree_utils.tree_get(whole.opt_state, "count") == counted
