"""Extracted folders: whole or not at all, read back bit for bit, never trusted."""

from __future__ import annotations

import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax

import nestnet
from nestnet.errors import UserError
from nestnet.interop.folder import make_module, module_fields
from nestnet.models.vit import ViT

MODULE = ViT(layers=2, embed=8, heads=(2, 1), mlp=8, classes=3, head_dim=4, dtype=jnp.bfloat16)


class Own(nn.Module):
  """A user's architecture."""

  width: int
  scales: tuple[float, ...] = (1.0,)

  @nn.compact
  def __call__(self, x):
    return {"logits": nn.Dense(self.width)(x) * self.scales[0]}


def variables():
  rng = np.random.default_rng(0)
  return {"params": {"blocks": {"w": rng.normal(size=(2, 3)).astype(np.float32),
                                "half": rng.normal(size=5).astype(jnp.bfloat16)},
                     "scalar": np.float32(0.1)},
          "constants": {"blocks": {"ids": np.arange(3, dtype=np.int32)}}}


@pytest.fixture
def folder(tmp_path):
  nestnet.save(tmp_path / "out", MODULE, variables(), {"costs": {"params": 7}})
  return tmp_path / "out"


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def rewrite(folder, **changes):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | changes))


def test_module_and_variables_come_back_bit_for_bit(folder):
  module, loaded = nestnet.load(folder)
  assert module == MODULE and module.heads == (2, 1) and module.dtype == jnp.bfloat16
  assert_same(loaded, variables())
  assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
  config = json.loads((folder / "config.json").read_text())
  assert config["architecture"] == "ViT" and config["costs"] == {"params": 7}
  assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_permissions_are_those_of_ordinary_files(tmp_path):
  nestnet.save(tmp_path / "out", MODULE, variables(), beside={"objective": {"w": np.ones(2)}})
  (tmp_path / "ordinary").write_text("x")
  files = [*(tmp_path / "out").iterdir(), tmp_path / "ordinary"]
  assert len(files) == 4 and len({path.stat().st_mode for path in files}) == 1


def test_other_trees_lie_beside(tmp_path):
  heads = {"objective": {"head": {"w": np.ones(2)}}}
  nestnet.save(tmp_path / "out", MODULE, variables(), beside=heads)
  beside = safetensors.flax.load_file(tmp_path / "out" / "objective.safetensors")
  assert list(beside) == ["head/w"]
  assert_same(nestnet.load(tmp_path / "out")[1], variables())


def test_annotated_variables_are_saved_bare(tmp_path):
  made = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  boxed = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), made)
  nestnet.save(tmp_path / "out", MODULE, boxed)
  assert_same(nestnet.load(tmp_path / "out")[1], nn.unbox(boxed))


def test_an_extracted_folder_is_replaced(folder):
  other = {"params": {"x": np.ones(2, np.float32)}}
  nestnet.save(folder, MODULE.clone(layers=1, heads=1), other)
  module, loaded = nestnet.load(folder)
  assert module.layers == 1
  assert_same(loaded, other)
  assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
  nestnet.save(tmp_path, MODULE, variables())
  assert_same(nestnet.load(tmp_path)[1], variables())


@pytest.mark.parametrize("content", [None, "{}", "[1]", '{"format": "other"}', "not json"])
def test_what_is_no_extracted_network_is_never_touched(tmp_path, content):
  foreign = tmp_path / "thesis"
  foreign.mkdir()
  name = "notes.txt" if content is None else "config.json"
  (foreign / name).write_text(content or "years of work")
  with pytest.raises(ValueError, match="thesis exists and is no extracted network"):
    nestnet.save(foreign, MODULE, variables())
  assert [p.name for p in foreign.iterdir()] == [name]
  assert (foreign / name).read_text() == (content or "years of work")
  with pytest.raises(ValueError, match="exists and is no extracted network"):
    nestnet.save(foreign / name, MODULE, variables())


class Interrupted:
  """A leaf that cannot be read: the process is stopped while it writes."""

  shape, dtype = (2,), np.dtype(np.float32)

  def __array__(self, *args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["first tree", "later tree", "provenance"])
def test_an_interrupted_save_leaves_the_old_one_whole(folder, broken):
  bad = {"params": {"x": Interrupted()}}
  arguments = {"first tree": (bad,), "later tree": (variables(), None, {"objective": bad}),
               "provenance": (variables(), {"metric": object()})}[broken]
  with pytest.raises((KeyboardInterrupt, TypeError)):
    nestnet.save(folder, MODULE.clone(layers=1, heads=1), *arguments)
  module, loaded = nestnet.load(folder)
  assert module == MODULE
  assert_same(loaded, variables())
  assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_a_failed_check_leaves_the_old_one_whole(folder):
  def check(written):
    assert nestnet.load(written)[0].layers == 1
    raise RuntimeError("differs")

  with pytest.raises(RuntimeError, match="differs"):
    nestnet.save(folder, MODULE.clone(layers=1, heads=1), variables(), check=check)
  assert nestnet.load(folder)[0] == MODULE
  assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_a_save_killed_between_its_two_renames_loses_nothing(folder):
  older, newer = (folder.with_name(f".out.{digit * 32}.old") for digit in "ba")
  folder.rename(older)
  nestnet.save(folder.with_name("other"), MODULE.clone(layers=1, heads=1), variables())
  folder.with_name("other").rename(newer)
  os.utime(older, (1, 1))
  assert nestnet.load(folder)[0].layers == 1
  with pytest.raises(TypeError):
    nestnet.save(folder, MODULE, variables(), {"metric": object()})
  assert folder.exists() and nestnet.load(folder)[0].layers == 1
  nestnet.save(folder, MODULE, variables())
  assert nestnet.load(folder)[0] == MODULE
  assert [p.name for p in folder.parent.iterdir()] == ["out"]


class Free(nn.Module):
  """Fields of any kind."""

  value: Any = None
  dtype: Any = None


@pytest.mark.parametrize("value", [None, 3, "gelu", True, ((1, 2), (3,)), {"a": [1]}])
@pytest.mark.parametrize("dtype", [None, jnp.dtype(jnp.bfloat16)])
def test_fields_come_back(value, dtype):
  module = Free(value, dtype)
  assert make_module(Free, json.loads(json.dumps(module_fields(module)))) == module


@pytest.mark.parametrize("fields", [{"value": nn.gelu}, {"value": jnp.bfloat16}, {"dtype": nn.gelu}])
def test_a_field_that_json_cannot_hold_is_named(folder, fields):
  with pytest.raises(UserError, match=f"field {[*fields][0]} of Free is .* allowed are numbers, text"):
    nestnet.save(folder, Free(**fields), variables())
  assert nestnet.load(folder)[0] == MODULE


def test_a_module_of_the_users_own(tmp_path):
  module = Own(3, scales=(2.0, 1.0))
  own = {"params": {"Dense_0": {"kernel": np.eye(3, dtype=np.float32),
                                "bias": np.zeros(3, np.float32)}}}
  nestnet.save(tmp_path / "out", module, own)
  loaded, weights = nestnet.load(tmp_path / "out", Own)
  assert loaded == module and loaded.scales == (2.0, 1.0)
  assert loaded.apply(weights, np.ones((1, 3), np.float32))["logits"].tolist() == [[2, 2, 2]]
  with pytest.raises(ValueError, match=r"holds a .*:Own, which is not nestnet's own \(ViT, .*\); pass"):
    nestnet.load(tmp_path / "out")
  with pytest.raises(ValueError, match="holds a .*:Own, got the class ViT"):
    nestnet.load(tmp_path / "out", ViT)


@pytest.mark.parametrize("name", ["antigravity:fly", ["ViT"], None])
def test_nothing_is_imported_by_a_name_in_the_folder(folder, name):
  rewrite(folder, architecture=name)
  with pytest.raises(ValueError, match="out holds a .*, which is not nestnet's own"):
    nestnet.load(folder)


def test_what_is_missing(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="no extracted network in .*nowhere: config.json"):
    nestnet.load(tmp_path / "nowhere")
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="out is damaged: .*model.safetensors"):
    nestnet.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(folder, keep):
  content = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(content[:keep])
  with pytest.raises(ValueError, match="out is damaged: "):
    nestnet.load(folder)


@pytest.mark.parametrize("content", [
  "", "{", "[]", "3", '{"format": "nestnet"}', '{"architecture": "ViT"}',
  '{"architecture": "ViT", "fields": 3}'])
def test_a_damaged_config(folder, content):
  (folder / "config.json").write_text(content)
  with pytest.raises(ValueError, match="out is damaged: "):
    nestnet.load(folder)


@pytest.mark.parametrize("fields, message", [
  ({"layers": 2, "width": 8}, "unknown field of ViT 'width'.*Allowed: layers, embed"),
  ({"layers": 2}, "ViT needs the fields embed, heads, mlp, classes"),
  ({"layers": 2, "embed": 8, "heads": 3, "mlp": 8, "classes": 3}, "embed=8 does not divide"),
  ({"layers": 1, "embed": 8, "heads": 2, "mlp": 8, "classes": 3, "dtype": "float33"},
   "dtype: 'float33' is no data type; allowed are float32")])
def test_fields_that_are_not_the_architecture_s(folder, fields, message):
  rewrite(folder, fields=fields)
  with pytest.raises(ValueError, match=message):
    nestnet.load(folder)
  with pytest.raises(ValueError, match=message):
    make_module(ViT, fields)
