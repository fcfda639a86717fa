"""A step of every recipe and option is the formula of its paper, written out by hand here."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import optim, recipes
from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.models.layers import Linear
from nestnet.models.vit import ViT
from nestnet.objectives import Objective, objective
from nestnet.sampling import Sampler, Term, sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.space import Space
from nestnet.steps import Recipe, Step
from nestnet.subnet import Subnet

CLASSES, BATCH, PIXELS = 5, 8, 16


class Net(nn.Module):
  """A residual network of one block: quick to compile, its forward easy to write by hand."""

  embed: int
  mlp: int
  features: int | None = None
  classes: int = CLASSES
  dropout: float = 0.0

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1))
    h = jnp.tanh(Linear("embed -> mlp", (self.mlp,), name="up")(x))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    x += Linear("mlp -> embed", (self.embed,), name="down")(h)
    features = x[:, :self.features]
    names = "features -> classes" if self.features else "embed -> classes"
    return {"features": features, "logits": Linear(names, (self.classes,), name="head")(features)}


SPACE = Space(embed=(4, 6, 8), mlp=(4, 12))
MATRYOSHKA = Space(features=(2, 4, 8))


def capture(mask):
  """An optimizer that steps against the gradient and keeps it, exactly, as its state."""
  del mask
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.negative, grads), grads))


def family(space=SPACE, **fields):
  model = Net(**{"embed": 8, "mlp": 12, **space.largest, **fields})
  return Supernet(model, space, (jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32),))


def as_recipe(name, space, *, drawn=None, arguments=None, sampling=None, loss=None, **fields):
  """The recipe called `name` as a run makes it, some of its entries replaced."""
  config = recipes.recipe(name, **(arguments or {}))
  options = config["sampler"] | (sampling or {})
  made = drawn or sampler(options.pop("name"), space, 3, **options)
  kept = {k: config[k] for k in ("teacher", "ema", "select", "untouched")}
  return Recipe(made, objective(**config["objective"] | (loss or {})), **kept | fields)


def make(name, space=SPACE, *, optimizer=capture, devices=1, supernet=None, **options):
  return Step(supernet or family(space), as_recipe(name, space, **options), optimizer,
              make_mesh({"data": devices}), seed=1)


def noisy(tree, seed=0):
  """A tree of the same shapes, no leaf zero: biases must matter."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [
    jnp.asarray(np.asarray(x) + rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves])


def start(step, at=0, teacher_seed=5):
  """A state with random weights, and its host copy (a step takes the state's buffers)."""
  # Zeros compile nothing, and noise comes on top.
  state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), step.abstract())
  trained = noisy(state.trained)
  teacher = None if state.teacher is None else noisy(state.trained, teacher_seed)
  state = jax.device_put(
    state.replace(trained=trained, teacher=teacher, step=jnp.int32(at)),
    jax.tree.map(lambda x: x.sharding, step.abstract()))
  return state, jax.device_get((trained, teacher))


def example_batch(side=4, seed=0):
  rng = np.random.default_rng(seed)
  return {"image": rng.normal(size=(BATCH, side, side, 1)).astype(np.float32),
          "label": rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def gradient(step, state, batch, at=0):
  state, metrics = step(state, put_batch(batch, step.mesh), at)
  return jax.device_get(state.opt_state), metrics, state


def close(found, wanted, tolerance=1e-6):
  """To a share of 1, or of an array's largest number where that is more."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
    a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0))), found, wanted)


# The formulas.


def forward(params, images, embed=8, mlp=12, features=None):
  """Features and logits of a member, its leading slices written out."""
  p = params
  x = images.reshape(len(images), -1)
  x = x @ p["stem"]["kernel"][:, :embed] + p["stem"]["bias"][None, :embed]
  h = jnp.tanh(x @ p["up"]["kernel"][:embed, :mlp] + p["up"]["bias"][None, :mlp])
  x = x + h @ p["down"]["kernel"][:mlp, :embed] + p["down"]["bias"][None, :embed]
  x = x[:, :features]
  return x, x @ p["head"]["kernel"][:x.shape[1]] + p["head"]["bias"][None]


def log_softmax(logits):
  logits = logits - logits.max(axis=1, keepdims=True)
  return logits - jnp.log(jnp.exp(logits).sum(axis=1, keepdims=True))


def label_loss(logits, labels, smoothing=0.0):
  target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
  return -(target * log_softmax(logits)).sum(axis=1).mean()


def soft_loss(logits, teacher, temperature=1.0):
  target = jnp.exp(log_softmax(teacher / temperature))
  return -temperature ** 2 * (target * log_softmax(logits / temperature)).sum(axis=1).mean()


def feature_loss(student, teacher):
  def unit(x):
    return x / (jnp.sqrt((x ** 2).sum(axis=1, keepdims=True)) + 1e-6)
  return ((unit(student) - unit(teacher[:, :student.shape[1]])) ** 2).sum(axis=1).mean()


def hand(trained, teacher, batch, terms, smoothing=0.0, labels=0.0, soft=1.0, temperature=1.0,
         space="logits", ramp=1.0):
  """The sum over terms: CE where the labels teach, a mixture of CE and KD where a teacher does."""
  taught_by = jax.lax.stop_gradient(
    forward(trained["model"] if teacher is None else teacher["model"], batch["image"]))
  total = 0.0
  for term in terms:
    features, logits = forward(trained["model"], batch["image"], **term.candidates[0])
    ce = label_loss(logits, batch["label"], smoothing)
    if term.taught:
      kd = (feature_loss(features, taught_by[0]) if space == "features"
            else soft_loss(logits, taught_by[1], temperature))
      ce = (1 - ramp) * ce + ramp * (labels * ce + soft * kd)
    total += term.weight * ce
  return total


CASES = {
  "separate": ("separate", {}, {}),
  "truncate": ("truncate", {}, {}),
  "smoothing": ("truncate", {"loss": {"label_smoothing": 0.1}}, {"smoothing": 0.1}),
  "sandwich": ("sandwich", {}, {}),
  "sandwich-mean": ("sandwich", {"sampling": {"reduce": "mean"}}, {}),
  "sandwich-fixed": ("sandwich", {"sampling": {"random": 0}}, {}),
  "student-labels": (
    "sandwich", {"loss": {"student_labels": 0.6, "distillation": 0.3, "label_smoothing": 0.1}},
    {"labels": 0.6, "soft": 0.3, "smoothing": 0.1}),
  "temperature": ("sandwich", {"loss": {"temperature": 2.5}}, {"temperature": 2.5}),
  "features": ("sandwich", {"loss": {"space": "features"}}, {"space": "features"}),
  "delayed": ("sandwich", {"loss": {"delay": 3, "ramp": 1}, "at": 2}, {"ramp": 0.0}),
  "ramp": ("sandwich", {"loss": {"delay": 3, "ramp": 1}, "at": 3}, {"ramp": 0.5}),
  "ramped": ("sandwich", {"loss": {"delay": 3, "ramp": 1}, "at": 4}, {"ramp": 1.0}),
  "sorted": ("sorted", {"at": 7}, {}),
  "sorted-mean": ("sorted", {"sampling": {"reduce": "mean", "n": 3}}, {}),
  "joint": ("matformer_joint", {}, {}),
  "joint-mean": ("matformer_joint", {"sampling": {"reduce": "mean"}}, {}),
  "sampled": ("matformer_sampled", {"at": 2}, {}),
  "frozen-teacher": ("sandwich", {"teacher": "frozen"}, {}),
  "ema-teacher": ("sandwich", {"teacher": "ema"}, {}),
}


@pytest.mark.parametrize("name, options, formula", CASES.values(), ids=CASES)
def test_gradient_is_the_formula(name, options, formula):
  at = (options := dict(options)).pop("at", 0)
  step, batch = make(name, **options), example_batch()
  state, (trained, teacher) = start(step, at)
  terms = step.recipe.sampler.terms(at)
  value, wanted = jax.value_and_grad(hand)(trained, teacher, batch, terms, **formula)
  found, metrics, _ = gradient(step, state, batch, at)
  close(found, wanted)
  assert abs(float(metrics["loss"]) - float(value)) < 1e-5
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-5)


def test_sampling_hands_the_formula_more_than_one_size():
  """Otherwise the comparison above would prove little."""
  terms = make("sandwich").recipe.sampler.terms(0)
  assert len({t.candidates for t in terms}) > 2
  assert [t.taught for t in terms] == [False, True, True, True]


def test_gradient_of_a_teacher_that_is_no_term_of_the_step():
  """Without the largest among the terms its outputs come from the weights of this very step."""
  terms = (Term((SPACE.smallest,), weight=0.5, taught=True), Term((SPACE.largest,)))
  step, batch = make("sandwich", drawn=Sampler(lambda step: terms)), example_batch()
  state, (trained, _) = start(step)
  found, _, _ = gradient(step, state, batch)
  close(found, jax.grad(hand)(trained, None, batch, terms))


def test_in_place_teacher_gets_no_gradient_from_its_students():
  """With the labels' share known, what is left falls on the students' slices alone."""
  terms = (Term((SPACE.largest,), weight=0.0), Term((SPACE.smallest,), taught=True))
  step, batch = make("sandwich", drawn=Sampler(lambda step: terms)), example_batch()
  found, _, _ = gradient(step, start(step)[0], batch)
  assert not found["model"]["stem"]["kernel"][:, 4:].any()
  assert found["model"]["stem"]["kernel"][:, :4].all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [(), (0.2, 1.0, 3.0)])
def test_matryoshka_gradient_is_the_formula(tied, weights):
  """MRL: sum of c_m CE(W_m z[:m]) over prefixes of the features of one forward."""
  sizes = MATRYOSHKA.choices("features")
  step = make("matryoshka", MATRYOSHKA, arguments={"sizes": sizes, "tied": tied},
              loss={"weights": weights})
  batch = example_batch()
  state, (trained, _) = start(step)

  def formula(trained):
    z, _ = forward(trained["model"], batch["image"])
    total = 0.0
    for m, c in zip(sizes, weights or (1.0, 1.0, 1.0)):
      own = trained["objective"] if tied else trained["objective"][str(m)]
      total += c * label_loss(z[:, :m] @ own["kernel"][:m] + own["bias"][None], batch["label"])
    return total

  close(gradient(step, state, batch)[0], jax.grad(formula)(trained))


def cut_vit(p, ids, embed, heads, mlp):
  """The slice of a ViT, leaf by leaf."""
  e, h, m, ids = slice(embed), slice(heads), slice(mlp), np.array(ids)
  a, b = p["blocks"]["attention"], p["blocks"]["mlp"]
  norm = lambda n, i: {"scale": n["scale"][i][..., e], "bias": n["bias"][i][..., e]}
  return {
    "patch": {"kernel": p["patch"]["kernel"][..., e], "bias": p["patch"]["bias"][e]},
    "positions": p["positions"][:, e],
    "blocks": {
      "attention": {
        "norm": norm(a["norm"], ids),
        "qkv": {"kernel": a["qkv"]["kernel"][ids][:, e, h], "bias": a["qkv"]["bias"][ids][:, h]},
        "out": {"kernel": a["out"]["kernel"][ids][:, h, :, e], "bias": a["out"]["bias"][ids][:, e]}},
      "mlp": {
        "norm": norm(b["norm"], ids),
        "up": {"kernel": b["up"]["kernel"][ids][:, e, m], "bias": b["up"]["bias"][ids][:, m]},
        "down": {"kernel": b["down"]["kernel"][ids][:, m, e], "bias": b["down"]["bias"][ids][:, e]}}},
    "norm": norm(p["norm"], ...),
    "head": {"kernel": p["head"]["kernel"][e], "bias": p["head"]["bias"]}}


@pytest.mark.slow
def test_gradient_of_a_vit_over_all_four_axes():
  """A sandwich whose middle member keeps the last layer only, on eight devices."""
  space = Space(layers=(1, 2), embed=(8, 16), heads=(2, 4), mlp=(8, 16))
  vit = ViT(layers=2, embed=16, heads=4, head_dim=4, mlp=16, classes=CLASSES)
  supernet = Supernet(vit, space, (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),))
  members = {
    space.largest: ([0, 1], 16, 4, 16), space.subnet("layers=+1,heads=2"): ([1], 16, 2, 16),
    space.smallest: ([0], 8, 2, 8)}
  terms = tuple(Term((m,), taught=m != space.largest) for m in members)
  step = make("sandwich", space, supernet=supernet, drawn=Sampler(lambda step: terms), devices=8)
  batch = example_batch(8)
  state, (trained, _) = start(step)

  def formula(trained):
    total, teacher = 0.0, None
    for member, sizes in members.items():
      logits = vit.clone(**member).apply(
        {"params": cut_vit(trained["model"], *sizes)}, batch["image"])["logits"]
      total += label_loss(logits, batch["label"]) if teacher is None else soft_loss(logits, teacher)
      teacher = jax.lax.stop_gradient(logits) if teacher is None else teacher
    return total

  found, _, state = gradient(step, state, batch)
  close(found, jax.jit(jax.grad(formula))(trained), 2e-6)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


@pytest.mark.parametrize("select", ["lowest", "highest"])
def test_selection_trains_the_candidate_of_extreme_loss(select):
  terms = (Term((SPACE.largest,)), Term((SPACE.subnet("embed=6"), SPACE.smallest), taught=True))
  step = make("sandwich", drawn=Sampler(lambda step: terms), select=select)
  batch = example_batch()
  state, (trained, _) = start(step)
  losses = [float(hand(trained, None, batch, (terms[0], Term((c,), taught=True))))
            for c in terms[1].candidates]
  chosen = terms[1].candidates[int(np.argmin(losses) if select == "lowest" else np.argmax(losses))]
  wanted = jax.grad(hand)(trained, None, batch, (terms[0], Term((chosen,), taught=True)))
  close(gradient(step, state, batch)[0], wanted)
  assert abs(losses[0] - losses[1]) > 1e-3


def test_ema_teacher_follows_and_frozen_teacher_stays():
  for kind in ("ema", "frozen"):
    step = make("truncate", teacher=kind, ema=0.9)
    state, (_, teacher) = start(step)
    _, _, state = gradient(step, state, example_batch())
    after = jax.device_get(state.trained)
    close(jax.device_get(state.teacher), teacher if kind == "frozen" else jax.tree.map(
      lambda t, p: 0.9 * t + 0.1 * p, teacher, after))


def test_fixed_list_in_one_program_equals_one_by_one():
  batch, results = example_batch(), []
  for fixed in (True, False):
    drawn = sampler("sandwich", SPACE, 0, random=0)
    step = make("sandwich", drawn=dataclasses.replace(drawn, fixed=fixed))
    results.append(gradient(step, start(step)[0], batch)[:2])
  close(*results)


def test_gradient_outside_the_trained_slices_is_exactly_zero():
  small = Space(embed=(4, 8), mlp=(4, 12), pool=("embed=4,mlp=12", "embed=4,mlp=4"))
  step = make("sorted", small)
  found = gradient(step, start(step)[0], example_batch())[0]["model"]
  for leaf, inside in (("stem", np.s_[:, :4]), ("up", np.s_[:4]), ("down", np.s_[:, :4]),
                       ("head", np.s_[:4])):
    outside = np.ones(found[leaf]["kernel"].shape, bool)
    outside[inside] = False
    assert outside.any() and not found[leaf]["kernel"][outside].any()
    assert found[leaf]["kernel"][inside].any()


def test_programs_do_not_grow_with_combinations(compiled):
  """Three random ones of four others: one program for each member, whatever their mix."""
  step = make("sandwich", sampling={"random": 3}, devices=2)
  batch = put_batch(example_batch(), step.mesh)
  state, combinations = step.init(), set()
  for at in range(40):
    combinations.add(tuple(t.candidates for t in step.recipe.sampler.terms(at)))
    # Waiting keeps programs from piling up: collectives of faked devices may then deadlock.
    state, _ = jax.block_until_ready(step(state, batch, at))
  assert len(combinations) > 20
  # The largest as a teacher, and five as students.
  assert compiled.count("jit(_add)") == 6
  assert compiled.count("jit(_updated)") == 1


def test_regularisation_follows_the_term():
  """Dropout is off where the term says so; else it is a function of seed, step and position."""
  def found(regularised, at):
    terms = (Term((SPACE.largest,), regularised=regularised),)
    supernet = family(dropout=0.5)
    step = make("truncate", supernet=supernet, drawn=Sampler(lambda step: terms))
    state, (trained, _) = start(step, at)
    return gradient(step, state, example_batch(), at)[0], trained, terms

  calm, trained, terms = found(False, 0)
  close(calm, jax.grad(hand)(trained, None, example_batch(), terms))
  first, again, later = (found(True, at)[0]["model"]["up"]["kernel"] for at in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - later).max() > 1e-3
  assert np.abs(first - calm["model"]["up"]["kernel"]).max() > 1e-3


# Weights that no sub-network of the step uses.

OPTIMIZERS = {
  "adamw": dict(name="adamw", weight_decay=0.1),
  "sgd": dict(name="sgd", weight_decay=0.1, momentum=0.9),
}
RATE = 0.01


def two_steps(optimizer, untouched):
  """The largest trains, which fills the moments, then the smallest; states before and after."""
  small = SPACE.subnet("embed=4,mlp=4")
  drawn = Sampler(lambda step: (Term((small if step else SPACE.largest,)),))
  make_tx = optim.optimizer(rate=optax.constant_schedule(RATE), **OPTIMIZERS[optimizer])
  step = make("truncate", drawn=drawn, untouched=untouched, optimizer=make_tx)
  state, _ = start(step)
  batch = put_batch(example_batch(), step.mesh)
  state, _ = step(state, batch, 0)
  before = jax.device_get(state)
  state, _ = step(state, batch, 1)
  return step, before, jax.device_get(state)


def split(tree):
  """Entries of the stem's kernel and bias inside and outside the small slice."""
  stem = tree["model"]["stem"]
  return ((stem["kernel"][:, :4], stem["bias"][:4]), (stem["kernel"][:, 4:], stem["bias"][4:]))


def moments(step, state):
  """The per-parameter trees of an optimizer's state."""
  shape = jax.tree.structure(state.trained)
  like = lambda tree: jax.tree.structure(tree) == shape
  found = [tree for tree in jax.tree.leaves(state.opt_state, is_leaf=like) if like(tree)]
  assert found
  return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_untouched_update_is_the_ordinary_step(optimizer):
  """Momentum moves what no sub-network used."""
  step, before, after = two_steps(optimizer, "update")
  small = (Term((SPACE.subnet("embed=4,mlp=4"),)),)
  grads = jax.grad(hand)(before.trained, None, example_batch(), small)
  updates, _ = step.tx.update(grads, before.opt_state, before.trained)
  close(after.trained, jax.device_get(optax.apply_updates(before.trained, updates)))
  for old, new in zip(split(before.trained)[1], split(after.trained)[1]):
    decay = RATE * 0.1 * np.abs(old)
    assert (np.abs(new - old) > 2 * decay).mean() > 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("untouched", ["freeze", "decay_only"])
def test_untouched_weights_and_moments_stay(optimizer, untouched):
  step, before, after = two_steps(optimizer, untouched)
  _, _, ordinary = two_steps(optimizer, "update")
  (kernel, bias), (found_kernel, found_bias) = split(before.trained)[1], split(after.trained)[1]
  # Biases do not decay. Kernels become p * (1 - lr * wd), to the last bit of the product.
  np.testing.assert_array_equal(found_bias, bias)
  if untouched == "freeze":
    np.testing.assert_array_equal(found_kernel, kernel)
  else:
    np.testing.assert_allclose(found_kernel, kernel * (1 - RATE * 0.1), rtol=2e-7)
  for old, new in zip(moments(step, before), moments(step, after)):
    jax.tree.map(np.testing.assert_array_equal, split(new)[1], split(old)[1])
  # What was used is updated as ever.
  close(split(after.trained)[0], split(ordinary.trained)[0])


def test_untouched_weights_of_the_objective_stay_too():
  """An objective's own weights are sliced by the same sub-networks."""
  def init(rng, model, space):
    return {"kernel": jnp.ones((8, 3))}, {"kernel": "features -> proj"}, {}

  def loss(params, state, outputs, targets, step, rng):
    return jnp.sum((outputs["features"] @ params["kernel"]) ** 2), {}

  small = MATRYOSHKA.smallest
  drawn = Sampler(lambda step: (Term((small if step else MATRYOSHKA.largest,)),))
  recipe = Recipe(drawn, Objective(loss, init), untouched="freeze")
  make_tx = optim.optimizer(rate=optax.constant_schedule(RATE), name="adamw", weight_decay=0.1)
  step = Step(family(MATRYOSHKA), recipe, make_tx, make_mesh({"data": 1}))
  batch = put_batch(example_batch(), step.mesh)
  state, _ = step(step.init(), batch, 0)
  before = jax.device_get(state.trained["objective"]["kernel"])
  state, _ = step(state, batch, 1)
  after = jax.device_get(state.trained["objective"]["kernel"])
  np.testing.assert_array_equal(after[2:], before[2:])
  assert (after[:2] != before[:2]).all()


@pytest.mark.parametrize("option", ["teacher", "select", "untouched"])
def test_unknown_options_are_refused(option):
  with pytest.raises(UserError, match=f"recipe.{option} 'none'.*Allowed"):
    as_recipe("sandwich", SPACE, **{option: "none"})
  with pytest.raises(UserError, match="recipe.ema.*1.5.*0 to 1"):
    as_recipe("sandwich", SPACE, ema=1.5)


def test_axes_of_an_objective_must_name_its_parameters():
  bad = Objective(lambda *a: (0.0, {}), lambda rng, model, space: ({"w": jnp.ones(3)}, {}, {}))
  with pytest.raises(UserError, match="axes must name every leaf"):
    Step(family(), Recipe(sampler("largest", SPACE), bad), capture, make_mesh({"data": 1}))


def test_member_of_a_matryoshka_reads_its_own_head():
  sizes = MATRYOSHKA.choices("features")
  step = make("matryoshka", MATRYOSHKA, arguments={"sizes": sizes})
  state, (trained, _) = start(step)
  small = Subnet(features=4)
  variables, images = step.member(state, small), example_batch()["image"]
  z, _ = forward(trained["model"], images)
  own = trained["objective"]["4"]
  close(step.supernet.module(small).apply(variables, images)["logits"],
        z[:, :4] @ own["kernel"] + own["bias"][None])
