"""Data sets by name: TFDS's, a user's, and what is said when they are wrong."""

from __future__ import annotations

import os
import shutil
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from nestnet import data
from nestnet.data import images

OWN = """
  import numpy as np

  class Stripes:
    classes = 2

    def __init__(self):
      rng = np.random.default_rng(0)
      label = rng.integers(0, 2, 600)
      image = rng.integers(0, 100, (600, 8, 8, 1)).astype(np.uint8)
      image[label == 0, ::2] += 100
      image[label == 1, :, ::2] += 100
      examples = [{"image": i, "label": l} for i, l in zip(image, label)]
      self.train, self.test = examples[:500], examples[500:]

  def small(n=20, label=0, shape=(4, 4, 1), dtype=np.float32, **fields):
    made = type("Small", (), {"classes": 2})()
    made.train = made.test = [{"image": np.zeros(shape, dtype), "label": label}] * n
    vars(made).update(fields)
    return made

  def validated():
    return small(n=3, validation=small(n=2).train)

  def flat(): return small(shape=(4, 4))
  def words(): return small(dtype=np.int64)
  def outside(): return small(label=2)
  def ragged(): return small(test=small(shape=(4, 5, 1)).train)
  def few(): return small(n=9)
  def untested(): return small(test=[])
  def unnumbered(): return small(classes=None)
  def splitless(): return object()
  def importing():
    import no_such_module_inside
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
  (tmp_path / "own_data.py").write_text(textwrap.dedent(OWN))
  monkeypatch.syspath_prepend(tmp_path)


def test_own_set_by_import_path(own):
  dataset = data.load("own_data:Stripes")
  assert (dataset.classes, dataset.shape) == (2, (8, 8, 1))
  assert {s: len(x) for s, x in dataset.splits.items()} == {
      "train": 450, "validation": 50, "test": 100}
  batch = data.Batches(dataset, batch_size=32)[0]
  assert batch["image"].shape == (32, 8, 8, 1) and -1 <= batch["image"].min() < -0.9
  test = data.arrays(dataset, "test")
  rows = test["image"].mean((2, 3)) - test["image"].mean((1, 3))
  np.testing.assert_array_equal(rows[:, 0] > rows[:, 1], test["label"] == 0)


def test_validation_is_every_tenth_of_train(own):
  dataset = data.load("own_data:Stripes")
  train, validation = dataset.split("train").examples, dataset.split("validation").examples
  assert list(validation.rows) == list(range(9, 500, 10))
  assert sorted([*train.rows, *validation.rows]) == list(range(500))
  assert train.examples is validation.examples


def test_own_validation_is_kept_and_floats_are_not_scaled(own):
  dataset = data.load("own_data:validated")
  assert {s: len(x) for s, x in dataset.splits.items()} == {"train": 3, "validation": 2, "test": 3}
  assert (data.arrays(dataset, "test")["image"] == 0).all()


@pytest.mark.parametrize("name, message", [
    ("flat", r"image of shape \(4, 4\), allowed: \(height, width, channels\)"),
    ("words", "own_data:words/train: images of type int64, allowed: uint8 or floating"),
    ("outside", "own_data:outside/train, example 0: label 2, allowed: 0 to 1"),
    ("ragged", r"ragged/test, example 0: image of shape \(4, 5, 1\), allowed: \(4, 4, 1\)"),
    ("few", r"got train \(9\), test \(9\); needed: train \(10 or more\)"),
    ("untested", r"got train \(20\), test \(0\); needed: test \(1 or more\)"),
    ("unnumbered", "classes is None, allowed: an integer of at least 2"),
    ("splitless", "object has no classes, train, test; needed"),
    ("np", "got module, allowed: a class or function"),
    ("Stripe", "unknown data set in own_data 'Stripe'; did you mean 'Stripes'"),
])
def test_wrong_own_set(own, name, message):
  with pytest.raises(ValueError, match=message):
    dataset = data.load(f"own_data:{name}")
    for split in dataset.splits:
      data.arrays(dataset, split)


def test_an_import_that_fails_inside_is_shown_whole(own):
  with pytest.raises(ModuleNotFoundError, match="no_such_module_inside"):
    data.load("own_data:importing")
  with pytest.raises(ValueError, match="no module 'no_such_package'; allowed is package.module:Name"):
    data.load("no_such_package.data:Name")


@pytest.mark.parametrize("name, hint", [
    ("digit", "did you mean 'digits'\\? Allowed"),
    ("cifra10", "did you mean 'cifar10'"),
    ("qqqq", "Allowed: digits, "),
])
def test_unknown_set(name, hint, tmp_path):
  with pytest.raises(ValueError, match=f"unknown data set '{name}'.*{hint}"):
    data.load(name, tmp_path)


def test_set_that_is_not_prepared(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    data.load("cifar10", tmp_path)
  assert f"looked in {tmp_path}/cifar10/3.0.2, which is not there" in str(error.value)
  assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in str(error.value)
  assert os.listdir(tmp_path) == []


def test_default_folder_is_the_variable_s(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "here"))
  assert data.load("digits").split("test").folder == tmp_path / "here" / "digits" / "1.0.0"
  with pytest.raises(FileNotFoundError, match=f"looked in {tmp_path}/here/cifar10"):
    data.load("cifar10")


def test_tfds_set_must_have_images(tmp_path):
  with pytest.raises(ValueError, match="'ag_news_subset': features .*; needed: image and label"):
    data.load("ag_news_subset", tmp_path)


def test_cifar10(tmp_path):
  with tfds.testing.mock_data(num_examples=40):
    dataset = data.load("cifar10", tmp_path)
    assert (dataset.classes, dataset.shape) == (10, (32, 32, 3))
    assert {s: len(x) for s, x in dataset.splits.items()} == {
        "train": 36, "validation": 4, "test": 40}
    batch = data.Batches(dataset, batch_size=8, augment=data.augmentation("crop_flip"))[3]
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].min() < -0.9


class NoTest(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Like ImageNet: the labels of `test` are withheld, -1."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, description="", features=tfds.features.FeaturesDict({
        "image": tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8),
        "label": tfds.features.ClassLabel(num_classes=3)}))

  def _split_generators(self, dl_manager):
    return {"train": self.make(30, 1), "validation": self.make(12, 2), "test": self.make(12, -1)}

  def _generate_examples(self):
    raise NotImplementedError

  def make(self, count, label):
    for i in range(count):
      yield i, {"image": np.full((4, 4, 3), i, np.uint8), "label": label}


def test_withheld_test_labels(tmp_path):
  NoTest(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  dataset = data.load("no_test", tmp_path)
  assert {s: len(x) for s, x in dataset.splits.items()} == {
      "train": 27, "validation": 3, "test": 12}
  assert set(data.arrays(dataset, "test")["label"]) == {2}


def test_large_sets_are_not_kept_in_memory(tmp_path, monkeypatch):
  dataset = data.load("digits", tmp_path)
  kept = data.Batches(dataset, augment=data.augmentation("digits"))[4]
  monkeypatch.setattr(images, "MEMORY_PIXELS", 1000)
  dataset = data.load("digits", tmp_path)
  read = data.Batches(dataset, augment=data.augmentation("digits"))[4]
  assert all(np.array_equal(kept[key], read[key]) for key in kept)
  assert "_memory" not in vars(dataset.split("train"))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
  folder = tmp_path_factory.mktemp("intact")
  data.load("digits", folder)
  return folder


def truncated(path):
  os.truncate(path, os.path.getsize(path) // 2)


def flipped(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize("damage, file", [
    (truncated, "digits-train.array_record-00000-of-00001"),
    (flipped, "digits-train.array_record-00000-of-00001"),
    (os.remove, "digits-train.array_record-00000-of-00001"),
    (truncated, "dataset_info.json"),
])
def test_damaged_files(intact, tmp_path, damage, file):
  shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / "digits" / "1.0.0" / file)
  with pytest.raises(ValueError, match=f"damaged files in {tmp_path}.*delete that folder and load"):
    data.arrays(data.load("digits", tmp_path), "train")


def test_folder_without_a_data_set(intact, tmp_path):
  shutil.copytree(intact, tmp_path, dirs_exist_ok=True)
  os.remove(tmp_path / "digits" / "1.0.0" / "dataset_info.json")
  with pytest.raises(FileNotFoundError, match=f"in {tmp_path}.*delete it. Loading 'digits' again"):
    data.load("digits", tmp_path)
