"""Tables of times: sums of their parts, nothing measured twice, fits."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import errors, latency
from nestnet.execution import Supernet
from nestnet.latency import Latency, LatencyTable
from nestnet.models import mobilenet
from nestnet.models.mobilenet import MobileNet

IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
MODEL = MobileNet(3, widths=(8, 16), head=(8,), strides=(1, 1), squeeze=(False, False),
                  activations=("relu", "relu"), layers_1=2, expand_1=2, kernel_1=3, stem=8)
NET = Supernet(MODEL, mobilenet.space(MODEL, (1, 2), (1, 2), (3,)), (IMAGES,))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A table that knows both ends of the family in pieces, and one of them whole."""
  path = tmp_path_factory.mktemp("latency") / "table.json"
  known = Latency(NET, LatencyTable(path))
  for member in (NET.space.smallest, NET.space.largest):
    known.sum(member)
  known.measured(NET.space.smallest)
  return path


def test_latency_is_the_sum_of_its_pieces_from_the_file(path, monkeypatch):
  """Nothing is measured again: the largest has the pieces around its layers, the first, the second."""
  def refuse(*_):
    raise AssertionError("measured again")
  refuse.__name__ = "inner_ms"
  monkeypatch.setattr(latency, "inner_ms", refuse)
  entries = list(json.loads(path.read_text()).values())
  pieces = {e["name"]: e["ms"] for e in entries if e["how"] == "inner_ms"}
  assert len(pieces) == 4 and all(ms > 0 for ms in pieces.values())
  known = Latency(NET, LatencyTable(path))
  names = [p.name for p in known.pieces.of(NET.space.largest)]
  assert known.sum(NET.space.largest) == pytest.approx(sum(pieces[name] for name in names))
  assert known(NET.space.largest) == known.sum(NET.space.largest)
  with pytest.raises(AssertionError, match="measured again"):
    known.sum(NET.space.subnet("layers_1=2,expand_1=2:1"))


def test_of_one_image_unless_told_otherwise(path):
  assert Latency(NET, LatencyTable(path)).pieces.inputs[0].shape == (1, 8, 8, 1)
  assert Latency(NET, LatencyTable(path), batch=3).pieces.inputs[0].shape == (3, 8, 8, 1)


def test_another_device_or_version_is_measured_for_itself(path):
  run, x = lambda x: x + 1, jax.ShapeDtypeStruct((3,), jnp.float32)
  table, calls = LatencyTable(path), []

  def measure(run, *args):
    calls.append(jax.tree.map(jnp.shape, args))
    return 1.0

  for _ in range(2):
    table.ms("add", run, x, measure=measure)
  assert calls == [((3,),)]
  table.ms("add", run, jax.ShapeDtypeStruct((3,), jnp.bfloat16), measure=measure)
  table.device = "another"
  table.ms("add", run, x, measure=measure)
  assert len(calls) == 3


def test_fit_recovers_what_a_call_costs(path, monkeypatch):
  known, sums = Latency(NET, LatencyTable(path)), {}
  members = list(NET.space)
  for i, member in enumerate(members):
    sums[member] = 1.0 + i
  monkeypatch.setattr(known, "sum", sums.__getitem__)
  monkeypatch.setattr(known, "measured", lambda m: 0.5 + 0.75 * sums[m])
  assert known.error(members).within < 1
  known.fit(members[:3])
  assert (known.offset, known.factor) == (pytest.approx(0.5), pytest.approx(0.75))
  error = known.error(members)
  assert error.largest < 1e-6 and error.within == 1 and error.rows[0]["measured_ms"] == 1.25
  with pytest.raises(errors.UserError, match="at least 2"):
    known.fit(members[:1])


@pytest.mark.parametrize("sums, whole, expected", [
  ([1, 2], [3, 2], "slope"), ([1, 2, 3], [0.5, 2, 3], "offset")])
def test_fits_never_turn_round(sums, whole, expected):
  offset, factor = latency._affine(np.array(sums, float), np.array(whole, float))
  assert offset >= 0 and factor >= 0 and (factor if expected == "slope" else offset) == 0


def test_damaged_tables_are_said_to_be(tmp_path):
  (tmp_path / "table.json").write_text('{"a": {}}')
  with pytest.raises(errors.UserError, match="damaged.*remove it"):
    LatencyTable(tmp_path / "table.json")


def test_times_grow_with_work():
  small, large = (jax.numpy.ones((n, n)) for n in (16, 512))
  multiply = lambda variables, x: x @ variables
  assert latency.inner_ms(multiply, large, large) > 5 * latency.inner_ms(multiply, small, small)
  assert latency.whole_ms(multiply, large, large) > 0
