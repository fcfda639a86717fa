"""Units in another order: the same networks, in a train state that goes on as if nothing had happened."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import Space, build
from nestnet.execution import Supernet
from nestnet.importance import Sort, _activations, orders, permuted, ranked, scores, sizes_trained
from nestnet.models import mobilenet, resnet50d
from nestnet.models.layers import Linear
from nestnet.models.mobilenet import MobileNet
from nestnet.models.resnet50d import ResNet50D
from nestnet.models.vit import ViT
from nestnet.objectives import objective
from nestnet.permuting import permute
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.steps import Recipe, Step
from nestnet.training import Border

INPUT = (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),)
SMALL = MobileNet(3, widths=(8, 8, 8), head=(8, 16), strides=(1, 2, 1), squeeze=(False, False, True),
                  activations=("relu", "relu", "h_swish"), layers_1=1, layers_2=3, expand_1=2, expand_2=4,
                  kernel_1=3, kernel_2=5, stem=8, transforms=True)
RESNET = ResNet50D(3, layers_1=2, layers_2=1, layers_3=1, layers_4=1, widths=(16, 24, 24, 32), stem=16)
VIT = ViT(layers=2, embed=16, heads=4, mlp=16, classes=3, head_dim=4, features=12, drop_path=0.1)
FAMILIES = {
  "mobilenet": (SMALL, mobilenet.space(SMALL, (1, 2, 3), (1, 2, 4), (3, 5))),
  "resnet": (RESNET, resnet50d.space(RESNET, (0,))),
  "grouped": (SMALL.clone(norm="group", group=4), mobilenet.space(SMALL, (1, 2, 3), (1, 2, 4), (3, 5))),
  "vit": (VIT, Space(layers=(1, 2), embed=(12, 16), heads=(2, 4), mlp=(4, 8, 16), features=(4, 12),
                     per_layer=("mlp",), groups={"mlp": 2}))}


@functools.cache
def family(name):
  return Supernet(*FAMILIES[name], INPUT)


@functools.cache
def params(name):
  rng = np.random.default_rng(0)
  draw = lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype)
  return jax.tree.map(draw, family(name).shapes["params"])


@functools.cache
def make(name, which="largest", **fields):
  net = family(name)
  recipe = Recipe(sampler(which, net.space), objective("classification"), teacher="ema", ema=0.5, **fields)
  return Step(net, recipe, lambda mask: optax.sgd(0.05, momentum=0.9), make_mesh({"data": 1}),
              execution="slice")


class Data:
  def __getitem__(self, step):
    rng = np.random.default_rng(step)
    image = rng.normal(size=(6, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(6, dtype=np.int32) % 3}


def close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@functools.cache
def network(name, subnet):
  net = family(name)
  return jax.jit(lambda tree, x: net.module(subnet).apply(net.cut({"params": tree}, subnet), x)["logits"])


def logits(name, tree, subnet):
  return np.asarray(network(name, subnet)(tree, Data()[9]["image"]))


def test_units_stay_between_sizes_and_are_dealt_to_groups():
  score = np.random.default_rng(0).permutation(12).astype(np.float32)
  order = np.asarray(ranked(jnp.asarray(score), (4, 8), groups=2))
  leading = lambda units, size: {u for u in units if u % 6 < size // 2}
  for low, high in ((0, 4), (4, 8), (8, 12)):
    places = sorted((p for p in range(12) if low // 2 <= p % 6 < high // 2), key=lambda p: (p % 6, p // 6))
    assert {*order[places]} == set(places)
    assert (np.diff(score[order[places]]) < 0).all()
  assert {*order[list(leading(range(12), 4))]} == leading(range(12), 4)
  np.testing.assert_array_equal(ranked(jnp.ones(12), (4,), groups=3), np.arange(12))


def test_scores_are_sums_over_what_reads_a_unit():
  """By numpy, in each block; squeeze-excite weighs the channels and does not read them."""
  tree, names = params("mobilenet"), family("mobilenet").axes["params"]
  first, rest = (tree["stage_2"][k] for k in ("layers_2_0", "rest"))
  kernels = [first["project"]["conv"]["kernel"], *rest["project"]["conv"]["kernel"]]
  close(scores(names, tree, "hidden_2", layers=3), [np.abs(k).sum(1) for k in kernels])
  close(scores(names, tree, "hidden_2", "l2", layers=3), [np.square(k).sum(1) for k in kernels])
  kernels = [first["squeeze"]["expand"]["kernel"], *rest["squeeze"]["expand"]["kernel"]]
  close(scores(names, tree, "squeeze_2", layers=3), [np.abs(k).sum(1) for k in kernels])
  # The residual stream has one order for all that read it: here its own stage and the head.
  kernels = [*rest["expand"]["conv"]["kernel"], tree["head_0"]["conv"]["kernel"]]
  close(scores(names, tree, "embed_2"), [sum(np.abs(k).sum(1) for k in kernels)])


@pytest.mark.slow
def test_activations_are_those_that_kernels_see():
  step = make("vit")
  state = step.init()
  seen = _activations(step, state, Data(), 2)
  found = scores(step.axes, state.trained, "mlp", "activation", 2, seen)
  run = jax.jit(lambda x: VIT.apply({"params": state.trained["model"], **state.fixed}, x,
                                    capture_intermediates=True, mutable=["intermediates"])[1])
  taps = []
  for batch in (Data()[0], Data()[1]):
    kept = run(batch["image"])
    hidden = kept["intermediates"]["blocks"]["mlp"]["up"]["__call__"][0]
    taps.append(np.abs(nn.gelu(hidden)).mean((1, 2)))
  close(found, [(taps[0][i] + taps[1][i]) / 2 for i in range(2)])
  assert scores(step.axes, state.trained, "heads", "activation", 2, seen)[1].shape == (4,)


def test_channels_that_are_normalised_as_one_move_as_one():
  found = orders(family("grouped"), family("grouped").axes["params"], params("grouped"), ["hidden_2", "stem"])
  moved = [np.asarray(order).reshape(-1, 4) for order in (*found["hidden_2"], found["stem"])]
  assert all((rows == rows[:, :1] // 4 * 4 + np.arange(4)).all() for rows in moved)
  assert any((np.diff(rows[:, 0]) < 0).any() for rows in moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_and_an_order_commute(name):
  """All axes that can be sorted, each layer by itself; weights, momentum and average alike."""
  step = make(name)
  state, _ = step(step.init(), put_batch(Data()[0], step.mesh), 0)
  rng = np.random.default_rng(1)
  noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.trained)
  state = state.replace(trained=noisy)
  channels = ["stem", "embed_1", "hidden_1", "hidden_2", "squeeze_2", "head_0", "features"]
  wanted = {"mobilenet": channels, "grouped": channels,
            "resnet": ["stem", "embed_0", "embed_1", "embed_4", "hidden_1", "inner_1", "inner_4"],
            "vit": ["embed", "heads", "mlp"]}[name]
  found = orders(step.supernet, step.axes, state.trained, wanted)
  assert all(any((np.asarray(o) != np.arange(len(o))).any() for o in (v if isinstance(v, tuple) else [v]))
             for v in found.values())
  other = permuted(step, state, found)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), other, state)
  assert any(jax.tree.leaves(moved.opt_state)) and any(jax.tree.leaves(moved.teacher))
  # A step's state is donated.
  copy = jax.tree.map(jnp.copy, state)
  whole = [step(s, put_batch(Data()[1], step.mesh), 1) for s in (copy, other)]
  close(whole[0][1]["loss"], whole[1][1]["loss"])
  close(permuted(step, whole[0][0], found), whole[1][0], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "mobilenet", "grouped"])
def test_members_that_trained_before_compute_the_same(name):
  """And the smallest has changed where units were free."""
  before = make(name, "sandwich")
  state = before.init()
  state = state.replace(trained={**state.trained, "model": params(name)})
  kept = Sort()(state, Border(before, before, Data())).trained["model"]
  free = Sort(keep="nothing")(state, Border(before, before, Data())).trained["model"]
  space = before.supernet.space
  for subnet in (space.smallest, space.sample(1)):
    close(logits(name, kept, subnet), logits(name, params(name), subnet), 1e-3)
  assert np.abs(logits(name, free, space.smallest) - logits(name, params(name), space.smallest)).max() > 1e-2
  close(logits(name, free, space.largest), logits(name, params(name), space.largest), 1e-3)


def test_sizes_that_a_phase_trained():
  """Every combination; of a fixed list that alone, so after the full network units are free."""
  sizes = sizes_trained(make("mobilenet", "sandwich"))
  assert sizes["hidden_2"] == {None: {8, 16, 32}} and sizes["squeeze_2"] == {None: {8}}
  assert sizes_trained(make("mobilenet"))["hidden_2"] == {None: {32}}
  # A width and an expansion make it together: divisible(divisible(32 w / 100) e / 100).
  assert sizes_trained(make("resnet", "sandwich"))["hidden_4"] == {None: {8, 16}}


class Untied(nn.Module):
  """Two names for one space."""

  embed: int
  mlp: int
  classes: int = 3

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1))
    x += Linear("embed -> mlp", (self.embed,), name="up")(x)
    return {"logits": Linear("mlp -> classes", (self.classes,), name="head")(x)}


def test_what_cannot_be_sorted_is_said():
  space = Space(couple={"embed mlp": ((4, 4), (8, 8))})
  step = Step(Supernet(Untied(8, 8), space, INPUT), Recipe(sampler("largest", space), objective(
    "classification")), lambda mask: optax.sgd(0.1), make_mesh({"data": 1}), execution="slice")
  state = step.init()
  sort = lambda **options: Sort(**options)(state, Border(None, step, Data()))
  with pytest.raises(ValueError, match="units of embed in another order change what the largest network"):
    sort(axes=("embed",))
  with pytest.raises(ValueError, match="unknown axis to sort 'embde'; did you mean 'embed'"):
    sort(axes=("embde",))
  with pytest.raises(ValueError, match="no kernel reads classes"):
    sort(axes=("classes",))
  with pytest.raises(ValueError, match="unknown by of the order 'l3'"):
    Sort(by="l3")
  with pytest.raises(ValueError, match="unknown axis 'mpl'"):
    permute({"up": np.ones((2, 3))}, {"up": "embed -> mlp"}, {"mpl": np.arange(3)})
  with pytest.raises(ValueError, match=r"up: mlp has 3 units, got orders of \[2\]"):
    permute({"up": np.ones((2, 3))}, {"up": "embed -> mlp"}, {"mlp": np.arange(2)})


def test_a_phase_names_its_order():
  config = {
    "model": {"name": "ViT", "layers": 1, "embed": 8, "heads": 2, "mlp": 8, "patch": 4},
    "space": {"mlp": (4, 8)},
    "recipe": {"name": "x", "sampler": {"name": "joint"}, "objective": {"name": "classification"}},
    "data": {"name": "digits", "data_dir": ""}, "optim": {"name": "sgd", "learning_rate": 0.1},
    "train": {"steps": 2, "batch_size": 8, "checkpoint_every": 2, "log_every": 1, "eval_every": 0},
    "mesh": {"data": 1}}
  phases = lambda value: [{"steps": 1}, {"steps": 1, "enter": value}]
  enter = lambda value: build.build(config | {"phases": phases(value)}).phases[1].enter
  assert enter("nestnet.importance:Sort") == Sort()
  assert enter({"name": "nestnet.importance:Sort", "by": "activation"}) == Sort(by="activation")
  with pytest.raises(ValueError, match="unknown option of the transition nestnet.importance:Sort 'how'"):
    enter({"name": "nestnet.importance:Sort", "how": "l1"})
