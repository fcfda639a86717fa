"""Resolution is a choice of the images, not of the parameters: cut, trained, counted and evaluated by it."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestnet import Space, Subnet, cost, extraction, runs
from nestnet.calibrate import calibrate
from nestnet.evaluation import costs, member_flops
from nestnet.evaluators.classification import classification
from nestnet.execution import Supernet, resized
from nestnet.interop.folder import load
from nestnet.models.mobilenet import MobileNet
from nestnet.models.vit import ViT
from nestnet.objectives import objective
from nestnet.one_program import OneProgram
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.steps import Recipe, Step
from tests.test_experiments import shrunken
from tests.test_one_program import capture

IMAGES = np.random.default_rng(9).normal(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0])
INPUT = (jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype),)
MODEL = MobileNet(3, widths=(8, 8), head=(8,), strides=(1, 1), squeeze=(False, False),
                  activations=("relu", "relu"), layers_1=2, expand_1=1, kernel_1=3, stem=8)
SPACE = Space(layers_1=(1, 2), resolution=(4, 6, 8))
NET = Supernet(MODEL, SPACE, INPUT)
SMALL, LARGE = SPACE.smallest, SPACE.largest


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), NET.shapes["params"])


def logits(params, subnet):
  """By hand: the network on images of its resolution."""
  side = subnet["resolution"]
  images = jax.image.resize(IMAGES, (4, side, side, 1), "linear")
  module = MODEL.clone(layers_1=subnet["layers_1"])
  return module.apply(NET.cut({"params": params}, Subnet(layers_1=subnet["layers_1"])), images)["logits"]


def test_it_is_an_axis_of_the_space():
  assert (SMALL["resolution"], LARGE["resolution"], SPACE.size) == (4, 8, 6)
  member = SPACE.subnet("resolution=6,layers_1=1")
  assert str(member) == "layers_1=1,resolution=6" and SPACE.decode(SPACE.encode(member)) == member
  with pytest.raises(ValueError, match="resolution=5 is outside the space; allowed for resolution: 4, 6, 8"):
    SPACE.subnet("resolution=5")


def test_it_cuts_no_parameter(params):
  plain = Subnet(layers_1=1)
  small, own = (NET.cut({"params": params}, subnet) for subnet in (SMALL, plain))
  jax.tree.map(np.testing.assert_array_equal, small, own)
  assert NET.module(SMALL) == NET.module(plain)


def test_costs_are_those_at_its_resolution():
  small, other = SPACE.subnet("layers_1=2,resolution=4"), SPACE.subnet("layers_1=2,resolution=8")
  assert costs(NET, small)["params"] == costs(NET, other)["params"]
  assert costs(NET, small)["flops"] == cost.flops(MODEL, jax.ShapeDtypeStruct((4, 4, 4, 1), jnp.float32))
  assert member_flops(NET)(small, False) == costs(NET, small)["flops"] < costs(NET, other)["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["slice", "one_program"])
def test_teacher_and_student_see_images_of_their_own(execution):
  """The largest on labels, the smallest on its logits: the gradient of that sum, written out."""
  step = Step(NET, Recipe(sampler("sandwich", SPACE, 0, random=0), objective("classification")), capture,
              make_mesh({"data": 1}), execution=execution)
  state = step.init()
  start = jax.tree.map(np.asarray, state.trained["model"])

  def loss(params):
    teacher = logits(params, LARGE)
    student = optax.softmax_cross_entropy(
      logits(params, SMALL), jax.lax.stop_gradient(jax.nn.softmax(teacher))).mean()
    return optax.softmax_cross_entropy_with_integer_labels(teacher, LABELS).mean() + student

  expected, grads = jax.jit(jax.value_and_grad(loss))(start)
  state, metrics = step(state, put_batch({"image": IMAGES, "label": LABELS}, step.mesh), 0)
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  for found, own in zip(*map(jax.tree.leaves, (state.opt_state["model"], grads)), strict=True):
    np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_program_has_a_branch_for_each(params, compiled):
  one = OneProgram(NET)
  assert one.outer == ("resolution",) and len(one.widths) == 3

  def run(runnable, params):
    cut = {**runnable.cut({"params": params}), "choice": runnable.choice}
    return runnable.module.apply(cut, resized(jnp.asarray(IMAGES), runnable.subnet))["logits"]

  call = jax.jit(functools.partial(one.switch, run))
  for text in ("layers_1=1,resolution=4", "layers_1=2,resolution=6"):
    subnet = SPACE.subnet(text)
    np.testing.assert_allclose(call(one.vector(subnet), params), logits(params, subnet), rtol=1e-4, atol=1e-5)
  assert compiled.count("jit(switch)") == 1


def test_evaluation_is_at_its_resolution(params):
  module, own = NET.module(SMALL), NET.cut({"params": params}, SMALL)
  images = jax.image.resize(IMAGES, (4, 4, 4, 1), "linear")
  own |= {"batch_stats": calibrate(module, own, [images])}
  found = dict(classification(module, own, {"image": IMAGES, "label": LABELS}, SMALL))
  own = jax.jit(module.apply)(own, images)["logits"]
  expected = optax.softmax_cross_entropy_with_integer_labels(own, LABELS).mean()
  np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)


@pytest.mark.slow
def test_an_extracted_network_tells_its_resolution(tmp_path):
  config = shrunken("sandwich", steps=2)
  config.unlock()
  config.model = dict(name="MobileNet", widths=(8, 8), head=(8,), strides=(1, 1), squeeze=(False, False),
                      activations=("relu", "relu"), layers_1=2, expand_1=1, kernel_1=3, stem=8)
  config.space = dict(layers_1=(1, 2), resolution=(6, 8))
  assert runs.train(config, tmp_path / "run", show_progress=False)
  row, difference = extraction.extract_run(tmp_path / "run", tmp_path / "out", "layers_1=1,resolution=6")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert difference == 0.0 and written["sizes"]["resolution"] == 6 and "resolution" not in written["fields"]
  module, variables = load(tmp_path / "out")
  images = jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.float32)
  assert row["flops"] == cost.flops(module, images) and row["params"] == cost.count_tree(variables["params"])


@pytest.mark.parametrize("make, message", [
  (lambda: Supernet(MODEL, Space(layers_1=(2,), resolution=(4, 9)), INPUT),
   "resolution=9: the images are 8 x 8 pixels; allowed are sides up to 8"),
  (lambda: Supernet(MODEL, Space(layers_1=(2,), resolution=(4, 8)), (
    jax.ShapeDtypeStruct((1, 8, 6, 1), jnp.float32),)),
   r"the inputs are \[1, 8, 6, 1\]; allowed are square"),
  (lambda: Supernet(ViT(2, 8, 2, 8, 3, patch=2), Space(layers=(1, 2), resolution=(4, 8)), INPUT),
   r"positions'\] of the module is \[4, 8\], the slice is \[16, 8\]; parameters may not depend on")])
def test_what_cannot_be_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
