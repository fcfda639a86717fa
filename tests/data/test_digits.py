"""The embedded data sets: what they hold, that splits do not mix, and how they are written."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets
from sklearn.neighbors import KNeighborsClassifier

from nestnet import data
from nestnet.data import digits


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module", params=["digits", "digits_clutter"])
def dataset(request, data_dir):
  return data.load(request.param, data_dir)


def stored(source):
  return {key: np.stack([np.asarray(example[key]) for example in source]) for key in source[0]}


def test_digits_are_the_scans(data_dir):
  whole = datasets.load_digits()
  seen = []
  for source in data.load("digits", data_dir).splits.values():
    examples = stored(source)
    numbers = examples["sources"][:, 0]
    assert examples["image"].dtype == np.uint8
    np.testing.assert_array_equal(examples["image"][..., 0], whole.images[numbers])
    np.testing.assert_array_equal(examples["label"], whole.target[numbers])
    seen.extend(numbers)
  assert sorted(seen) == list(range(1797))


def test_splits_share_no_scan(dataset):
  sources = {split: set(stored(x)["sources"].ravel()) for split, x in dataset.splits.items()}
  for split, numbers in sources.items():
    assert numbers <= set(digits.scans()[split][2])
    for other in set(sources) - {split}:
      assert not numbers & sources[other]


def test_splits_are_stratified():
  frequency = np.bincount(datasets.load_digits().target) / 1797
  for _, labels, _ in digits.scans().values():
    # No class is off by more than one scan.
    assert np.abs(np.bincount(labels) - frequency * len(labels)).max() <= 1


def test_clutter_holds_the_digit_whole():
  whole = datasets.load_digits()
  drawn = digits.clutter("test")
  assert drawn["image"].shape == (2000, 12, 12, 1) and drawn["image"].max() <= 16
  middle, size = (12 - 8) // 2, 8
  for image, label, numbers in zip(drawn["image"][:100], drawn["label"], drawn["sources"]):
    scan = whole.images[numbers[0]]
    assert label == whole.target[numbers[0]]
    offsets = range(middle - digits.JITTER, middle + digits.JITTER + 1)
    errors = [
        np.abs(image[y:y + size, x:x + size, 0] - scan).mean() for y in offsets for x in offsets]
    assert min(errors) < digits.NOISE


def test_clutter_uses_every_scan_alike():
  drawn = digits.clutter("validation")
  _, counts = np.unique(drawn["sources"][:, 0], return_counts=True)
  assert len(counts) == 180 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
  "dataset", ["digits", pytest.param("digits_clutter", marks=pytest.mark.slow)], indirect=True)
def test_written_data_is_the_same_everywhere(dataset, data_dir, tmp_path):
  again = data.load(dataset.name, tmp_path)
  for split in dataset.splits:
    one, two = stored(dataset.split(split)), stored(again.split(split))
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])


def test_needs_no_tensorflow(tmp_path):
  code = (
      f"import sys; from nestnet import data; dataset = data.load('digits', {str(tmp_path)!r});"
      "data.Batches(dataset)[0]; print('tensorflow' in sys.modules)")
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "False"


def prepare_at_once(barrier, folder, results):
  digits.scans()
  barrier.wait()
  results.put(len(digits.prepare(digits.Digits, folder).as_data_source("train")))


def test_processes_may_prepare_at_once(tmp_path):
  context = multiprocessing.get_context("spawn")
  barrier, results = context.Barrier(2), context.Queue()
  workers = [
      context.Process(target=prepare_at_once, args=(barrier, tmp_path, results)) for _ in range(2)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert [worker.exitcode for worker in workers] == [0, 0]
  assert [results.get() for _ in workers] == [1257, 1257]
  assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_clutter_is_as_hard_for_pixel_neighbours_as_stated(data_dir):
  """The figure in the docstring of `DigitsClutter`, above which sizes of networks are told apart."""
  dataset = data.load("digits_clutter", data_dir)
  train, test = (data.arrays(dataset, split) for split in ("train", "test"))
  flat = lambda images: images.reshape(len(images), -1)
  neighbours = KNeighborsClassifier(10).fit(flat(train["image"]), train["label"])
  accuracy = 100 * neighbours.score(flat(test["image"]), test["label"])
  assert f"(k = 10)   {accuracy:.1f}" in digits.DigitsClutter.__doc__
