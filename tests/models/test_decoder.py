"""The decoder: its formula, its members, what it sees, and its cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Space, Subnet, cost, options, take
from nestnet.axes import is_axes, variable_axes
from nestnet.execution import Supernet, sizes_of
from nestnet.models.decoder import Decoder, init_cache
from nestnet.one_program import OneProgram
from nestnet.pieces import Pieces

BATCH, LENGTH = 4, 8
LISTED = ("heads", "kv_heads", "mlp")
TOKENS = np.random.default_rng(1).integers(0, 11, (BATCH, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), TOKENS.shape)
INPUT = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
PLAIN = Decoder(layers=3, embed=16, heads=4, kv_heads=2, mlp=12, vocab=11, context=16)
MODEL = PLAIN.clone(tied=False, qk_norm=True, attention_bias=True, rope_theta=100.0, rope_scaling=dict(
  rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16))
SPACE = Space(layers=(1, 2, 3), embed=(8, 16), mlp=(4, 12), couple={
  "heads kv_heads": ((1, 1), (2, 1), (2, 2), (4, 2))})
# Fewer layers, groups, heads of each group and hidden units; all of them by layer.
KINDS = ["layers=3", "layers=+2,embed=8,heads=2,kv_heads=1", "heads=2,mlp=4",
         "layers=0+2,embed=8,heads=2:4,kv_heads=1:2,mlp=12:4"]


def randomised(module, seed=0):
  """Variables in which norms are as random as the kernels."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes(module))


def shapes(module):
  return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), INPUT))


@functools.cache
def family(model=MODEL):
  return Supernet(model, SPACE, (INPUT,)), randomised(model)


@functools.cache
def full():
  """All outputs of the largest network; one compilation serves many tests."""
  return jax.jit(lambda v, tokens, positions: MODEL.apply(
    v, tokens, positions=positions, taps=True, exits=(0, 2)))


# What it computes.


def by_hand(model, params, tokens):
  """The formulas of the papers for one sequence, in numpy; logits `[length, vocab]`."""
  norm = lambda x, p: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + model.norm_eps) * p["scale"]
  silu = lambda x: x / (1 + np.exp(-x))
  scaled = dict(model.rope_scaling or ())
  angles = 1 / model.rope_theta ** (np.arange(0, model.head_dim, 2) / model.head_dim)
  for i, angle in enumerate(angles if scaled else ()):
    fits = scaled["original_max_position_embeddings"] / (2 * np.pi / angle)
    low, high = scaled["low_freq_factor"], scaled["high_freq_factor"]
    smooth = (fits - low) / (high - low)
    angles[i] = angle if fits > high else angle / scaled["factor"] if fits < low else (
      smooth * angle + (1 - smooth) * angle / scaled["factor"])

  def turned(x, position):
    # Pairs of the two halves as complex numbers.
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * angles)
    return np.concatenate([z.real, z.imag])

  x = params["embedding"]["embedding"][tokens].astype(float)
  for i in range(model.layers):
    p = jax.tree.map(lambda leaf: leaf[i].astype(float), params["blocks"])
    a, y = p["attention"], norm(x, p["attention"]["norm"])
    q, k, v = (np.tensordot(y, a[n]["kernel"], 1) + a[n].get("bias", 0) for n in "qkv")
    if model.qk_norm:
      q, k = norm(q, a["q_norm"]), norm(k, a["k_norm"])
    out = np.zeros_like(x)
    for group, query, t in np.ndindex(q.shape[1], q.shape[2], len(x)):
      scores = [turned(q[t, group, query], t) @ turned(k[s, group], s) for s in range(t + 1)]
      weights = np.exp(np.array(scores) / np.sqrt(model.head_dim))
      out[t] += (weights / weights.sum() @ v[:t + 1, group]) @ a["out"]["kernel"][group, query]
    x = x + out + a["out"].get("bias", 0)
    m, y = p["mlp"], norm(x, p["mlp"]["norm"])
    x = x + (silu(y @ m["gate"]["kernel"]) * (y @ m["up"]["kernel"])) @ m["down"]["kernel"]
  x = norm(x, params["norm"])
  return x @ (params["embedding"]["embedding"].T if model.tied else params["head"]["kernel"])


def test_it_is_the_formula_of_the_papers():
  _, variables = family()
  outputs = full()(variables, TOKENS, POSITIONS)
  wanted = by_hand(MODEL, variables["params"], TOKENS[1])
  assert np.ptp(wanted) > 1
  np.testing.assert_allclose(outputs["logits"][1], wanted, rtol=1e-4, atol=1e-4)
  tied = randomised(PLAIN)
  np.testing.assert_allclose(jax.jit(PLAIN.apply)(tied, TOKENS)["logits"][1],
                             by_hand(PLAIN, tied["params"], TOKENS[1]), rtol=1e-4, atol=1e-4)


def test_outputs_taps_and_exits():
  _, variables = family()
  outputs = full()(variables, TOKENS, POSITIONS)
  assert {name: x.shape for name, x in outputs.items()} == {
    "logits": (4, 8, 11), "features": (4, 8, 16), "taps": (3, 4, 8, 16), "exits": (2, 4, 8, 11)}
  np.testing.assert_allclose(outputs["exits"][1], outputs["logits"], rtol=1e-5, atol=1e-5)
  first = {**variables["params"], "blocks": jax.tree.map(lambda x: x[:1], variables["params"]["blocks"])}
  wanted = by_hand(MODEL.clone(layers=1), first, TOKENS[0])
  np.testing.assert_allclose(outputs["exits"][0, 0], wanted, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match=r"exits=\(3,\); allowed are 0 to 2"):
    jax.eval_shape(lambda v: MODEL.apply(v, TOKENS, exits=(3,)), variables)


def test_a_later_token_changes_nothing_before_it():
  _, variables = family()
  changed = TOKENS.copy()
  changed[:, 5] = (changed[:, 5] + 3) % 11
  a, b = (np.asarray(full()(variables, tokens, POSITIONS)["logits"]) for tokens in (TOKENS, changed))
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert (np.abs(a[:, 5:] - b[:, 5:]).max(-1) > 1e-3).all()


def test_positions_matter_by_their_distances_alone():
  _, variables = family()
  logits = lambda positions: np.asarray(full()(variables, TOKENS, positions)["logits"])
  np.testing.assert_allclose(logits(POSITIONS + 7), logits(POSITIONS), rtol=1e-3, atol=1e-4)
  assert np.abs(logits(POSITIONS * 2) - logits(POSITIONS)).max() > 0.01


def test_padding_changes_nothing_and_has_a_derivative():
  """Rows of 8, 5 and 0 tokens, with padding before or behind them."""
  _, variables = family()
  tokens, positions = np.array(TOKENS), np.array(POSITIONS)
  tokens[1:3, :], positions[1:3] = TOKENS[0], -1
  tokens[1, :5], positions[1, :5] = TOKENS[0, :5], np.arange(5)
  tokens[2, 3:], positions[2, 3:] = TOKENS[0, :5], np.arange(5)
  tokens[3], positions[3] = -1, -1
  logits = np.asarray(full()(variables, tokens, positions)["logits"])
  np.testing.assert_allclose(logits[1, :5], logits[0, :5], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(logits[2, 3:], logits[0, :5], rtol=1e-4, atol=1e-4)

  def loss(v):
    logits = MODEL.apply(v, tokens, positions=positions)["logits"]
    return jnp.sum(jnp.where(positions[..., None] < 0, 0, jnp.sin(logits)))

  grads = jax.jit(jax.grad(loss))(variables)
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_token_beyond_the_vocabulary_is_not_overlooked():
  _, variables = family()
  assert np.isnan(full()(variables, np.full_like(TOKENS, 11), POSITIONS)["logits"]).all()


# Members.


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
  in_place = jax.jit(lambda v: runnable.module.apply(runnable.cut(v), TOKENS))(variables)
  alone = jax.jit(net.module(subnet).apply)(net.cut(variables, subnet), TOKENS)
  assert float(jnp.ptp(alone["logits"])) > 0.1
  jax.tree.map(np.testing.assert_array_equal, in_place, alone)


def test_a_member_is_the_network_whose_other_heads_and_units_are_silent():
  """Fewer groups are the leading ones; fewer heads beside as many groups the leading ones of each."""
  net, variables = family()
  params = variables["params"]
  for text, kept in (("heads=2,kv_heads=1", np.s_[:, :1]), ("heads=2,mlp=4", np.s_[:, :, :1])):
    silent = jax.tree.map(np.array, params["blocks"])
    for axis, part, kernel in ((kept, "attention", "out"), (np.s_[:, :4], "mlp", "down")):
      if part == "mlp" and "mlp" not in text:
        continue
      weight = silent[part][kernel]["kernel"]
      silent[part][kernel]["kernel"] = np.zeros_like(weight)
      silent[part][kernel]["kernel"][axis] = weight[axis]
    wanted = full()({"params": {**params, "blocks": silent}}, TOKENS, POSITIONS)["logits"]
    subnet = SPACE.subnet(text)
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
def test_one_program_equals_the_slice(embed):
  model = PLAIN.clone(layers=2, layer_dropout=0.5)
  space = Space(layers=(1, 2), embed=embed, mlp=(4, 12), couple={"heads kv_heads": ((2, 1), (2, 2), (4, 2))})
  net = Supernet(model, space, (INPUT,))
  one, variables = OneProgram(net), randomised(model)
  assert one.inner == ("heads", "kv_heads", "mlp") and one.outer == ("embed",)
  one.check()
  as_data = jax.jit(lambda vector, v: one.switch(loss_and_gradient, vector, v))
  for text in ("layers=2,heads=2:4,kv_heads=1:2,mlp=12:4", "layers=+1,heads=2,kv_heads=2,mlp=4"):
    text = f"embed={embed[0]},{text}"
    subnet = space.subnet(text)
    (loss, logits), grads = as_data(one.vector(subnet), variables)
    (wanted, expected), wanted_grads = jax.jit(
      lambda v, subnet=subnet: loss_and_gradient(net.runnable(subnet), v))(variables)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, wanted_grads)), strict=True):
      assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
      assert not np.asarray(a)[np.asarray(b) == 0].any()
  assert as_data._cache_size() == 1
  with pytest.raises(ValueError, match="heads=.2, 1. does not divide into kv_heads=2"):
    one.vector(Subnet(layers=2, embed=16, heads=(2, 1), kv_heads=2, mlp=4))


def test_scanned_recomputed_and_unrolled_blocks_are_one_function():
  _, variables = family()
  params = variables["params"]
  layers = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(3)}
  loss = lambda model, params: jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS)["logits"]))
  value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, MODEL.clone(remat=True))))(params)
  unrolled = MODEL.clone(mlp=(12, 12, 12))
  own, own_grads = jax.jit(jax.value_and_grad(functools.partial(loss, unrolled)))(
    {**params, "blocks": layers})
  np.testing.assert_allclose(value, own, rtol=1e-4)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own_grads.pop("blocks").values())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
               grads, {**own_grads, "blocks": stacked})


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


# The cache.


def test_cached_equals_uncached():
  """One sequence in four rows: plain, with padding inside, with padding before, with a rejected token.

  Token by token and in chunks, for every kind of member.
  """
  _, variables = family()
  net = family()[0]
  text, wrong = TOKENS[0], (TOKENS[0, 3] + 1) % 11
  tokens = np.stack([text, [*text[:4], -1, -1, *text[4:6]], [-1, -1, *text[:6]],
                     [*text[:3], wrong, *text[3:7]]]).astype(np.int32)
  positions = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, -1, -1, 4, 5], [-1, -1, 0, 1, 2, 3, 4, 5],
                        [0, 1, 2, 3, 3, 4, 5, 6]], np.int32)

  for kind in KINDS:
    subnet = SPACE.subnet(kind)
    module, params = net.module(subnet), net.cut(variables, subnet)["params"]

    @jax.jit
    def run(params):
      def chunk(cache, part):
        outputs, updated = module.apply({"params": params, "cache": cache}, part[0], positions=part[1],
                                        mutable=["cache"])
        return updated["cache"], outputs["logits"]

      found = []
      for count in (LENGTH, 2):
        split = lambda x: jnp.swapaxes(x.reshape(BATCH, count, -1), 0, 1)
        _, logits = jax.lax.scan(chunk, init_cache(module, BATCH, 10), (split(tokens), split(positions)))
        found.append(jnp.swapaxes(logits, 0, 1).reshape(BATCH, LENGTH, -1))
      return module.apply({"params": params}, jnp.asarray(text)[None])["logits"][0], found

    wanted, found = run(params)
    counted = positions >= 0
    counted[3, 3] = False
    for logits in found:
      np.testing.assert_allclose(np.asarray(logits)[counted], np.asarray(wanted)[positions[counted]],
                                 rtol=1e-4, atol=1e-4)


def test_a_cache_has_the_shapes_that_its_network_writes():
  net, variables = family()
  for kind in KINDS:
    subnet = SPACE.subnet(kind)
    module = net.module(subnet)
    cache = init_cache(module, BATCH, 10, jnp.bfloat16)
    variables = {"params": jax.eval_shape(functools.partial(net.cut, subnet=subnet), net.shapes)["params"]}
    write = lambda v, c: module.apply({**v, "cache": c}, TOKENS, mutable=["cache"])[1]["cache"]
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(jax.eval_shape(write, variables, cache)) == like(cache)
  with pytest.raises(ValueError, match="a cache of 17 slots; allowed are at most context=16"):
    init_cache(MODEL, 1, 17)


# Layer dropout.


def test_a_layer_is_skipped_whole_and_for_each_example_by_itself():
  model = PLAIN.clone(layer_dropout=0.5)
  names = variable_axes(model, INPUT)["constants"]
  stored = jax.jit(lambda key: meta.unbox(model.init(key, TOKENS))["constants"])(jax.random.key(0))
  for part in ("attention", "mlp"):
    rates = stored["blocks"][part]["layer_dropout"]
    np.testing.assert_allclose(rates, 0.5 * (2 ** np.array([0, 0.5, 1]) - 1), rtol=1e-6)
  kept = take(stored, names, Subnet(layers=(0, 2)))["blocks"]["mlp"]
  assert kept["layer"].tolist() == [0, 2] and kept["layer_dropout"].tolist() == [0, 0.5]

  rates = jax.tree.map_with_path(
    lambda path, x: np.float32([0, 0.6, 1]) if "dropout" in str(path[-1]) else x, stored)
  tokens = np.repeat(TOKENS[:1], 300, axis=0)

  @jax.jit
  def run(v, key):
    trained = model.apply(v, tokens, train=True, taps=True, rngs={"dropout": key})["taps"]
    return trained, PLAIN.apply({"params": v["params"]}, tokens[:1], taps=True)["taps"]

  trained, plain = run({"params": randomised(PLAIN)["params"], "constants": rates}, jax.random.key(3))
  np.testing.assert_allclose(trained[0], np.broadcast_to(plain[0], trained[0].shape), rtol=1e-4, atol=1e-4)
  skipped = np.asarray((trained[1] == trained[0]).all((1, 2)))
  assert abs(skipped.mean() - 0.6) < 4 * np.sqrt(0.6 * 0.4 / 300)
  np.testing.assert_allclose(trained[1][~skipped], np.broadcast_to(
    plain[1], trained[1][~skipped].shape), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(trained[2], trained[1])


# Options and errors.


@pytest.mark.parametrize("dtype, param_dtype", [
  (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)])
def test_types_of_computation_and_parameters(dtype, param_dtype):
  for model in (MODEL, PLAIN):
    model = model.clone(dtype=dtype, param_dtype=param_dtype)
    made = shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(made["params"])} == {jnp.dtype(param_dtype)}
    outputs = jax.eval_shape(lambda v: model.apply(v, TOKENS, taps=True), made)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}


def test_it_is_known_by_its_name_and_its_fields_are_as_json_gives_them():
  assert options.model_class("Decoder") is Decoder
  known = options.fields(Decoder)
  assert (known["rope_scaling"], known["head_dim"], known["kv_heads"]) == (tuple, int, None)
  pairs = [list(pair) for pair in MODEL.rope_scaling]
  again = MODEL.clone(rope_scaling=pairs)
  assert again == MODEL and hash(again) == hash(MODEL)
  small = MODEL.clone(embed=8, heads=2)
  assert small.head_dim == 4 and dataclasses.replace(small, heads=4).head_dim == 4


@pytest.mark.parametrize("fields, message", [
  (dict(heads=3), "heads=3 does not divide into kv_heads=2 groups"),
  (dict(heads=(4, 2, 4), kv_heads=(2, 2, 3)), r"heads=\(4, 2, 4\) does not divide into kv_heads=\(2, 2, 3\)"),
  (dict(embed=14), "embed=14 does not divide into heads=4; give head_dim"),
  (dict(heads=(2, 4)), r"heads=\(2, 4\); give head_dim"),
  (dict(head_dim=3), "head_dim=3; allowed are even"),
  (dict(layers=0), "layers=0; allowed is at least 1"),
  (dict(layer_dropout=1.0), r"layer_dropout=1.0; allowed is \[0, 1\)"),
  (dict(rope_scaling={"rope_type": "yarn"}), "rope_type of rope_scaling 'yarn'.*linear, llama3"),
  (dict(rope_scaling={"rope_type": "linear"}), "type linear: got rope_type; allowed are rope_type, factor")],
  ids=str)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    Decoder(**{**dict(layers=3, embed=16, heads=4, kv_heads=2, mlp=8, vocab=11), **fields})


def test_a_sequence_longer_than_the_context():
  with pytest.raises(ValueError, match="a sequence of 17 tokens; allowed are at most context=16"):
    jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 17), jnp.int32))


@pytest.mark.parametrize("space, message", [
  (dict(heads=(1, 4), kv_heads=(1, 2)), "heads=1 beside kv_heads=2, which does not divide into these"),
  (dict(heads=(2, 4), kv_heads=(1, 2)), "heads=4 beside kv_heads=1, which has 4 heads in a group, where"),
  (dict(heads=(2, 4), kv_heads=(1, 2), per_layer=("heads",)), "heads=4 beside kv_heads=1.*couple="),
  (dict(heads=(3, 4)), "heads=3 beside kv_heads=2"),
  (dict(heads=(2, 4), groups={"heads": 2}), "space.groups.heads=2.*allowed are space.groups.kv_heads")], ids=str)
def test_families_whose_heads_do_not_go_together(space, message):
  with pytest.raises(ValueError, match=message):
    Supernet(PLAIN, Space(**{"layers": (1, 3), **space}), (INPUT,))


def test_families_whose_constraint_keeps_heads_together():
  space = Space(heads=(2, 4), kv_heads=(1, 2), constraint=lambda s: s["heads"] == 2 * s["kv_heads"])
  assert Supernet(PLAIN, space, (INPUT,)).space.size == 2
  with pytest.raises(ValueError, match="unknown axis of Decoder 'head_dim'.*layers, embed, heads, kv_heads"):
    PLAIN.sizes(Subnet(head_dim=2))
