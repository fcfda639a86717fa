"""The decoder: its formula, what it sees, its cache and its options."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from nestnet import Space, Subnet, options, take
from nestnet.axes import variable_axes
from nestnet.execution import Supernet
from nestnet.models.cache import init_cache
from nestnet.models.decoder import Decoder

BATCH, LENGTH = 4, 8
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
    v, tokens, positions=positions, taps=True, exits=(1, 3, 7)))


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
  assert jax.tree.map(jnp.shape, outputs) == {
    "logits": (4, 8, 11), "features": (4, 8, 16), "taps": (3, 4, 8, 16),
    "exits": {1: (4, 8, 11), 3: (4, 8, 11)}}
  np.testing.assert_array_equal(outputs["exits"][3], outputs["logits"])
  first = {**variables["params"], "blocks": jax.tree.map(lambda x: x[:1], variables["params"]["blocks"])}
  wanted = by_hand(MODEL.clone(layers=1), first, TOKENS[0])
  np.testing.assert_allclose(outputs["exits"][1][0], wanted, rtol=1e-4, atol=1e-4)
  exits = lambda exits: jax.eval_shape(lambda v: MODEL.apply(v, TOKENS, exits=exits), variables)["exits"]
  assert [*exits("all")] == [1, 2, 3]
  with pytest.raises(ValueError, match=r"exits=\[0\]; allowed are depths of at least 1, or all"):
    exits([0])
  with pytest.raises(ValueError, match="unknown exits 'every'"):
    exits("every")


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


@pytest.mark.slow
def test_scanned_recomputed_and_unrolled_blocks_are_one_function():
  model = PLAIN.clone(layers=2)
  params = randomised(model)["params"]
  layers = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(2)}
  loss = lambda model, params: jnp.sum(jnp.sin(model.apply({"params": params}, TOKENS)["logits"]))
  value, grads = jax.jit(jax.value_and_grad(functools.partial(loss, model.clone(remat=True))))(params)
  unrolled = model.clone(mlp=(12, 12))
  own, own_grads = jax.jit(jax.value_and_grad(functools.partial(loss, unrolled)))(
    {**params, "blocks": layers})
  np.testing.assert_allclose(value, own, rtol=1e-4)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own_grads.pop("blocks").values())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
               grads, {**own_grads, "blocks": stacked})


# The cache.


@pytest.mark.parametrize("kind", [
  pytest.param(text, marks=() if "+" in text else pytest.mark.slow) for text in KINDS])
def test_cached_equals_uncached(kind):
  """One sequence in four rows: with padding behind, inside or before, and with a rejected token.

  Token by token and in chunks, for every kind of member.
  """
  net, variables = family()
  text, wrong = TOKENS[0, :6], (TOKENS[0, 3] + 1) % 11
  positions = np.array([[0, 1, 2, 3, 4, 5, -1, -1], [0, 1, 2, 3, -1, -1, 4, 5], [-1, -1, 0, 1, 2, 3, 4, 5],
                        [0, 1, 2, 3, 3, 4, 5, -1]], np.int32)
  tokens = np.where(positions < 0, -1, text[positions])
  tokens[3, 3] = wrong

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
      _, logits = jax.lax.scan(chunk, init_cache(module, BATCH, len(text)), (split(tokens), split(positions)))
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
    lambda path, x: np.float32([0, 0.6, 0.6]) if "dropout" in str(path[-1]) else x, stored)
  tokens = np.repeat(TOKENS[:1], 300, axis=0)

  @jax.jit
  def run(v, key):
    trained = model.apply(v, tokens, train=True, taps=True, rngs={"dropout": key})["taps"]
    return trained, PLAIN.apply({"params": v["params"]}, tokens[:1], taps=True)["taps"]

  trained, plain = run({"params": randomised(PLAIN)["params"], "constants": rates}, jax.random.key(3))
  np.testing.assert_allclose(trained[0], np.broadcast_to(plain[0], trained[0].shape), rtol=1e-4, atol=1e-4)
  first, second = (np.asarray((trained[i] == trained[i - 1]).all((1, 2))) for i in (1, 2))
  for share, expected in ((first, 0.6), (second, 0.6), (first & second, 0.36)):
    assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 300)
  for layer, kept in ((1, ~first), (2, ~first & ~second)):
    found = np.asarray(trained[layer])[kept]
    np.testing.assert_allclose(found, np.broadcast_to(plain[layer], found.shape), rtol=1e-4, atol=1e-4)


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
