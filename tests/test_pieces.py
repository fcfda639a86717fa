"""Sums over pieces are what counting whole networks gives; each distinct piece is traced once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nestnet import Space, cost
from nestnet.execution import Supernet
from nestnet.models import mobilenet, resnet50d
from nestnet.models.mobilenet import MobileNet
from nestnet.models.resnet50d import ResNet50D
from nestnet.models.vit import ViT
from nestnet.pieces import AROUND, Pieces

INPUT = jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.float32)
VIT = Supernet(
  ViT(layers=3, embed=16, heads=4, mlp=16, classes=3, head_dim=4, drop_path=0.1, features=16, remat=True),
  Space(layers=(2, 3), embed=(8, 16), heads=(2, 4), mlp=(8, 16), features=(4, 16), per_layer=("mlp",),
        constraint=lambda m: m["features"] <= m["embed"]), (INPUT,))
SMALL = MobileNet(3, widths=(8, 8, 16), head=(16, 24), strides=(1, 2, 1), squeeze=(False, False, True),
                  activations=("relu", "relu", "h_swish"), layers_1=2, layers_2=3, expand_1=2, expand_2=3,
                  kernel_1=5, kernel_2=5, stem=8)
MOBILE = Supernet(SMALL, mobilenet.space(SMALL, (1, 2, 3), (1, 2, 3), (3, 5)), (INPUT,))
# A first stage of one block, as ProxylessNAS has as its last.
ONE = Supernet(SMALL.clone(layers_1=1, transforms=True),
               mobilenet.space(SMALL.clone(layers_1=1), (1, 3), (2, 3), (3, 5)), (INPUT,))
RESNET = ResNet50D(3, layers_1=2, layers_2=2, layers_3=2, layers_4=2, widths=(16, 24, 32, 40), stem=16)
RES = Supernet(RESNET, resnet50d.space(RESNET, (1, 0), width=(65, 100)), (INPUT,))


@pytest.mark.parametrize("net, texts", [
  (VIT, ["layers=0+2,embed=8,features=4", "layers=2,mlp=8:16,features=4"]),
  (MOBILE, ["layers_2=0+2,expand_2=3:1,kernel_2=5:3"]), (ONE, []),
  pytest.param(RES, ["layers_0=1,width_2=65"], marks=pytest.mark.slow),
], ids=["vit", "mobilenet", "one block", "resnet"])
def test_sums_are_exact(net, texts):
  pieces = Pieces(net)
  for member in [*map(net.space.subnet, texts), *(net.space.sample((0, i)) for i in range(2))]:
    module = net.module(member)
    assert pieces.costs(member) == {"params": cost.count_params(module, INPUT),
                                    "flops": cost.flops(module, INPUT)}, member


@pytest.mark.parametrize("net", [VIT, pytest.param(MOBILE, marks=pytest.mark.slow)], ids=["vit", "mobilenet"])
def test_training_too(net):
  member = net.space.sample(3)
  assert Pieces(net).train_flops(member) == cost.flops(net.module(member), INPUT, train=True)


def test_each_kind_of_layer_is_traced_once_and_layers_are_in_order():
  pieces = Pieces(MOBILE)
  text = "layers_1=1,layers_2=3,expand_1=2,kernel_1=3,expand_2=1:3:3,kernel_2=5:3:3"
  first = pieces.of(MOBILE.space.subnet(text))
  assert [p.name.partition(" ")[0] for p in first] == [AROUND, "stage_1", "stage_2", "stage_2", "stage_2"]
  assert first[3] is first[4] and first[2] is not first[3] and "first" in first[2].name
  assert all(a is b for a, b in zip(first, pieces.of(MOBILE.space.subnet(text))))
  other = pieces.of(MOBILE.space.subnet(text.replace("kernel_1=3", "kernel_1=5")))
  assert [a is b for a, b in zip(first, other)] == [True, False, True, True, True]


def test_inputs_of_another_size_cost_what_they_cost():
  larger = jax.ShapeDtypeStruct((1, 20, 20, 1), jnp.float32)
  member = MOBILE.space.smallest
  assert Pieces(MOBILE, (larger,)).costs(member)["flops"] == cost.flops(MOBILE.module(member), larger)


def test_what_stands_around_is_one_program_whoever_is_asked_first():
  programs = set()
  for member in (MOBILE.space.smallest, MOBILE.space.largest):
    piece = Pieces(MOBILE).of(member)[0]
    programs.add(jax.jit(piece.run).lower(piece.variables, *piece.inputs).as_text())
  assert len(programs) == 1
