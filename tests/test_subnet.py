"""Subnets: records of a choice along each axis."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from nestnet import Subnet
from nestnet.subnet import folded

FORMS = ["layers=4", "layers=0+2+4,embed=48", "layers=+2,mlp=8", "layers=3,mlp=96:192:96",
         "layers_1=2,layers_2=1+3,expand_1=3:4,expand_2=4:6,width=7", "mlp=96:", ""]


@pytest.mark.parametrize("text", FORMS)
def test_text_json_pickle_and_copies_round_trip(text):
  subnet = Subnet.parse(text)
  assert str(subnet) == text
  for other in (Subnet.parse(str(subnet)), Subnet(**json.loads(json.dumps(subnet.to_json()))),
                pickle.loads(pickle.dumps(subnet)), copy.deepcopy(subnet), copy.copy(subnet),
                Subnet(**subnet.chosen)):
    assert other == subnet and hash(other) == hash(subnet) and str(other) == text


def test_equality_does_not_see_the_order_of_axes():
  a, b = Subnet(layers=2, embed=8), Subnet(embed=8, layers=2)
  assert a == b and hash(a) == hash(b) and len({a, b}) == 1
  assert a != Subnet(layers=2, embed=9) and a != {"layers": 2, "embed": 8}


def test_prefixes_and_uniform_lists_are_stored_as_the_size_that_they_mean():
  assert Subnet(layers=(0, 1, 2)) == Subnet(layers=3) == Subnet.parse("layers=0+1+2")
  assert Subnet(layers=2, mlp=(8, 8)) == Subnet(layers=2, mlp=8)
  assert Subnet(layers_2=2, mlp_2=[8, 8]).chosen["mlp_2"] == 8
  assert Subnet(layers=np.int64(3), mlp=np.int32(4)).to_json() == {"layers": 3, "mlp": 4}
  assert Subnet(layers=(0, 2)) != Subnet(layers=2)


def test_as_a_mapping_it_gives_the_fields_of_the_small_module():
  subnet = Subnet(layers=(0, 2), mlp=(8, 16), embed=4)
  assert dict(**subnet) == {"layers": 2, "mlp": (8, 16), "embed": 4}
  assert subnet.chosen["layers"] == (0, 2)


def test_frozen():
  subnet = Subnet(layers=2)
  with pytest.raises(AttributeError, match="frozen"):
    subnet.layers = 3
  with pytest.raises(AttributeError, match="frozen"):
    subnet._chosen = {}
  with pytest.raises(TypeError):
    subnet.chosen["layers"] = 3
  with pytest.raises(TypeError):
    subnet["layers"] = 3


def test_layer_gives_the_sizes_of_one_kept_layer():
  subnet = Subnet(layers=(0, 2), mlp=(8, 16), embed=4, layers_1=2, heads_1=(1, 2))
  assert subnet.layer("layers", 1) == Subnet(mlp=16, embed=4, layers_1=2, heads_1=(1, 2))
  assert subnet.per_layer("layers") and subnet.per_layer("layers_1")
  assert not subnet.per_layer("layers_2") and not Subnet(layers=(0, 2), mlp=8).per_layer("layers")


@pytest.mark.parametrize("text, shown", [
  ("layers_1=2,layers_2=2,expand_1=3,expand_2=3,kernel_1=3:5,kernel_2=3:5,embed=8",
   "layers=2,expand=3,kernel=3:5,embed=8"),
  ("layers_1=2,layers_2=3,expand_1=3,expand_2=3", "layers_1=2,layers_2=3,expand=3"),
  # One stage, and a name of its own beside the stages, stay.
  ("layers_1=2,mlp=8", "layers_1=2,mlp=8"), ("mlp=8,mlp_1=8,mlp_2=8", "mlp=8,mlp_1=8,mlp_2=8"), ("", ""),
  ("the whole", "the whole")])
def test_equal_sizes_of_all_stages_are_said_once(text, shown):
  assert folded(text) == shown


@pytest.mark.parametrize("text, got", [
  ("layers", "'layers'"), ("layers=", "'layers='"), ("layers=two", "'layers=two'"),
  ("layers=-1", "'layers=-1'"), ("layers=2++3", "'layers=2++3'"), ("mlp=:8", "'mlp=:8'"),
  ("layers=1+2:3", "'layers=1+2:3'"), ("embed=8,embed=9", "embed is given twice"),
  ("layers=8:16", "mixes two forms"), ("mlp=0+2", "mixes two forms"), ("2=3", "axis '2'")])
def test_bad_text_says_what_was_got_and_what_is_allowed(text, got):
  with pytest.raises(ValueError) as error:
    Subnet.parse(text)
  assert got in str(error.value)
  assert any(word in str(error.value) for word in ("allowed", "twice", "joined by"))


@pytest.mark.parametrize("sizes, message", [
  (dict(layers=0), "layers=0.*at least 1"), (dict(embed=2.5), "embed=2.5.*whole"),
  (dict(embed=True), "embed=True.*whole"), (dict(embed="4"), "embed='4'.*whole"),
  (dict(layers=(2, 1)), r"layers=\[2, 1\].*increase"), (dict(layers=(1, 1)), "increase"),
  (dict(layers=()), "at least"), (dict(mlp=(8, 0)), "at least 1"),
  (dict(layers=3, mlp=(8, 16)), "mlp=8:16 lists 2 layers, but layers keeps 3"),
  (dict(layers=(0, 2), mlp=(8, 16, 8)), "lists 3 layers, but layers keeps 2")])
def test_bad_sizes(sizes, message):
  with pytest.raises(ValueError, match=message):
    Subnet(**sizes)


@pytest.mark.parametrize("inner, outer, rebased", [
  ("layers=0+4,embed=32", "layers=0+2+4,embed=48", "layers=0+2,embed=32"),
  ("layers=+4", "layers=0+2+4", "layers=+2"),
  ("layers=2+4", "layers=2+4+5", "layers=2"),
  ("layers=1+3,mlp=4:8", "layers=1+2+3,mlp=8:4:8", "layers=0+2,mlp=4:8"),
  ("layers=1+3,mlp=4", "layers=1+2+3,mlp=8:4:6", "layers=0+2,mlp=4"),
  ("layers=2,mlp=4", "mlp=8", "layers=2,mlp=4"),
  ("layers_1=2,layers_2=+3", "layers_1=2,layers_2=1+3", "layers_1=2,layers_2=+1")])
def test_within_rebases_ids_lists_and_sizes(inner, outer, rebased):
  assert str(Subnet.parse(inner).within(Subnet.parse(outer))) == rebased


@pytest.mark.parametrize("inner, outer, axis", [
  ("layers=0+3", "layers=0+2", "layers"), ("layers=3", "layers=2", "layers"),
  ("embed=9", "embed=8", "embed"), ("layers=2", "layers=2,embed=8", "embed"),
  ("embed=4", "layers=2,embed=8", "layers"),
  ("layers=0+2,mlp=4:8", "layers=3,mlp=4:8:6", "mlp"),
  ("layers=2,mlp=6", "layers=2,mlp=8:4", "mlp"),
  ("layers=5,mlp=4", "mlp=4:8", "mlp")])
def test_within_refuses_what_is_not_inside(inner, outer, axis):
  with pytest.raises(ValueError, match=f"is not inside .*: {axis}$"):
    Subnet.parse(inner).within(Subnet.parse(outer))
