"""Tables of times: sums of their parts, nothing measured twice, fits."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

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
  Latency(NET, LatencyTable(path)).measure([NET.space.smallest, NET.space.largest], [NET.space.smallest])
  return path


@pytest.fixture
def timed(monkeypatch):
  """The shapes of what is timed, by call of `interleaved_ms`; the times are 1, 2, ... ms."""
  calls = []

  def measure(programs):
    calls.append([jax.tree.map(jnp.shape, args) for _, args in programs])
    return [1.0 + i for i in range(len(programs))]

  monkeypatch.setattr(latency, "interleaved_ms", measure)
  return calls


def test_latency_is_the_sum_of_its_pieces_from_the_file(path, timed):
  """Nothing is measured again: the largest has the pieces around its layers, the first, the second."""
  pieces = {e["name"]: e["ms"] for e in json.loads(path.read_text()).values()}
  whole = pieces.pop(str(NET.space.smallest))
  assert len(pieces) == 4 and whole > 0 and all(ms > 0 for ms in pieces.values())
  known = Latency(NET, LatencyTable(path))
  names = [p.name for p in known.pieces.of(NET.space.largest)]
  assert known.sum(NET.space.largest) == pytest.approx(sum(pieces[name] for name in names))
  assert known(NET.space.largest) == known.sum(NET.space.largest)
  assert known.measured(NET.space.smallest) == whole
  assert not timed


def test_what_is_measured_together_takes_turns(tmp_path, timed):
  known = Latency(NET, LatencyTable(tmp_path / "table.json"))
  known.fit(NET.space)
  members = list(NET.space)
  pieces = {piece for member in members for piece in known.pieces.of(member)}
  assert [len(call) for call in timed] == [len(pieces) + len(members)]
  known.error(members)
  assert len(timed) == 1


def test_of_one_image_unless_told_otherwise(path):
  assert Latency(NET, LatencyTable(path)).pieces.inputs[0].shape == (1, 8, 8, 1)
  assert Latency(NET, LatencyTable(path), batch=3).pieces.inputs[0].shape == (3, 8, 8, 1)


def test_another_device_or_version_is_measured_for_itself(path, timed):
  run, table = lambda x: x + 1, LatencyTable(path)
  of = lambda dtype: [("add", run, (jax.ShapeDtypeStruct((3,), dtype),))]
  assert table.ms(of(jnp.float32)) == table.ms(of(jnp.float32) * 2)[:1] == [1.0]
  assert timed == [[((3,),)]]
  assert LatencyTable(path).ms([*of(jnp.float32), *of(jnp.bfloat16)]) == [1.0, 1.0]
  table.device = "another"
  table.ms(of(jnp.float32))
  assert [len(call) for call in timed] == [1, 1, 1]


def test_fit_recovers_what_a_call_costs(path, monkeypatch):
  known, sums = Latency(NET, LatencyTable(path)), {}
  members = list(NET.space)
  for i, member in enumerate(members):
    sums[member] = 1.0 + i
  monkeypatch.setattr(known, "measure", lambda *_: None)
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
  multiply = lambda x, y: x @ y
  small, large = ((multiply, (jnp.ones((n, n)),) * 2) for n in (16, 512))
  few, much = latency.interleaved_ms([small, large])
  assert much > 5 * few > 0


def test_programs_take_turns(monkeypatch):
  """Each has a turn before any has its next."""
  monkeypatch.setattr(latency, "_ROUNDS", (2, 2))
  order = []

  def program(name):
    def note(x):
      order.append(name)
      return x
    return lambda x: io_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x), (jnp.ones(1),)

  assert len(latency.interleaved_ms([program("a"), program("b")])) == 2
  assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 4
