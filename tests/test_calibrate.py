"""Statistics of sub-networks: moments by hand, slices and one program alike; evaluated, extracted."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet, build, evaluation, extraction, runs
from nestnet.calibrate import average, calibrate, calibrate_all, moments, normalises
from nestnet.data import Batches, arrays, augmentation
from nestnet.evaluators.classification import classification, classification_all
from nestnet.execution import Supernet, extract
from nestnet.interop.folder import load, save
from nestnet.models.convolution import ConvNorm
from nestnet.models.layers import Linear
from nestnet.models.stack import stack
from nestnet.models.vit import ViT
from nestnet.one_program import OneProgram

MODULE = '''
import flax.linen as nn
from nestnet.models.convolution import ConvNorm
from nestnet.models.layers import Linear

class Net(nn.Module):
  stem: int
  hidden: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    x = ConvNorm("channels", "stem", self.stem, 3, 2, "relu", name="first")(images, train)
    x = ConvNorm("stem", "hidden", self.hidden, name="second")(x, train).mean((1, 2))
    return {"features": x, "logits": Linear("hidden -> classes", (self.classes,), name="head")(x)}
'''
CONFIG = {
  "seed": 0, "model": {"name": "calibrate_model:Net", "stem": 8, "hidden": 8},
  "space": {"couple": {"stem hidden": ((4, 4), (8, 8))}},
  "recipe": {"name": "joint", "sampler": {"name": "joint"}, "objective": {"name": "classification"}},
  "data": {"name": "digits", "data_dir": "", "augment": "digits"},
  "optim": {"name": "sgd", "learning_rate": 0.1},
  "train": {"steps": 3, "batch_size": 16, "checkpoint_every": 3, "log_every": 1, "eval_every": 2},
  "mesh": {"data": 1}, "eval": {"calibrate_images": 60, "calibrate_batch_size": 25}}
RNG = np.random.default_rng(0)
IMAGES = [RNG.normal(k, 1 + k, (n, 4, 4, 2)).astype(np.float32) for k, n in enumerate((3, 5))]


class Block(nn.Module):
  mlp: int
  embed: int

  @nn.compact
  def __call__(self, x, constants, *, train):
    y = ConvNorm("embed", "mlp", self.mlp, act="relu", name="up")(x, train)
    return x + ConvNorm("mlp", "embed", self.embed, name="down")(y, train)


class Stack(nn.Module):
  layers: int
  embed: int
  mlp: int

  @nn.compact
  def __call__(self, images, *, train=False):
    x = ConvNorm("channels", "embed", self.embed, name="stem")(images, train)
    x, _ = stack(functools.partial(Block, embed=self.embed), x, layers=self.layers, sizes={"mlp": self.mlp},
                 train=train)
    return {"logits": Linear("embed -> classes", (3,), name="head")(x.mean((1, 2)))}


NET = Supernet(Stack(3, 4, 4), Space(layers=(1, (0, 2), 3), embed=(2, 4), mlp=(2, 4), per_layer=("mlp",)),
               (jax.ShapeDtypeStruct(IMAGES[0].shape, jnp.float32),))
MEMBER = "layers=0+2,embed=2,mlp=4:2"


@functools.cache
def variables():
  rng = np.random.default_rng(1)
  return {"params": jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), NET.shapes["params"])}


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("pooled", [True, False])
def test_the_first_layer_gets_the_moments_of_all_images(pooled):
  """By numpy, over the images put together; without the spread of the means as Once-for-All has it."""
  found = calibrate(NET.model, variables(), IMAGES, pooled)["stem"]["norm"]
  kernel = variables()["params"]["stem"]["conv"]["kernel"]
  seen = [np.einsum("bijc,cd->bijd", x, kernel).reshape(-1, 4) for x in IMAGES]
  whole = np.concatenate(seen)
  var = whole.var(0) if pooled else (3 * seen[0].var(0) + 5 * seen[1].var(0)) / 8
  close(found, {"mean": whole.mean(0), "var": var})
  assert (np.abs(whole.var(0) - (3 * seen[0].var(0) + 5 * seen[1].var(0)) / 8) > 0.1).any()


def test_every_layer_gets_the_average_of_its_batches():
  """And with the statistics of one batch, that batch is normalised as it was in training."""
  apply = jax.jit(lambda x: NET.model.apply(variables(), x, mutable=["batch_stats"]))
  (logits, one), (_, two) = apply(IMAGES[0]), apply(IMAGES[1])
  found = calibrate(NET.model, variables(), IMAGES)["blocks"]["down"]["norm"]
  one_, two_ = (s["batch_stats"]["blocks"]["down"]["norm"] for s in (one, two))
  mean = (3 * one_["mean"] + 5 * two_["mean"]) / 8
  var = sum(n * (s["var"] + (s["mean"] - mean) ** 2) for n, s in ((3, one_), (5, two_))) / 8
  close(found, {"mean": mean, "var": var})
  assert found["mean"].shape == (3, 4)
  stats = calibrate(NET.model, variables(), IMAGES[:1])
  close(jax.jit(NET.model.apply)({**variables(), "batch_stats": stats}, IMAGES[0]), logits)


def test_a_slice_in_place_is_calibrated_as_the_extracted_network_bit_for_bit():
  subnet = NET.space.subnet(MEMBER)
  module, own = extract(NET.model, variables(), subnet, *NET.inputs)
  run = jax.jit(lambda v, x: moments(NET.runnable(subnet), v, x))
  place = average(functools.partial(run, variables()), IMAGES)
  jax.tree.map(np.testing.assert_array_equal, place, calibrate(module, own, IMAGES))
  assert place["blocks"]["layers_1"]["up"]["norm"]["var"].shape == (2,)


def test_an_array_of_sub_networks_is_one_program_with_the_statistics_of_their_slices():
  one = OneProgram(NET)
  members = [NET.space.subnet(t) for t in (MEMBER, "layers=1,mlp=2", "layers=3,embed=4", "embed=2")]
  vectors = np.stack([one.vector(m) for m in members])
  found = calibrate_all(one, variables(), vectors, IMAGES)
  for i, member in enumerate(members):
    alone = calibrate(NET.module(member), NET.cut(variables(), member), IMAGES)
    close(NET.cut({"batch_stats": jax.tree.map(lambda x: x[i], found)}, member)["batch_stats"], alone)
  # What a member has not is zero.
  assert not found["blocks"]["up"]["norm"]["var"][1, 1:].any()
  assert not found["stem"]["norm"]["mean"][0, 2:].any()


def test_only_networks_that_normalise_by_batches_are_calibrated():
  vit = ViT(layers=1, embed=8, heads=2, mlp=8, classes=3)
  image = (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),)
  assert normalises(NET.model, NET.inputs) and not normalises(vit, image)
  with pytest.raises(ValueError, match="calibration needs images"):
    calibrate(NET.model, variables(), [])


def test_evaluating_an_uncalibrated_network_says_so():
  data = {"image": IMAGES[0], "label": np.zeros(3, np.int32)}
  with pytest.raises(ValueError, match="this Stack is not calibrated.*'batch_stats'.*nestnet.calibrate"):
    dict(classification(NET.model, variables(), data))


def test_statistics_of_another_network_are_told_from_a_network_s_own(tmp_path):
  """The mark lasts through a cut and a file, until the network is calibrated; the largest's are its own."""
  data = {"image": IMAGES[0], "label": np.zeros(3, np.int32)}
  supernet = variables() | {"batch_stats": calibrate(NET.model, variables(), IMAGES)}
  whole = extract(NET.model, supernet, NET.space.largest, *NET.inputs)
  assert "accuracy" in dict(classification(*whole, data))
  refused = pytest.raises(ValueError, match="Stack is not calibrated: its 'batch_stats' are those of another")
  for subnet in (Subnet(mlp=2), Subnet(layers=(0, 2)), Subnet(resolution=3)):
    module, small = extract(NET.model, supernet, subnet, *NET.inputs)
    save(tmp_path / "small", module, small)
    cut = {"batch_stats": NET.cut({"batch_stats": small["batch_stats"]}, Subnet(embed=2))["batch_stats"]}
    for borrowed in (small, load(tmp_path / "small", Stack)[1], small | cut):
      with refused:
        dict(classification(module, borrowed, data))
  small["batch_stats"] = calibrate(module, small, IMAGES)
  assert "accuracy" in dict(classification(module, small, data))
  one = OneProgram(NET)
  with refused:
    dict(classification_all(one, supernet | cut, {}, one.vector(NET.space.smallest)[None], data))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("calibrate")
  (folder / "calibrate_model.py").write_text(MODULE)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    assert runs.train(CONFIG, folder / "run", show_progress=False)
    yield folder / "run"


def test_members_are_evaluated_with_statistics_of_training_images(workdir):
  run, _, state = runs.opened(workdir)
  subnet = run.supernet.space.smallest
  row = evaluation.evaluate(run, state, [subnet])[0]
  module, own = run.supernet.module(subnet), run.step.member(state, subnet)
  drawn = Batches(run.dataset, "train", 25, 0, augmentation("digits"))
  own["batch_stats"] = calibrate(module, own, [drawn[0]["image"], drawn[1]["image"], drawn[2]["image"][:10]])
  test = arrays(run.dataset, "test")
  logits = jax.jit(module.apply)(own, test["image"])["logits"]
  assert row["calibration_images"] == 60
  assert row["accuracy"] == pytest.approx(np.mean(np.argmax(logits, -1) == test["label"]))


def test_an_extracted_network_brings_its_statistics(workdir, tmp_path):
  row, difference = extraction.extract_run(workdir, tmp_path / "small", "stem=4")
  run, _, state = runs.opened(workdir)
  module, own = load(tmp_path / "small", type(run.supernet.model))
  images = evaluation.calibration(run, run.supernet)
  assert difference == 0.0 and [len(x) for x in images] == [25, 25, 10]
  jax.tree.map(np.testing.assert_array_equal, own["batch_stats"],
               calibrate(module, {"params": own["params"]}, images))
  found = dict(classification(module, own, arrays(run.dataset, "test")))
  assert found["accuracy"] == row["accuracy"]
  # Budgets of latency time calibrated networks too.
  assert extraction.latencies(run, state, [row])[0]["latency_ms"] > 0


def test_what_calibration_is_worth(workdir):
  run, _, state = runs.opened(workdir)
  subnet = run.supernet.space.smallest
  rows = evaluation.by_calibration(run, state, subnet, ["0", "2"])
  assert [r["calibration_images"] for r in rows] == [0, 50]
  images = evaluation.calibration(run, run.supernet, 2)
  largest = calibrate(run.supernet.model, {"params": state.trained["model"]}, images)
  cut = {"batch_stats": jax.tree.map(lambda x: x[:4], largest)}
  own = run.step.member(state, subnet)
  wanted = dict(classification(run.supernet.module(subnet), own | cut, arrays(run.dataset, "test")))
  assert rows[0]["loss"] == wanted["loss"] and rows[1]["loss"] != wanted["loss"]
  table = evaluation.calibration_table(rows).splitlines()
  assert table[0].split() == ["batches", "images", "validation", "accuracy", "accuracy"] and len(table) == 3
  with pytest.raises(ValueError, match="batches for calibration: got .*-1.*at least 0"):
    evaluation.by_calibration(run, state, subnet, ["-1"])


@pytest.mark.parametrize("key", ["calibrate_images", "calibrate_batch_size"])
def test_wrong_options_are_said_at_the_start(key):
  with pytest.raises(ValueError, match=f"config.eval.{key}: got 0, allowed is a whole number of at least 1"):
    build.build(CONFIG | {"eval": {key: 0}})
  with pytest.raises(ValueError, match="unknown key of config.eval 'images'"):
    build.build(CONFIG | {"eval": {"images": 5}})
