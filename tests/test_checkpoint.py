"""What is restored is what was saved, or the loss is said; whatever happened to the files."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from nestnet import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]


def make_state(step: int):
  params = {"w": jnp.arange(64.0).reshape(8, 8) * step, "half": jnp.full(3, step, jnp.bfloat16)}
  return {
      "params": params, "opt": optax.adam(1e-3).init(params), "none": None,
      "step": jnp.int32(step), "key": jax.random.split(jax.random.key(step), 8), "rate": 0.1 * step,
      "mask": jnp.array([True, False]), "empty": jnp.zeros((0, 3), jnp.int8),
  }


def abstract(state):
  def leaf(x):
    if isinstance(x, jax.Array):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return x
  return jax.tree.map(leaf, state)


def assert_same(state, expected):
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
    assert type(x) is type(y)
    if isinstance(x, jax.Array):
      assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def shard(state, devices: int):
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

  def put(x):
    if not isinstance(x, jax.Array):
      return x
    divides = x.ndim and x.shape[0] and x.shape[0] % devices == 0
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*["data"] * bool(divides))))
  return jax.tree.map(put, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with steps 1 and 2; copy it before changing anything."""
  directory = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpoints(directory) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step))
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def test_restores_the_newest_exactly(saved):
  with checkpoint.Checkpoints(saved) as checkpoints:
    step, state = checkpoints.restore(abstract(make_state(0)))
  assert step == 2
  assert_same(state, make_state(2))


def test_the_wanted_state_may_depend_on_the_step(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"x": jnp.arange(step)})
    assert checkpoints.restore(lambda step: {"x": jnp.zeros(step, jnp.int32)})[1]["x"].shape == (2,)
  flip(tmp_path / "2" / "record" / "metadata", 5)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(lambda step: {"x": jnp.zeros(step, jnp.int32)})[1]["x"].shape == (1,)


def test_another_mesh(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, shard(make_state(1), 8))
    for devices in (8, 4, 1):
      want = shard(make_state(1), devices)
      step, state = checkpoints.restore(abstract(want))
      assert_same(state, want)


def test_nothing_saved_is_none_and_reading_writes_nothing(tmp_path, saved):
  with checkpoint.Checkpoints(tmp_path / "none") as checkpoints:
    assert checkpoints.restore(abstract(make_state(0))) is None
    assert checkpoints.steps == []
  assert not (tmp_path / "none").exists()


def test_keep_and_same_step_again(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step, value in ((1, 1), (2, 2), (3, 3), (3, 4)):
      checkpoints.save(step, {"x": jnp.float32(value)})
    checkpoints.wait()
    assert checkpoints.steps == [2, 3]
    assert checkpoints.restore({"x": jnp.float32(0)})[1]["x"] == 4
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_buffers_may_be_donated_after_save(tmp_path):
  spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step in range(5):
      x = jnp.arange(300_000.0) + step
      checkpoints.save(step, {"x": x})
      jax.block_until_ready(spoil(spoil(x)))
      checkpoints.wait()
      found, state = checkpoints.restore({"x": jax.ShapeDtypeStruct((300_000,), jnp.float32)})
      assert found == step
      np.testing.assert_array_equal(state["x"], np.arange(300_000.0, dtype=np.float32) + step)


def flip(path, position):
  data = bytearray(path.read_bytes())
  data[position % len(data)] ^= 1 << (position % 8)
  path.write_bytes(data)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "first": lambda path: flip(path, 0),
    "middle": lambda path: flip(path, path.stat().st_size // 2),
    "last": lambda path: flip(path, path.stat().st_size - 1),
}


@pytest.mark.parametrize("damage", [
  pytest.param(name, marks=() if name in ("missing", "middle") else pytest.mark.slow) for name in DAMAGES])
def test_every_file_damaged_in_turn_is_noticed(copied, caplog, damage):
  """Files of Orbax's own bookkeeping may be lost; then the step itself must still be exact."""
  bookkeeping = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  files = sorted(path for path in (copied / "2").rglob("*") if path.is_file())
  expected = {step: make_state(step) for step in (1, 2)}
  for path in files:
    intact = path.read_bytes()
    DAMAGES[damage](path)
    caplog.clear()
    with checkpoint.Checkpoints(copied) as checkpoints:
      step, state = checkpoints.restore(abstract(expected[1]))
      assert_same(state, expected[step])
    path.write_bytes(intact)
    if path.name not in bookkeeping:
      assert step == 1, path
      [message] = [record.getMessage() for record in caplog.records]
      assert message.startswith(f"checkpoint 2 in {copied} is damaged and skipped")
      assert "\n" not in message
  assert len(files) > 8


def test_damaged_step_is_moved_aside_by_the_next_save(copied):
  flip(copied / "2" / "record" / "metadata", 5)
  for times in (1, 2):
    with checkpoint.Checkpoints(copied) as checkpoints:
      assert checkpoints.restore(abstract(make_state(0)))[0] == 1
      assert (copied / "2").exists()
      assert checkpoints.steps == [1]
      checkpoints.save(2, make_state(2))
      checkpoints.wait()
      assert checkpoints.steps == [1, 2]
      assert checkpoints.restore(abstract(make_state(0)))[0] == 2
    assert len(list(copied.glob("damaged-2*"))) == times
    flip(copied / "2" / "record" / "metadata", 5)


def test_all_damaged_is_an_error_each_time(copied):
  for step in (1, 2):
    shutil.rmtree(copied / str(step) / "state")
  for _ in range(2):
    with checkpoint.Checkpoints(copied) as checkpoints:
      with pytest.raises(ValueError, match="every checkpoint in .* is damaged.*step 2.*step 1"):
        checkpoints.restore(abstract(make_state(0)))
  assert sorted(path.name for path in copied.iterdir()) == ["1", "2"]


def test_a_changed_value_in_intact_files_names_the_leaf(copied, caplog):
  """The leaf's own checksum holds from device to device, also where every file is as written."""
  state = copied / "2" / "state"
  store = tensorstore.open({"driver": "zarr", "kvstore": {
      "driver": "ocdbt", "base": f"file://{state}", "path": "arrays.params/w/"}}).result()
  store[3, 4].write(5.0).result()
  files = {str(path.relative_to(state)): zlib.crc32(path.read_bytes())
           for path in state.rglob("*") if path.is_file() and path.name != "files.json"}
  (state / "files.json").write_text(json.dumps(files))
  with checkpoint.Checkpoints(copied) as checkpoints:
    assert checkpoints.restore(abstract(make_state(0)))[0] == 1
  assert "leaf params/w" in caplog.text


@pytest.mark.parametrize("change, words", [
    (lambda s: s["params"].update(w=jnp.zeros((8, 9))),
     ["params/w: stored float32[8,8], expected float32[8,9]"]),
    (lambda s: s["params"].update(w=jnp.zeros((8, 8), jnp.bfloat16)), ["expected bfloat16[8,8]"]),
    (lambda s: s.pop("mask"), ["mask: stored bool[2], expected absent"]),
    (lambda s: s.update(more=jnp.zeros(2)), ["more: stored absent, expected float32[2]"]),
    (lambda s: s.update(rate=jnp.float32(1)), ["rate: stored float, expected float32[]"]),
    (lambda s: s.update(empty=jnp.zeros((0, 4), jnp.int8)), ["expected int8[0,4]"]),
])
def test_another_state_is_refused_and_stays_unharmed(saved, caplog, change, words):
  other = make_state(0)
  change(other)
  with checkpoint.Checkpoints(saved) as checkpoints:
    with pytest.raises(ValueError) as caught:
      checkpoints.restore(abstract(other))
    assert checkpoints.steps == [1, 2]
  for word in ["checkpoint 2", *words]:
    assert word in str(caught.value)
  assert not caplog.records


def test_states_that_cannot_be_kept_are_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    with pytest.raises(ValueError, match="same path"):
      checkpoints.save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})
    with pytest.raises(ValueError, match="float64"):
      checkpoints.save(1, {"a": np.zeros(1)})


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "float32", "bfloat16",
                                   "float8_e4m3fn", "complex64"])
def test_checksum_sees_every_flipped_bit(dtype):
  size = 1 if dtype == "bool" else 8 * jnp.dtype(dtype).itemsize
  data = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256,
                                           (6, max(size // 8, 1)), np.uint8)
  flipped = np.repeat(data[None], 6 * size, 0)
  for index in range(6 * size):
    flipped[index, index // size, index % size // 8] ^= 1 << index % 8 if size > 1 else 1
  both = np.concatenate([data[None], flipped]).view(jnp.dtype(dtype)).reshape(-1, 2, 3)
  sums = np.asarray(jax.jit(jax.vmap(checkpoint.checksum))(both))
  assert sums.dtype == np.uint32
  assert (sums[1:] != sums[0]).all()


def test_checksum_sees_order_and_not_sharding():
  x = jax.random.normal(jax.random.key(0), (8, 6))
  checksum = jax.jit(checkpoint.checksum)
  value = int(checksum(x))
  assert value not in (int(checksum(x.T.reshape(8, 6))), int(checksum(x[::-1])))
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  for spec in (PartitionSpec("a", "b"), PartitionSpec(("a", "b")), PartitionSpec(None, "b")):
    assert int(checksum(jax.device_put(x, NamedSharding(mesh, spec)))) == value
  assert int(checkpoint.checksum(jnp.zeros((0, 3)))) == 0
  keys = jax.random.split(jax.random.key(0), 2)
  assert int(checkpoint.checksum(keys)) != int(checkpoint.checksum(keys[::-1]))


VICTIM = '''
import sys
import jax.numpy as jnp
from nestnet import checkpoint
def state(step):
  return {"x": jnp.arange(1_500_000) * step, "y": jnp.full(7, step)}
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
  found = checkpoints.restore(state(0))
  if found is not None:
    assert (found[1]["x"] == state(found[0])["x"]).all() and (found[1]["y"] == found[0]).all()
  step = found[0] if found else 0
  print("restored", step, flush=True)
  for step in range(step + 1, step + 1 + int(sys.argv[2])):
    checkpoints.save(step, state(step))
    print("began", step, flush=True)
'''


def test_killed_while_saving(tmp_path):
  """Each life is killed during a save and the next restores an exact state, at most one behind."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", VICTIM, str(tmp_path)]
  began, interrupted = 0, 0
  for delay in (0.0, 0.03):
    process = subprocess.Popen([*command, "1000"], env=environment, stdout=subprocess.PIPE,
                               text=True)
    assert int(process.stdout.readline().split()[1]) >= began - 1
    began = int([process.stdout.readline() for _ in range(3)][-1].split()[1])
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    began = int(rest[-1]) if rest else began
    interrupted += any("tmp" in path.name for path in tmp_path.iterdir())
  done = subprocess.run([*command, "1"], env=environment, capture_output=True, text=True)
  assert done.returncode == 0
  assert int(done.stdout.split()[1]) >= began - 1
  assert done.stderr == ""
  assert interrupted
  assert all(path.name.isdigit() for path in tmp_path.iterdir())
  assert len(list(tmp_path.iterdir())) == 2
