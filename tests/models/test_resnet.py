"""ResNet50D: small images, stages, tied widths and their one program."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import Space, Subnet, cli
from nestnet.execution import Supernet
from nestnet.models import resnet50d
from nestnet.models.resnet50d import SMALL_IMAGES, ResNet50D
from nestnet.models.small_resnet import SmallResNet
from nestnet.one_program import OneProgram

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 1))
WIDE = dict(dtype=jnp.float64, param_dtype=jnp.float64)
TWO = ResNet50D(3, layers_1=1, layers_2=3, stem=16, widths=(16, 24), expand_1=100, expand_2=100, pool=False,
                strides=(1, 2))
TIED = resnet50d.space(TWO, (0,), (50, 100), (50, 75, 100), tie="width")


@pytest.mark.parametrize("model, side, strides", [
  (ResNet50D(10, **SMALL_IMAGES), 32, [1, 2, 4, 8]), (SmallResNet(10), 12, [2, 4, 4])],
  ids=["resnet50", "small"])
def test_total_strides_of_variants_for_small_images(model, side, strides):
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  outputs = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, taps=True)[0], images)
  assert [side // t.shape[2] for t in outputs["taps"]] == strides
  assert [t.shape[-1] for t in outputs["taps"]] == [model.channels(s) for s in model.stages]
  assert outputs["features"].shape == (1, model.widths[-1])


def test_the_variant_for_small_images_has_the_weights_of_the_network():
  """Strides and pooling have none, so that the authors' weights fit."""
  shapes = lambda model: jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert shapes(ResNet50D(10, **SMALL_IMAGES)) == shapes(ResNet50D(10))


def test_members_of_fewer_stages_are_slices():
  net = Supernet(TWO, resnet50d.space(TWO, (0,), (50, 100), (50, 100)),
                 (jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32),))
  for text in ("layers_0=1", "width_1=50,width_2=50,expand_2=100:50:50", "width_stem=50,width_0=50"):
    net.check(net.space.subnet(text))


def test_the_config_spells_a_space_of_its_network():
  config = cli.load_config(str(ROOT / "configs" / "digits_clutter_resnet.py"))
  space = Space(**config.space.to_dict())
  assert space.size == 2 ** 4 * (2 + 4 + 8) ** 3 and space.largest == space.pool[-1]
  net = Supernet(SmallResNet(10), space, (jax.ShapeDtypeStruct((1, 12, 12, 1), jnp.float32),))
  one = OneProgram(net)
  assert one.carried == ("width_0", "width_1", "width_2", "width_3") and len(one.widths) == 1
  assert set(one.inner) == {"expand_1", "expand_2", "expand_3"}
  vectors = {tuple(one.vector(member)) for member in space.pool}
  assert one.possible and len(vectors) == len(space.pool)


def variables_of(net):
  """Random parameters, those of norms too."""
  rng = np.random.default_rng(1)
  return {"params": jax.tree.map(lambda s: 0.5 * rng.normal(size=s.shape), net.shapes["params"])}


def outcome(runnable, variables):
  """Logits under batch statistics, and the gradient of a loss."""
  def loss(params):
    cut = runnable.cut({"params": params}) | ({"choice": runnable.choice} if runnable.choice else {})
    logits = runnable.module.apply(cut, IMAGES)["logits"]
    return jnp.sin(logits).sum(), logits
  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return logits, grads


@pytest.mark.slow
def test_tied_widths_run_as_one_program(compiled):
  """Three widths, with and without the convolution of the stem: six branches, equal to the slices."""
  with jax.enable_x64(True):
    net = Supernet(TWO.clone(**WIDE), TIED, (jax.ShapeDtypeStruct(IMAGES.shape, jnp.float64),))
    one, variables = OneProgram(net), variables_of(net)
    assert len(one.widths) == 6
    as_data = jax.jit(functools.partial(one.switch, outcome))
    for text in ("width_1=50,layers_0=1,expand_2=50:100:50", "width_1=75,layers_0=2"):
      subnet = net.space.subnet(text)
      found = as_data(one.vector(subnet), variables)
      expected = jax.jit(functools.partial(outcome, net.runnable(subnet)))(variables)
      assert np.ptp(expected[0]) > 1e-2
      for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.abs(b).max() + 1e-12)
    assert compiled.count("jit(switch)") == 1


def test_free_widths_run_as_one_program():
  net = Supernet(TWO, resnet50d.space(TWO, (0,), (50, 100), (50, 75, 100)),
                 (jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32),))
  one = OneProgram(net)
  assert one.possible and one.widths == [{}]
  one.check()


@pytest.mark.parametrize("make, message", [
  (lambda: TWO.clone(widths=()), r"widths=\(\); allowed are 1 to 4 stages"),
  (lambda: TWO.clone(widths=(8,)), r"strides=\(1, 2\) has 2 entries; widths has 1"),
  (lambda: TWO.clone(group=3), "ResNet50D: group=3; allowed are 1, 2, 4 and 8"),
  (lambda: SmallResNet(10, layers_0=3), "SmallResNet: layers_0=3; allowed are 1 and 2"),
  (lambda: TWO.sizes(Subnet(layers_3=1)), "unknown axis of ResNet50D 'layers_3'"),
  (lambda: resnet50d.space(TWO, tie="stage"), "unknown way to tie a space 'stage'")])
def test_what_is_wrong_is_said(make, message):
  with pytest.raises(ValueError, match=message):
    make()
