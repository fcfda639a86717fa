"""Exits of one forward pass: they are the members, and their loss is the papers' formula."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from nestnet import Space, Subnet, cli, extraction, recipes, report, runs
from nestnet.execution import Supernet
from nestnet.models.decoder import Decoder
from nestnet.models.switch import CHOICE
from nestnet.models.vit import ViT
from nestnet.objectives import Targets, objective
from nestnet.objectives.exits import shares
from nestnet.one_program import OneProgram
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.steps import Recipe, Step

MODEL = Decoder(layers=3, embed=8, heads=4, kv_heads=2, mlp=12, vocab=16, layer_dropout=0.1)
INPUT = jax.ShapeDtypeStruct((1, 6), jnp.int32)
SPACE = Space(layers=(1, 2, 3), mlp=(4, 12))
LISTED = MODEL.clone(mlp=(12, 4, 8), tied=False)


@functools.cache
def family(model=MODEL):
  return Supernet(model, SPACE, (INPUT,))


def randomised(model):
  rng = np.random.default_rng(0)
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), INPUT))
  return jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), shapes)


def batch():
  """The second text ends early."""
  tokens = np.random.default_rng(3).integers(0, 16, (4, 7)).astype(np.int32)
  tokens[1, 4:] = -1
  return {"tokens": tokens}


def cross_entropy(logits, targets):
  log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
  own = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  return (own * (targets >= 0)).sum() / (targets >= 0).sum()


@pytest.mark.parametrize("model", [MODEL, LISTED], ids=["tied", "listed"])
def test_an_exit_is_the_member_of_that_depth(model):
  variables, tokens = randomised(model), batch()["tokens"][:, :-1].clip(0)
  found = jax.jit(lambda v: model.apply(v, tokens, exits="all")["exits"])(variables)
  assert [*found] == [1, 2, 3]
  for depth in (1, 2):
    module, cut = model.clone(layers=depth), family().cut
    if model is LISTED:
      module = module.clone(mlp=model.mlp[:depth])
      kept = lambda blocks: {f"layers_{i}": blocks[f"layers_{i}"] for i in range(depth)}
      cut = lambda v, _: {c: tree | {"blocks": kept(tree["blocks"])} for c, tree in v.items()}
    own = cut(variables, Subnet(layers=depth, mlp=12))
    wanted = jax.jit(lambda v: module.apply(v, tokens)["logits"])(own)
    np.testing.assert_allclose(found[depth], wanted, rtol=1e-5, atol=1e-6)
    assert float(jnp.ptp(wanted)) > 1


def test_shares_are_those_of_the_papers():
  """By hand for exits behind layers 1 to 4, whose sums 0 + 1 + ... of layers below are 0, 1, 3 and 3."""
  found = lambda *options, step=0, depths=(1, 2, 3, 4): np.asarray(shares(depths, step, *options))
  normal = lambda *e: np.array(e) / sum(e)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  close(found(), [0.25] * 4)
  close(found("rising", 0.2), normal(0, 0.2, 0.6, 3.6))
  close(found("rising", 1.0), normal(0, 1, 3, 6))
  close(found("rising", 0.5, depths=(2, 4)), normal(0.5, 4.5))
  close(found("rising", 0.5, depths=(1,)), [1])
  for step, on in enumerate([(1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 1)]):
    close(found("even", 1.0, "rotational", 3, step=step), normal(*on))
  for step, count in ((0, 1), (4, 1), (5, 2), (10, 3), (15, 4), (99, 4)):
    close(found("even", 1.0, "gradual", 5, step=step), normal(*[0] * (4 - count), *[1] * count))
  close(found("rising", 0.2, "rotational", 3, step=2), normal(0, 0, 0.6, 3.6))


def capture(mask):
  """An optimizer that keeps the gradient, exactly, as its state."""
  del mask
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.negative, grads), grads))


@functools.cache
def formula():
  """Loss and gradient for weights of the depths 1 to 3: last norm, head and cross-entropy written out."""
  model, data = MODEL.clone(layer_dropout=0.0), batch()

  def loss(params, weights):
    taps = model.apply({"params": params}, data["tokens"][:, :-1].clip(0), taps=True)["taps"]
    total = 0.0
    for x, weight in zip(taps, weights):
      x = x / jnp.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * params["norm"]["scale"][None, None]
      total += weight * cross_entropy(x @ params["embedding"]["embedding"].T, data["tokens"][:, 1:])
    return total

  return jax.jit(jax.value_and_grad(loss))


# At step 4 the second of every three exits is on, and the last.
CASES = {"soft": ({"depths": (1, 3)}, {}, (0.5, 0, 0.5)),
         "layerskip": ({}, {"interval": 3}, (0, 0.2 / 2.4, 2.2 / 2.4))}


@pytest.mark.parametrize("name", [pytest.param("soft", marks=pytest.mark.slow), "layerskip"])
def test_a_step_is_the_formula(name):
  arguments, changes, weights = CASES[name]
  config = recipes.recipe(name, **arguments)
  net = family(MODEL.clone(layer_dropout=0.0))
  options = dict(config["sampler"])
  recipe = Recipe(sampler(options.pop("name"), net.space, 3, **options),
                  objective(**config["objective"] | changes))
  step = Step(net, recipe, capture, make_mesh({"data": 1}), seed=1)
  # Zeros compile nothing.
  state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), step.abstract())
  params = randomised(net.model)["params"]
  state = state.replace(trained={"model": params, "objective": {}}, step=jnp.int32(4))
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, step.abstract()))
  loss, wanted = formula()(params, np.array(weights, np.float32))
  state, metrics = step(state, put_batch(batch(), step.mesh), 4)
  found = jax.device_get(state.opt_state)["model"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, wanted)
  np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
  assert {f"bits_per_token_{depth}" for depth in arguments.get("depths", (1, 2, 3))} < {*metrics}
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(found))


def test_smaller_members_have_the_exits_within_them():
  """And where none is, that is said; as is a teacher, whom nobody would hear."""
  made, net = objective("exits", depths=(2, 3)), family()

  def loss(member, teacher=None):
    def run(variables):
      own = net.cut(variables, member)
      apply = lambda tokens, **options: net.module(member).apply(own, tokens, **options)
      return made.loss({}, {}, made.forward(apply, batch()), Targets(batch(), teacher), 0, None)[1]
    return jax.eval_shape(run, randomised(MODEL))

  small = lambda layers: Subnet(layers=layers, mlp=4)
  assert {*loss(small(2))} == {"bits_per_token_2", "accuracy"}
  with pytest.raises(ValueError, match=r"no depth of \[2, 3\] is within a sub-network"):
    loss(small(1))
  with pytest.raises(ValueError, match="exits learn from labels alone"):
    loss(small(3), {})


def test_what_cannot_be_is_said():
  soft = cli.load_config("configs/stdlib_matformer.py:soft")
  assert soft.recipe.objective.weights == "even" and soft.model.layer_dropout == 0
  with pytest.raises(ValueError, match="needs a network that is called with exits=..., which ViT is not"):
    objective("exits").init(None, ViT(layers=1, embed=8, heads=2, mlp=8, classes=3), None)
  with pytest.raises(ValueError, match=r"depths=\[2, 4\] of Decoder with layers=3; allowed are .* up to 3"):
    objective("exits", depths=(2, 4)).init(None, MODEL, SPACE)
  for options, message in (({"depths": (2, 1)}, "allowed are rising numbers"), ({"scale": 2.0}, "a scale in"),
                           ({"depths": (0, 1)}, "allowed are rising numbers"),
                           ({"interval": 0}, "an interval of at least 1"),
                           ({"weights": "falling"}, "unknown weights"),
                           ({"curriculum": "x"}, "unknown curriculum")):
    with pytest.raises(ValueError, match=message):
      objective("exits", **options)
  one = OneProgram(family())

  def run(runnable, variables, tokens):
    return runnable.module.apply({**runnable.cut(variables), CHOICE: runnable.choice}, tokens, exits=(1,))

  with pytest.raises(ValueError, match="data chooses its layers; allowed: train.execution=slice"):
    jax.eval_shape(lambda *own: one.switch(run, one.vector(SPACE.smallest), *own), randomised(MODEL), INPUT)


@pytest.mark.slow
def test_a_run_evaluates_the_depths_that_it_trained(tmp_path):
  """Two steps in two parts; every depth has its row, and is extracted."""
  made = cli.load_config("configs/stdlib_matformer.py:layerskip")
  assert made.recipe.objective.depths == made.space.layers == (2, 4, 6, 8)
  assert made.model.layer_dropout == 0.1
  with made.unlocked():
    made.model.update(embed=8, heads=2, kv_heads=1, mlp=16, context=16)
    made.data.length, made.eval.examples = 16, 8
    made.train.update(steps=2, batch_size=4, log_every=1, accumulate=2)
    made.optim.warmup_steps = 1
  assert runs.train(made, tmp_path / "run", show_progress=False)
  rows = report.read_rows(tmp_path / "run" / "subnets.json")
  assert [row["subnet"] for row in rows] == [f"layers={depth}" for depth in (2, 4, 6, 8)]
  first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
  assert all(0 < first[f"bits_per_token_{depth}"] < 9 for depth in (2, 4, 6, 8))
  assert extraction.extract_run(tmp_path / "run", tmp_path / "out", "layers=4")[1] == 0.0
