"""Importance of what a decoder of text is cut along: groups of heads, the heads of each, widths, layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from nestnet import Space
from nestnet.activations import activations, influence
from nestnet.axes import variable_axes
from nestnet.execution import Supernet
from nestnet.importance import Sort, _cut, _outputs, rank_layers, sizes_among, sorted_for, sorted_variables
from nestnet.models.decoder import Decoder
from nestnet.objectives.base import Objective
from nestnet.ordering import orders, scores
from nestnet.permuting import enclosing, permute
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh
from nestnet.steps import Recipe, Step
from nestnet.training import Border

TOKENS = np.random.default_rng(1).integers(0, 32, (2, 8)).astype(np.int32)
MODELS = {
  "tied": Decoder(layers=2, embed=16, heads=4, kv_heads=2, mlp=32, vocab=32),
  "untied": Decoder(layers=2, embed=16, heads=6, kv_heads=2, mlp=32, vocab=32, head_dim=4, tied=False,
                    qk_norm=True, attention_bias=True),
  "listed": Decoder(layers=2, embed=16, heads=(4, 6), kv_heads=(2, 3), mlp=(32, 16), vocab=32, head_dim=4)}
AXES = ("kv_heads", "queries", "mlp", "embed")


def randomised(model, seed=0):
  """Norms too are as random as kernels; units differ much in size."""
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape) * rng.gamma(1, size=s.shape)).astype(s.dtype),
                      shapes)


def layers_of(blocks):
  return [blocks] if "mlp" in blocks else [*blocks.values()]


def names(model):
  return variable_axes(model, TOKENS)["params"]


def logits(model, variables, tokens=TOKENS):
  return np.asarray(jax.jit(lambda v: model.apply(v, tokens)["logits"])(variables))


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_heads_belong_to_their_groups_and_nothing_else_does():
  for model in MODELS.values():
    assert enclosing(names(model)) == {"queries": "kv_heads"}


@pytest.mark.parametrize("name, by", [
  ("tied", "activation"), ("untied", "l2"), pytest.param("listed", "l1", marks=pytest.mark.slow)])
def test_sorted_units_compute_the_same_and_stand_in_order(name, by):
  model, variables = MODELS[name], randomised(MODELS[name])
  found = sorted_variables(model, variables, AXES, [TOKENS], by)
  run = jax.jit(lambda v: model.apply(v, TOKENS)["logits"])
  close(run(found), run(variables), 1e-3)

  @jax.jit
  def scored(params, seen):
    return {axis: scores(names(model), params, axis, by, 1 if axis == "embed" else 2, seen) for axis in AXES}

  seen = activations(model, names(model), found, [TOKENS]) if by == "activation" else None
  for axis, layers in scored(found["params"], seen).items():
    for own in layers:
      assert own.ndim == 1 + (axis == "queries") and (np.diff(own) <= 1e-4).all()
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), jax.device_get(found), variables)
  assert all(jax.tree.leaves([moved["params"][key] for key in ("embedding", "norm")]))
  assert all(jax.tree.leaves([block["mlp"]["down"] for block in layers_of(moved["params"]["blocks"])]))


def test_heads_are_sorted_in_each_group_by_itself():
  """By numpy: the rows of each head in the output projection; then whole groups."""
  model = MODELS["untied"]
  params = randomised(model)["params"]
  out, q, k = (params["blocks"]["attention"][name]["kernel"] for name in ("out", "q", "k"))
  sizes = np.abs(out).sum((3, 4))
  found = jax.jit(lambda p: orders(model, names(model), p, ("queries", "kv_heads")))(params)
  found = jax.device_get(found)
  heads, groups = np.argsort(-sizes, -1), np.argsort(-sizes.sum(-1), -1)
  np.testing.assert_array_equal(found["queries"], heads)
  np.testing.assert_array_equal(found["kv_heads"], groups)
  assert any((heads[layer, 0] != heads[layer, 1]).any() for layer in range(2))
  assert any((groups[layer] != [0, 1]).any() for layer in range(2))
  moved = permute(params, names(model), found)["blocks"]["attention"]
  for layer in range(2):
    for place, group in enumerate(groups[layer]):
      own = heads[layer, group]
      np.testing.assert_array_equal(moved["out"]["kernel"][layer, place], out[layer, group][own])
      np.testing.assert_array_equal(moved["q"]["kernel"][layer, :, place], q[layer, :, group][:, own])
      np.testing.assert_array_equal(moved["k"]["kernel"][layer, :, place], k[layer, :, group])


def test_activations_are_minitrons():
  """Of a single token a head's output is its group's value: the rest is written out here."""
  model = MODELS["tied"].clone(layers=1)
  variables, tokens = randomised(model), TOKENS.reshape(-1, 1)
  block = jax.tree.map(lambda x: x[0], variables["params"]["blocks"])
  norm = lambda x, scale: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * scale
  x = variables["params"]["embedding"]["embedding"][tokens[:, 0]]
  read = norm(x, block["attention"]["norm"]["scale"])
  value = np.einsum("be,ekd->bkd", read, block["attention"]["v"]["kernel"])
  x = x + np.einsum("bkd,kqde->be", value, block["attention"]["out"]["kernel"])
  y = norm(x, block["mlp"]["norm"]["scale"])
  gate, up = (y @ block["mlp"][k]["kernel"] for k in ("gate", "up"))
  hidden = gate / (1 + np.exp(-gate)) * up

  halves = [tokens[:8], tokens[8:]]
  seen = activations(model, names(model), variables, halves)
  made = jax.jit(lambda params, seen: {axis: scores(names(model), params, axis, "activation", 1, seen)[0]
                                       for axis in AXES})(variables["params"], seen)
  score = made.get
  length = np.sqrt((value ** 2).sum(-1))
  close(score("mlp"), np.abs(hidden).mean(0), 1e-4)
  close(score("queries"), np.repeat(length.mean(0)[:, None], 2, 1), 1e-4)
  close(score("kv_heads"), np.sqrt(2) * length.mean(0), 1e-4)
  # Three kernels read what one norm gives, two what the other does.
  close(score("embed"), 3 * np.abs(read).mean(0) + 2 * np.abs(y).mean(0), 1e-4)


def test_what_has_a_place_is_not_sorted():
  model = MODELS["tied"]
  variables = randomised(model)
  with pytest.raises(ValueError, match="units of head_dim cannot be sorted: rotary positions turn"):
    sorted_variables(model, variables, ["head_dim"], [TOKENS], "l1")
  with pytest.raises(ValueError, match="units of vocab cannot be sorted"):
    sorted_variables(model, variables, ["vocab"], [TOKENS], "l1")
  with pytest.raises(ValueError, match="unknown axis to sort 'heads'.*kv_heads, queries"):
    sorted_variables(model, variables, ["heads"], [TOKENS], "l1")
  with pytest.raises(ValueError, match="unknown by of the order"):
    sorted_variables(model, variables, ["mlp"], [TOKENS], "l3")
  with pytest.raises(ValueError, match="no batches"):
    sorted_variables(model, variables, ["mlp"], [])
  with pytest.raises(ValueError, match=r"queries has 2 x 2 units, got orders of \[3 x 2, 3 x 2\]"):
    permute(variables["params"], names(model), {"queries": (np.zeros((3, 2), int),) * 2})


def test_influence_is_one_minus_the_cosine():
  """From the residual stream before and after each layer."""
  model = MODELS["tied"]
  variables = randomised(model)
  taps = np.asarray(jax.jit(lambda v: model.apply(v, TOKENS, taps=True)["taps"])(variables))
  stream = np.concatenate([variables["params"]["embedding"]["embedding"][TOKENS][None], taps])
  length = np.sqrt((stream ** 2).sum(-1))
  cosines = (stream[1:] * stream[:-1]).sum(-1) / (length[1:] * length[:-1])
  close(influence(model, variables, [TOKENS[:1], TOKENS[1:]]), (1 - cosines).mean((1, 2)), 1e-4)


def test_layers_are_ranked_by_it():
  """Of more than ten that stand apart, one does nothing; depths are nested."""
  model = Decoder(layers=11, embed=4, heads=1, kv_heads=1, mlp=(2, *[4] * 10), vocab=32)
  variables = randomised(model)
  idle = variables["params"]["blocks"]["layers_10"]
  idle["attention"]["out"]["kernel"][:] = idle["mlp"]["down"]["kernel"][:] = 0
  found = influence(model, variables, [TOKENS])
  assert np.abs(found[10]) < 1e-6 and (found[:10] > 1e-5).all()
  chosen = [set(rank_layers(found, count)) for count in range(1, 12)]
  assert chosen[0] == {found.argmax()} and 10 not in chosen[9]
  assert all(a < b for a, b in zip(chosen, chosen[1:]))
  assert found[list(chosen[3])].min() >= found[list(chosen[-1] - chosen[3])].max()
  with pytest.raises(ValueError, match="layers=12 to keep; allowed are 1 to 11"):
    rank_layers(found, 12)


class Data:
  def __getitem__(self, step):
    return {"tokens": np.random.default_rng(step).integers(0, 32, (4, 9)).astype(np.int32)}


@pytest.mark.slow
def test_a_run_sorts_by_what_it_trains_on():
  """Units stay between the sizes that were trained; freely, the smallest is another."""
  objective = Objective(lambda *_: (jnp.zeros(()), {}), forward=lambda apply, batch: apply(batch["tokens"]))
  space = Space(couple={"heads kv_heads": ((2, 1), (2, 2), (4, 2))}, embed=(8, 16), mlp=(8, 16, 32))
  net = Supernet(MODELS["tied"].clone(layers=1), space, (jax.ShapeDtypeStruct((1, 8), jnp.int32),))
  step = Step(net, Recipe(sampler("uniform", space, taught=False), objective), lambda mask: optax.sgd(0.1),
              make_mesh({"data": 1}), execution="slice")
  state = step.init()
  state = state.replace(trained={"model": randomised(net.model)["params"], "objective": {}})
  sort = lambda keep: Sort("activation", keep=keep, batches=2)(state, Border(step, step, Data()))
  kept, free = (sort(keep).trained["model"] for keep in ("supported", "nothing"))
  of = lambda params, member: logits(net.module(member), net.cut({"params": params}, member))
  for text in ("smallest", "heads=2,kv_heads=2,embed=16,mlp=16"):
    member = net.space.subnet(text)
    close(of(kept, member), of(state.trained["model"], member), 1e-3)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), *jax.device_get((kept, state.trained["model"])))
  assert any(jax.tree.leaves(moved))
  # The check of that would see an order that is wrong: it feeds tokens that differ.
  q = state.trained["model"]["blocks"]["attention"]["q"]
  turned = jax.tree.map(lambda x: np.roll(x, 1, -1) if x is q["kernel"] else x, state.trained)
  wrong = _outputs(step, state.replace(trained=turned)) - _outputs(step, state)
  assert np.abs(wrong).max() > 0.1
  small = net.space.smallest
  assert np.abs(of(free, small) - of(state.trained["model"], small)).max() > 1e-2


def test_axes_to_sort_are_those_that_the_members_are_cut_along():
  """Whatever trains: a network that trains as a whole is cut all the same."""
  space = Space(couple={"heads kv_heads": ((2, 1), (2, 2), (4, 2))}, embed=(8, 16), mlp=(8, 16, 32))
  net = Supernet(MODELS["tied"], space, (jax.ShapeDtypeStruct((1, 8), jnp.int32),))
  cut = lambda *texts: set(_cut(net, sizes_among(net, map(space.subnet, texts))))
  assert cut("smallest") == {"kv_heads", "mlp", "embed"} and cut("heads=2,kv_heads=2") == {"queries"}
  assert cut("mlp=32:8", "embed=8") == {"mlp", "embed"} and cut("largest") == cut() == set()
  step = Step(net, Recipe(sampler("largest", space), Objective(lambda *_: (jnp.zeros(()), {}))),
              lambda mask: optax.sgd(0.1), make_mesh({"data": 1}), execution="slice")
  state = object()
  assert sorted_for(step, state, [space.largest], Data()) is state
  for options, message in (({"by": "l3"}, "by of the order 'l3'"), ({"count": 0}, "batches=0 of the order")):
    with pytest.raises(ValueError, match=message):
      sorted_for(step, state, [space.largest], Data(), **options)
