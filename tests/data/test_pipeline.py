"""Batches: a pure function of (seed, step), the same over any number of hosts."""

from __future__ import annotations

import dataclasses
import time

import grain
import numpy as np
import pytest

from nestnet import data
from nestnet.data import augment
from nestnet.data import pipeline
from nestnet.data import images

AUGMENTATIONS = ["none", "digits", "crop_flip"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return data.load("digits", tmp_path_factory.mktemp("data"))


def batches(dataset, name="none", **options):
  return data.Batches(dataset, augment=data.augmentation(name), **options)


def same(one, two):
  return all(np.array_equal(one[key], two[key]) for key in ("image", "label"))


def draws(batch=64, seed=0, step=0):
  return pipeline.Draws(seed, step, batch, slice(0, batch))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pure_function_of_seed_and_step(dataset, name):
  one, two = batches(dataset, name, seed=3), batches(dataset, name, seed=3)
  late = one[1_000_003]
  assert same(one[5], two[5]) and same(one[5], one[5]) and same(two[1_000_003], late)
  assert not same(one[5], one[6])
  assert not same(one[5], batches(dataset, name, seed=4)[5])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("step", [0, 9])
def test_hosts_make_up_the_global_batch(dataset, name, step):
  # Step 9 of 128 spans the end of the first epoch (1,257 examples).
  whole = batches(dataset, name)[step]
  hosts = [batches(dataset, name, process_index=i, process_count=4)[step] for i in range(4)]
  joined = {key: np.concatenate([host[key] for host in hosts]) for key in whole}
  assert all(host["image"].shape == (32, 8, 8, 1) for host in hosts)
  assert same(whole, joined)


def test_host_reads_only_its_share(dataset, monkeypatch):
  monkeypatch.setattr(images, "MEMORY_PIXELS", 0)
  read = []

  class Counted(list):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  train = dataclasses.replace(dataset.split("train"), examples=Counted(dataset.split("train")))
  counted = dataclasses.replace(dataset, splits={"train": train})
  data.Batches(counted, batch_size=64, process_index=1, process_count=4)[0]
  assert len(read) == 16


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_every_example_once(dataset, epoch):
  size = len(dataset.split("train"))
  order = batches(dataset, batch_size=size)
  read, stored = (
      x["image"].reshape(size, -1) for x in (order[epoch], data.arrays(dataset, "train")))
  np.testing.assert_array_equal(read[np.lexsort(read.T)], stored[np.lexsort(stored.T)])


def test_every_epoch_and_seed_has_an_order_of_its_own(dataset):
  size = len(dataset.split("train"))
  orders = [batches(dataset, batch_size=size, seed=seed) for seed in (0, 1)]
  labels = [orders[seed][epoch]["label"] for seed in (0, 1) for epoch in (0, 1, 2)]
  labels.append(data.arrays(dataset, "train")["label"])
  for i, one in enumerate(labels):
    for two in labels[:i]:
      assert (one == two).mean() < 0.2


def test_types_and_range(dataset):
  for batch in (batches(dataset, "digits")[0], data.arrays(dataset, "test")):
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert batch["image"].min() >= -1 and 0.5 < batch["image"].max() <= 1 + 1e-6
  raw = np.stack([example["image"] for example in dataset.split("test")])
  np.testing.assert_allclose(data.arrays(dataset, "test")["image"], raw / 8 - 1, atol=1e-6)


def test_reads_ahead_in_the_same_order(dataset):
  order = batches(dataset, "digits")
  ahead = iter(order[40:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
  assert all(same(next(ahead), order[step]) for step in range(40, 45))


def test_digits_without_motion_is_the_identity(monkeypatch):
  monkeypatch.setattr(augment, "SHIFT_PIXELS", 0)
  monkeypatch.setattr(augment, "ROTATION_DEGREES", 0)
  monkeypatch.setattr(augment, "SCALE_RANGE", (1, 1))
  images = np.random.default_rng(0).random((64, 8, 12, 3), np.float32)
  np.testing.assert_allclose(augment.digits(images, draws()), images, atol=1e-6)


def test_digits_is_the_bilinear_affine_map():
  """Against scipy's affine map of each image alone."""
  from scipy import ndimage

  images = np.random.default_rng(0).random((64, 9, 12, 1), np.float32)
  got = augment.digits(images, draws(step=5))
  again = draws(step=5)
  turn = np.deg2rad(again.uniform(-augment.ROTATION_DEGREES, augment.ROTATION_DEGREES, 64))
  scale = again.uniform(*augment.SCALE_RANGE, 64)
  shift = again.uniform(-augment.SHIFT_PIXELS, augment.SHIFT_PIXELS, (64, 2))
  middle = np.array([4, 5.5])
  for i, image in enumerate(images[..., 0]):
    cos, sin = np.cos(turn[i]) / scale[i], np.sin(turn[i]) / scale[i]
    matrix = np.array([[cos, -sin], [sin, cos]])
    offset = middle - matrix @ middle + shift[i]
    wanted = ndimage.affine_transform(image, matrix, offset, order=1, mode="grid-constant")
    np.testing.assert_allclose(got[i, ..., 0], wanted, atol=1e-5)
  # The draws reach their limits, so that each of the three was seen.
  assert np.abs(turn).max() > 0.9 * np.deg2rad(augment.ROTATION_DEGREES)
  assert np.abs(shift).max() > 0.9 * augment.SHIFT_PIXELS and np.ptp(scale) > 0.15


def test_crop_flip_gives_crops_and_flips():
  images = np.arange(1, 1 + 64 * 6 * 6, dtype=np.float32).reshape(64, 6, 6, 1)
  padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
  kinds = set()
  for got, whole in zip(augment.crop_flip(images, draws()), padded):
    crops = {(y, x): whole[y:y + 6, x:x + 6] for y in range(9) for x in range(9)}
    found = [(*at, False) for at, crop in crops.items() if np.array_equal(got, crop)]
    found += [(*at, True) for at, crop in crops.items() if np.array_equal(got, crop[:, ::-1])]
    assert len(found) == 1
    kinds.update(found)
  assert len({y for y, _, _ in kinds}) == len({x for _, x, _ in kinds}) == 9
  assert {flip for *_, flip in kinds} == {False, True}


def test_every_seed_and_step_has_draws_of_its_own():
  drawn = [draws(seed=seed, step=step).random(64) for seed in (0, 1) for step in (0, 1)]
  for i, one in enumerate(drawn):
    assert all((one != two).all() for two in drawn[:i])
  np.testing.assert_array_equal(drawn[3], draws(seed=1, step=1).random(64))


def test_own_augmentation_draws_like_a_generator(dataset):
  def noise(images, rng):
    n = len(images)
    images = images * rng.uniform(0.5, 1, (n, 1, 1, 1)) + rng.normal(0, 0.1, size=(n, 1, 1, 1))
    return images * (rng.random(n) < 0.5)[:, None, None, None] + rng.integers(0, 2, (n, 1, 1, 1))

  whole = data.Batches(dataset, augment=noise)[3]
  hosts = [
      data.Batches(dataset, augment=noise, process_index=i, process_count=2)[3] for i in (0, 1)]
  assert same(whole, {key: np.concatenate([host[key] for host in hosts]) for key in whole})
  assert whole["image"].dtype == np.float32


def test_input_costs_a_twentieth_of_a_step(dataset):
  order = batches(dataset, "digits")
  order[0]
  times = []
  for step in range(50):
    start = time.perf_counter()
    order[step]
    times.append(time.perf_counter() - start)
  assert min(times) < 0.003, "5% of a training step of 60 ms"


@pytest.mark.parametrize("options, message", [
    ({"split": "tests"}, "unknown split of digits 'tests'; did you mean 'test'.*validation"),
    ({"batch_size": 0}, "batch size: got 0, allowed: a positive multiple"),
    ({"batch_size": 10, "process_count": 4}, "got 10, allowed: a positive multiple of the 4 proc"),
    ({"process_index": 2, "process_count": 2}, "process index: got 2, allowed: 0 to 1"),
    ({"seed": -1}, "seed of the data: got -1"),
])
def test_wrong_options(dataset, options, message):
  with pytest.raises(ValueError, match=message):
    data.Batches(dataset, **options)


@pytest.mark.parametrize("function, message", [
    (lambda images, rng: images[:, 1:], r"augmented images: got .*7, 8, 1\), allowed: .*8, 8, 1"),
    (lambda images, rng: images * rng.random(3), r"draw: got \(3,\), allowed: \(128, ...\)"),
])
def test_wrong_augmentation(dataset, function, message):
  with pytest.raises(ValueError, match=message):
    data.Batches(dataset, augment=function)[0]
  with pytest.raises(ValueError, match="step: got -1"):
    data.Batches(dataset)[-1]


@pytest.mark.parametrize("name, message", [
    ("digit", "unknown augmentation 'digit'; did you mean 'digits'.*none, digits, crop_flip, pack"),
    ("no_such_module:fn", "augmentation 'no_such_module:fn': no module 'no_such_module'"),
    ("math:gdc", "unknown augmentation in math 'gdc'; did you mean 'gcd'"),
    ("math:pi", "augmentation 'math:pi': got float, allowed: a function"),
])
def test_wrong_name(name, message):
  with pytest.raises(ValueError, match=message):
    data.augmentation(name)
