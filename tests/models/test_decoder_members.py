"""Members of a decoder: their parameters, their numbers in every way that they run, and their families."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet, cost, take
from nestnet.axes import is_axes, variable_axes
from nestnet.execution import Supernet, sizes_of
from nestnet.models.cache import init_cache
from nestnet.models.decoder import head_rows
from nestnet.one_program import OneProgram
from nestnet.pieces import Pieces
from tests.models.test_decoder import (
  INPUT, KINDS, LENGTH, MODEL, PLAIN, POSITIONS, SPACE, TOKENS, family, full, randomised)

LISTED = ("heads", "kv_heads", "mlp")



def closed_form(model, s):
  """Parameters of a decoder of these sizes, with lists written out."""
  embed, depth, width = s["embed"], s["layers"], model.head_dim
  heads, kv_heads, mlp = (np.broadcast_to(s[axis], depth) for axis in LISTED)
  kernels = 2 * embed * width * (heads + kv_heads) + 3 * embed * mlp + 2 * embed
  biases = model.attention_bias * (width * (heads + 2 * kv_heads) + embed)
  return int((kernels + biases + model.qk_norm * 2 * width).sum()) + embed + 11 * embed * (2 - model.tied)


@pytest.mark.parametrize("model", [MODEL, PLAIN], ids=["all", "plain"])
def test_every_member_is_the_slice_in_shape_and_count(model):
  net, _ = family(model)
  for member in {*map(SPACE.subnet, KINDS), *(SPACE.sample(i) for i in range(4)), SPACE.smallest}:
    net.check(member)
    cut = jax.eval_shape(functools.partial(net.cut, subnet=member), net.shapes)
    assert cost.count_tree(cut["params"]) == closed_form(model, member), member
  assert cost.count_params(model, INPUT) == closed_form(model, SPACE.largest)


def test_axes_and_roles():
  names = jax.tree.map(str, variable_axes(MODEL, INPUT)["params"], is_leaf=is_axes)
  both = lambda produced: {"kernel": f"layers: embed -> {produced}", "bias": f"layers: -> {produced}"}
  scale = lambda axis: {"scale": f"layers: -> {axis}"}
  assert names["blocks"]["attention"] == {
    "norm": scale("embed"), "q": both("kv_heads queries head_dim"), "k": both("kv_heads head_dim"),
    "v": both("kv_heads head_dim"), "q_norm": scale("head_dim"), "k_norm": scale("head_dim"),
    "out": {"kernel": "layers: kv_heads queries head_dim -> embed", "bias": "layers: -> embed"}}
  kernel = lambda arrow: {"kernel": f"layers: {arrow}"}
  assert names["blocks"]["mlp"] == {
    "norm": scale("embed"), "gate": kernel("embed -> mlp"), "up": kernel("embed -> mlp"),
    "down": kernel("mlp -> embed")}
  assert {key: names[key] for key in names if key != "blocks"} == {
    "embedding": {"embedding": "vocab -> embed"}, "norm": {"scale": "-> embed"},
    "head": {"kernel": "embed -> vocab"}}
  assert "head" not in variable_axes(PLAIN, INPUT)["params"]


@pytest.mark.parametrize("text", [KINDS[1], KINDS[3]], ids=["prefix", "lists"])
def test_slice_in_place_equals_the_extracted_network_bit_for_bit(text):
  net, variables = family()
  subnet = SPACE.subnet(text)
  runnable = net.runnable(subnet)
  in_place = jax.jit(lambda v, x: runnable.module.apply(runnable.cut(v), x))(variables, TOKENS)
  alone = jax.jit(net.module(subnet).apply)(net.cut(variables, subnet), TOKENS)
  assert float(jnp.ptp(alone["logits"])) > 0.1
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


def test_a_member_is_the_network_whose_other_heads_and_units_are_silent():
  """Fewer groups are the leading ones; fewer heads beside as many groups the leading ones of each."""
  net, variables = family()
  params = variables["params"]
  for text, kept in (("heads=2,kv_heads=1,mlp=4", np.s_[:, :1]), ("heads=2", np.s_[:, :, :1])):
    subnet = SPACE.subnet(text)
    silent = jax.tree.map(np.array, params["blocks"])
    for part, kernel, lead in (("attention", "out", kept), ("mlp", "down", np.s_[:, :subnet["mlp"]])):
      weight = silent[part][kernel]["kernel"]
      silent[part][kernel]["kernel"] = np.zeros_like(weight)
      silent[part][kernel]["kernel"][lead] = weight[lead]
    wanted = full()({"params": {**params, "blocks": silent}}, TOKENS, POSITIONS)["logits"]
    found = jax.jit(net.module(subnet).apply)(net.cut(variables, subnet), TOKENS)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_cuts_compose():
  net, variables = family()
  outer, inner = (SPACE.subnet(t) for t in ("layers=0+2,heads=2,kv_heads=2,mlp=12:4",
                                            "layers=+2,embed=8,heads=1,kv_heads=1,mlp=4"))
  once, module = net.cut(variables, inner), net.module(outer)
  axes = variable_axes(module, INPUT)["params"]
  twice = take(net.cut(variables, outer)["params"], axes, sizes_of(module, inner.within(outer)))
  one = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[0], once["params"]["blocks"]))
  for a, b in zip(one, jax.tree.leaves(twice["blocks"]["layers_0"]), strict=True):
    np.testing.assert_array_equal(a, b)


def loss_and_gradient(runnable, variables):
  def loss(params):
    cut = runnable.cut({**variables, "params": params})
    cut |= {} if runnable.choice is None else {"choice": runnable.choice}
    logits = runnable.module.apply(cut, TOKENS)["logits"]
    return jnp.mean(jnp.sin(logits)), logits
  return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize("embed", [(16,), pytest.param((8, 16), marks=pytest.mark.slow)], ids=str)
def test_one_program_equals_the_slice(embed, compiled):
  model = PLAIN.clone(layers=2)
  space = Space(layers=(1, 2), embed=embed, mlp=(4, 12), couple={"heads kv_heads": ((2, 1), (2, 2), (4, 2))})
  texts = ("layers=2,heads=2:4,kv_heads=2,mlp=12:4", "layers=+1,heads=2,kv_heads=1,mlp=4")
  net = Supernet(model, space, (INPUT,))
  one, variables = OneProgram(net), randomised(model)
  assert set(one.inner) == {"heads", "kv_heads", "mlp"} and one.outer == ("embed",)
  one.check()
  as_data = jax.jit(functools.partial(one.switch, loss_and_gradient))
  for text in texts[:len(embed)]:
    subnet = space.subnet(f"embed={embed[0]},{text}")
    (loss, logits), grads = as_data(one.vector(subnet), variables)
    (wanted, expected), wanted_grads = jax.jit(
      lambda v, subnet=subnet: loss_and_gradient(net.runnable(subnet), v))(variables)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
      assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
      assert not np.asarray(a)[np.asarray(b) == 0].any()
  assert compiled.count("jit(switch)") == 1


def test_layers_are_dropped_in_one_program_too():
  space = Space(layers=(2, 3), mlp=(4, 12))
  net = Supernet(PLAIN.clone(layer_dropout=0.5), space, (INPUT,))
  one = OneProgram(net)

  def loss(params, runnable, constants):
    variables = {**runnable.cut({"params": params, **constants}), "choice": runnable.choice}
    rngs = {"dropout": jax.random.key(0)}
    return runnable.module.apply(variables, TOKENS, train=True, rngs=rngs)["logits"].sum()

  def gradient(vector, variables):
    params, constants = variables["params"], {"constants": variables["constants"]}
    return one.switch(lambda runnable, p, c: jax.grad(loss)(p, runnable, c), vector, params, constants)

  found = jax.eval_shape(gradient, one.vector(space.smallest), net.shapes)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, net.shapes["params"])


def test_a_cache_belongs_to_one_network():
  def run(runnable, variables):
    variables = {**runnable.cut(variables), "choice": runnable.choice}
    return runnable.module.apply({**variables, "cache": init_cache(PLAIN, *TOKENS.shape)}, TOKENS)

  one, vector = OneProgram(family(PLAIN)[0]), np.zeros(99, np.int32)
  with pytest.raises(ValueError, match="a cache belongs to one network.*the member's own module"):
    jax.eval_shape(lambda v: one.switch(run, vector, v), family(PLAIN)[1])


def test_costs_are_sums_over_layers_and_the_closed_form():
  net, _ = family(PLAIN)
  pieces = Pieces(net)
  for text in KINDS:
    member = SPACE.subnet(text)
    found = pieces.costs(member)
    assert found == {"params": closed_form(PLAIN, member), "flops": cost.flops(net.module(member), INPUT)}
    heads, kv_heads, mlp = (np.broadcast_to(member[axis], member["layers"]) for axis in LISTED)
    each = (8 * (heads + kv_heads) + 3 * mlp) * member["embed"] + 8 * LENGTH * heads
    assert found["flops"] == 2 * TOKENS.size * (int(each.sum()) + 11 * member["embed"])


# Families.


@pytest.mark.parametrize("space, message", [
  (dict(heads=(1, 4), kv_heads=(1, 2)), "heads=1 beside kv_heads=2, which does not divide into these"),
  (dict(heads=(2, 4), kv_heads=(1, 2)), "heads=4 beside kv_heads=1, which has 4 heads in a group, where"),
  (dict(heads=(2, 4), kv_heads=(1, 2), per_layer=("heads",)), "heads=4 beside kv_heads=1.*couple="),
  (dict(heads=(3, 4)), "heads=3 beside kv_heads=2"),
  (dict(heads=(2, 4), groups={"heads": 2}), "space.groups.heads=2.*allowed are space.groups.kv_heads")],
  ids=str)
def test_families_whose_heads_do_not_go_together(space, message):
  with pytest.raises(ValueError, match=message):
    Supernet(PLAIN, Space(**{"layers": (1, 3), **space}), (INPUT,))


def test_a_mixture_that_no_network_is():
  """By layer, sizes that the family has beside others alone."""
  wide = PLAIN.clone(layers=2, heads=6, kv_heads=3, head_dim=4)
  space = Space(layers=(2,), couple={"heads kv_heads": ((2, 2), (6, 3))})
  one = OneProgram(Supernet(wide, space, (INPUT,)))
  with pytest.raises(ValueError, match=r"heads=\(2, 6\) does not divide into kv_heads=3 groups"):
    one.vector(Subnet(layers=2, heads=(2, 6), kv_heads=3))


def test_families_whose_constraint_keeps_heads_together():
  space = Space(heads=(2, 4), kv_heads=(1, 2), constraint=lambda s: s["heads"] == 2 * s["kv_heads"])
  assert Supernet(PLAIN, space, (INPUT,)).space.size == 2
  with pytest.raises(ValueError, match="unknown axis of Decoder 'head_dim'.*layers, embed, heads, kv_heads"):
    PLAIN.sizes(Subnet(head_dim=2))


def test_rows_of_heads_make_a_family():
  space = Space(couple={"kv_heads heads": head_rows((1, 2), (1, 2))})
  assert [(m["kv_heads"], m["heads"]) for m in space] == [(1, 1), (1, 2), (2, 2), (2, 4)]
  Supernet(PLAIN, space, (INPUT,))
