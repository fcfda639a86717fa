"""Multi-crop batches: what crops show, how they are changed, which patches are hidden."""

from __future__ import annotations

import colorsys
import dataclasses

from PIL import Image
import numpy as np
import pytest

from nestnet import data
from nestnet.data import resampling
from nestnet.data import views

SMALL = data.Crops("digits", 12, (0.5, 1.0), 3, 6, (0.1, 0.4), 0.5, (0.1, 0.5), mask_patch=3)
GLOBAL = views.View("global", 0, 12, (1.0, 1.0))
SECOND = dataclasses.replace(GLOBAL, number=1)
LOCAL = views.View("local", 0, 6, (0.05, 0.32))


def draws(batch=64, seed=0, step=0):
  return data.Draws(seed, step, batch, slice(0, batch))


def noise(batch=64, height=12, width=12, channels=3, seed=0):
  return np.random.default_rng(seed).random((batch, height, width, channels), np.float32)


@pytest.fixture(scope="module")
def clutter():
  values = np.random.default_rng(0).integers(0, 17, (64, 12, 12, 1), np.uint8)
  examples = [{"image": image, "label": i % 10} for i, image in enumerate(values)]
  splits = {split: data.Source(split, examples, 10, (12, 12, 1), high=16) for split in ("train", "test")}
  return data.Dataset("clutter", 10, (12, 12, 1), splits).cropped(SMALL)


def test_shapes_and_types(clutter):
  batch = data.Batches(clutter, batch_size=16)[0]
  assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
    name: (shape, np.dtype(kind)) for name, (shape, kind) in clutter.entries.items()}
  assert {name: x.shape for name, x in batch.items()} == {
    "image": (16, 12, 12, 1), "label": (16,), "global": (16, 2, 12, 12, 1), "local": (16, 3, 6, 6, 1),
    "mask": (16, 2, 16)}
  for name in ("global", "local"):
    assert -1 <= batch[name].min() < -0.8 and 0.8 < batch[name].max() <= 1
  bare = clutter.cropped(dataclasses.replace(SMALL, local_crops_number=0, mask_sample_probability=0.0))
  assert set(bare.entries) == set(data.Batches(bare, batch_size=2)[0]) == {"image", "label", "global"}


@pytest.mark.parametrize("name", ["none", "digits", "dinov2"])
def test_pure_function_of_seed_and_step_over_any_number_of_hosts(clutter, name):
  made = clutter.cropped(dataclasses.replace(SMALL, augment=name))
  whole = data.Batches(made, batch_size=16, seed=3)[7]
  hosts = [data.Batches(made, batch_size=16, seed=3, process_index=i, process_count=4)[7] for i in range(4)]
  for key, values in whole.items():
    np.testing.assert_array_equal(np.concatenate([host[key] for host in hosts]), values, err_msg=key)
  for other in (data.Batches(made, batch_size=16, seed=4)[7], data.Batches(made, batch_size=16, seed=3)[8]):
    assert not any(np.array_equal(other[key], whole[key]) for key in ("global", "local", "mask"))
  views_of_one = [whole["global"][:, 0], whole["global"][:, 1]]
  assert not any(np.array_equal(*pair) for pair in zip(*views_of_one))


def test_only_the_entries_that_are_asked_for(clutter, monkeypatch):
  whole = data.Batches(clutter, batch_size=8)[2]
  some = data.Batches(clutter, batch_size=8, entries=("mask", "global"))[2]
  assert list(some) == ["mask", "global"]
  assert all(np.array_equal(some[key], whole[key]) for key in some)
  monkeypatch.setattr(data.Crops, "cut", None)
  assert list(data.Batches(clutter, batch_size=8, entries=("image", "label"))[2]) == ["image", "label"]
  with pytest.raises(ValueError, match="unknown entry of batches of clutter 'globl'.*image, label"):
    data.Batches(clutter, entries=("globl",))


def test_whole_images_get_the_size_of_global_crops(clutter):
  small = clutter.cropped(dataclasses.replace(SMALL, global_crops_size=9))
  raw = np.stack([example["image"] for example in small.split("test")])[:4] / 16
  wanted = resampling.resized(raw.astype(np.float32), 9) * 2 - 1
  np.testing.assert_allclose(data.arrays(small, "test")["image"][:4], wanted, atol=1e-6)
  assert data.Batches(small, batch_size=4)[0]["image"].shape == wanted.shape == (4, 9, 9, 1)
  assert small.entries["image"][0] == (9, 9, 1) and small.shape == (12, 12, 1)
  assert small.entries["global"][0] == (2, 9, 9, 1)


@pytest.mark.parametrize("name", list(views.NAMED))
def test_nothing_changes_where_all_is_off(name, monkeypatch):
  for setting, off in {"SHIFT_PIXELS": 0, "ROTATION_DEGREES": 0, "CONTRAST_RANGE": (1, 1), "NOISE": 0,
                       "JITTERED": 0, "GRAY": 0, "BLUR_SIGMA": (1e-3, 1e-3)}.items():
    monkeypatch.setattr(views, setting, off)
  images = noise()
  crops = views.by_name(name)(images, draws(), GLOBAL)
  if name.startswith("dinov2"):
    flipped = np.abs(crops - images).max((1, 2, 3)) > 1e-5
    assert 0.3 < flipped.mean() < 0.7
    images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
  np.testing.assert_allclose(crops, images, atol=1e-6)


@pytest.mark.parametrize("shape, scale, ratio", [
  ((12, 12), (0.32, 1.0), (1.0, 1.0)), ((12, 12), (0.95, 0.95), views.RATIO),
  ((30, 20), (0.05, 0.32), views.RATIO)])
def test_boxes_lie_inside_and_have_the_area_that_was_asked_for(shape, scale, ratio):
  top, left, height, width = resampling.boxes(draws(2000), 2000, shape, scale, ratio)
  area = height * width / (shape[0] * shape[1])
  assert scale[0] - 1e-9 <= area.min() and area.max() <= scale[1] + 1e-9
  assert area.min() < scale[0] + 0.01 and area.max() > scale[1] - 0.02
  assert min(top.min(), left.min()) >= 0
  assert (top + height).max() <= shape[0] + 1e-9 and (left + width).max() <= shape[1] + 1e-9
  assert ratio[0] - 1e-9 <= (width / height).min() and (width / height).max() <= ratio[1] + 1e-9
  # Small boxes reach every edge.
  if scale[1] < 0.5:
    assert top.min() < 0.5 and left.min() < 0.5
    assert (top + height).max() > shape[0] - 0.5 and (left + width).max() > shape[1] - 0.5


def test_a_crop_is_what_pillow_makes_of_its_box():
  images, view = noise(8, 30, 20, 1), dataclasses.replace(LOCAL, side=7)
  crops = views.none(images, draws(8), view)
  boxes = resampling.boxes(draws(8), 8, (30, 20), view.scale).T
  for crop, image, (top, left, height, width) in zip(crops[..., 0], images[..., 0], boxes):
    wanted = Image.fromarray(image).resize((7, 7), Image.Resampling.BICUBIC,
                                           (left, top, left + width, top + height))
    np.testing.assert_allclose(crop, np.clip(wanted, 0, 1), atol=1e-5)


def test_digits_read_their_box_turned_and_shifted(monkeypatch):
  """On a plane, which bilinear resampling keeps: a crop's pixels have the values of their places."""
  monkeypatch.setattr(views, "CONTRAST_RANGE", (1, 1))
  monkeypatch.setattr(views, "NOISE", 0)
  rows, columns = np.mgrid[:40, :40].astype(np.float32)
  planes = [np.broadcast_to(x[..., None] / 40, (64, 40, 40, 1)) for x in (rows, columns)]
  view = dataclasses.replace(LOCAL, scale=(0.1, 0.1))
  y, x = (40 * views.digits(plane, draws(), view)[..., 0] for plane in planes)
  top, left, height, width = resampling.boxes(draws(), 64, (40, 40), view.scale)
  middle = y.mean((1, 2)) - (top + height / 2 - 0.5), x.mean((1, 2)) - (left + width / 2 - 0.5)
  inside = (top > 4) & (left > 4) & (top + height < 36) & (left + width < 36)
  assert inside.sum() > 10
  for shift in middle:
    assert 0.7 < np.abs(shift[inside]).max() <= views.SHIFT_PIXELS + 1e-3
  across = x[:, 0, 5] - x[:, 0, 0], y[:, 0, 5] - y[:, 0, 0]
  turn = np.rad2deg(np.arctan2(across[1], across[0]))[inside]
  assert 10 < np.abs(turn).max() <= views.ROTATION_DEGREES + 1e-2 and turn.min() < 0 < turn.max()
  np.testing.assert_allclose(np.hypot(*across)[inside], (width * 5 / 6)[inside], rtol=1e-3)
  # Down the crop is square to across it, and as long.
  down = x[:, 5, 0] - x[:, 0, 0], y[:, 5, 0] - y[:, 0, 0]
  np.testing.assert_allclose(down[1][inside], across[0][inside], atol=1e-3)
  np.testing.assert_allclose(-down[0][inside], across[1][inside], atol=1e-3)


def test_digits_are_never_flipped_and_photographs_half_the_time():
  image = np.zeros((1, 12, 12, 1), np.float32)
  image[0, 2:10, 2:5] = 1
  images = np.repeat(image, 256, 0)
  view = dataclasses.replace(GLOBAL, scale=(0.8, 1.0))

  def mirrored(name):
    crops = views.by_name(name)(images, draws(256), view)
    crops = crops - crops.mean((1, 2, 3), keepdims=True)
    alike = [(crops * (one - one.mean())).sum((1, 2, 3)) for one in (image, image[:, :, ::-1])]
    return (alike[1] > alike[0]).mean()

  assert mirrored("digits") == mirrored("none") == 0
  assert 0.3 < mirrored("dinov2") < 0.7


def test_contrast_and_noise_of_digits(monkeypatch):
  images = np.full((256, 12, 12, 1), 0.5, np.float32)
  images[:, ::2] = 0.3
  monkeypatch.setattr(views, "SHIFT_PIXELS", 0)
  monkeypatch.setattr(views, "ROTATION_DEGREES", 0)
  crops = views.digits(images, draws(256), GLOBAL)
  spread = crops[:, 1::2].mean((1, 2, 3)) - crops[:, ::2].mean((1, 2, 3))
  assert 0.2 * 0.7 - 0.03 < spread.min() < 0.16 and 0.24 < spread.max() < 0.2 * 1.3 + 0.03
  assert abs(crops[:, ::2].std((1, 2, 3)).mean() - views.NOISE) < 0.002


def colours(monkeypatch, image, view=GLOBAL, batch=512, **settings):
  """Crops of an image of one colour, what is not in `settings` being off."""
  off = {"JITTERED": 0.0, "GRAY": 0.0, "SOLARIZED": 0.0}
  for setting, value in (off | settings).items():
    monkeypatch.setattr(views, setting, value)
  images = np.broadcast_to(np.float32(image), (batch, 12, 12, len(image)))
  crops = views.dinov2(images, draws(batch), view)
  assert np.ptp(crops, (1, 2)).max() < 1e-5
  return crops[:, 0, 0]


def only(what):
  return {"JITTERED": 1.0, "JITTER": {name: amount * (name == what) for name, amount in views.JITTER.items()}}


@pytest.mark.parametrize("what, function, low, high", [
  ("brightness", lambda c: c.mean(1) / 0.4, 0.6, 1.4),
  ("saturation", lambda c: (c[:, 0] - c[:, 2]) / 0.4, 0.8, 1.2),
  ("hue", lambda c: (np.array([colorsys.rgb_to_hsv(*map(float, rgb))[0] for rgb in c])
                     - colorsys.rgb_to_hsv(0.6, 0.4, 0.2)[0] + 0.5) % 1, 0.4, 0.6)])
def test_jitter_of_colours(monkeypatch, what, function, low, high):
  amounts = function(colours(monkeypatch, (0.6, 0.4, 0.2), **only(what)))
  reach = high - low
  assert low - 1e-3 <= amounts.min() < low + 0.05 * reach
  assert high - 0.05 * reach < amounts.max() <= high + 1e-3


def test_hues_turn_as_in_colorsys():
  colour = noise(64, 1, 1)
  turned = views._rehued(colour, np.float32(0.3))
  for rgb, got in zip(colour.reshape(-1, 3), turned.reshape(-1, 3)):
    hue, saturation, value = colorsys.rgb_to_hsv(*map(float, rgb))
    np.testing.assert_allclose(got, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-5)


def test_contrast_of_a_photograph_is_around_its_mean_grey():
  images = noise(4)
  gray = (images @ np.float32([0.299, 0.587, 0.114])).mean((1, 2))[:, None, None, None]
  np.testing.assert_allclose(views._contrasted(images, np.float32(0.4)), gray + 1.4 * (images - gray), atol=1e-6)


def test_how_often_colours_change(monkeypatch):
  shares = {
    "jittered": (np.abs(colours(monkeypatch, (0.6, 0.4, 0.2), JITTERED=0.8) - (0.6, 0.4, 0.2)) > 1e-4).any(1),
    "gray": np.ptp(colours(monkeypatch, (0.6, 0.4, 0.2), GRAY=0.2), 1) < 1e-5}
  assert abs(shares["jittered"].mean() - 0.8) < 0.06 and abs(shares["gray"].mean() - 0.2) < 0.06


def test_jitter_comes_in_every_order(monkeypatch):
  """Contrast and brightness of two greys do not commute; here both orders are found."""
  monkeypatch.setattr(views, "JITTERED", 1.0)
  monkeypatch.setattr(views, "JITTER", {"brightness": 0.4, "contrast": 0.4})
  monkeypatch.setitem(views._CHANGES, "brightness", lambda crops, by: np.full_like(crops, 0.25))
  monkeypatch.setitem(views._CHANGES, "contrast", lambda crops, by: np.full_like(crops, 0.75))
  crops = noise(256)
  views._jitter(crops, draws(256))
  assert 0.4 < (crops == 0.25).mean() < 0.6 and set(np.unique(crops)) == {0.25, 0.75}


def test_bright_second_global_crops_are_solarised(monkeypatch):
  for view, share in (GLOBAL, 0), (SECOND, 0.2), (dataclasses.replace(SECOND, kind="local"), 0):
    got = colours(monkeypatch, (0.9, 0.4, 0.6), view, SOLARIZED=0.2)
    inverted = np.isclose(got, (0.1, 0.4, 0.4), atol=1e-5).all(1)
    assert np.isclose(got[~inverted], (0.9, 0.4, 0.6), atol=1e-5).all()
    assert abs(inverted.mean() - share) < 0.06


@pytest.mark.parametrize("name, shares", [("dinov2", (1.0, 0.1, 0.5)), ("dinov2_code", (0.0, 0.9, 0.5))])
def test_how_often_crops_are_blurred(monkeypatch, name, shares):
  monkeypatch.setattr(views, "JITTERED", 0.0)
  monkeypatch.setattr(views, "GRAY", 0.0)
  monkeypatch.setattr(views, "SOLARIZED", 0.0)
  monkeypatch.setattr(views, "BLUR_SIGMA", (2.0, 2.0))
  board = np.indices((12, 12)).sum(0) % 2
  images = np.broadcast_to(board[..., None].astype(np.float32), (512, 12, 12, 1))
  for view, share in zip((GLOBAL, SECOND, dataclasses.replace(GLOBAL, kind="local")), shares):
    crops = views.by_name(name)(images, draws(512), view)
    assert abs((np.ptp(crops, (1, 2, 3)) < 0.5).mean() - share) < 0.06


def test_blur_is_the_gaussian_of_nine_pixels():
  from scipy import ndimage

  images, sigma = noise(3, channels=1), np.array([0.3, 1.0, 2.0])
  weights = resampling.gaussian(sigma, 12, 4)
  for got, image, width in zip(resampling.apply(weights, weights, images), images[..., 0], sigma):
    wanted = ndimage.gaussian_filter(image, width, mode="mirror", radius=4)
    np.testing.assert_allclose(got[..., 0], wanted, atol=1e-5)


@pytest.mark.parametrize("side, patch, ratios", [(12, 3, (0.1, 0.5)), (224, 16, (0.1, 0.5)), (12, 3, (0.3, 0.3))])
def test_masks_hide_the_asked_for_share_of_half_of_the_crops(side, patch, ratios):
  crops = data.Crops("none", side, mask_sample_probability=0.5, mask_ratio_min_max=ratios, mask_patch=patch)
  mask = crops.masks(64, draws())
  count = (side // patch) ** 2
  assert mask.shape == (64, 2, count)
  hidden = mask.sum(2)
  assert (hidden > 0).sum() == 64 and 0.2 < (hidden[:, 0] > 0).mean() < 0.8
  shares = np.sort(hidden[hidden > 0])
  # Evenly spread, and rounded down.
  np.testing.assert_allclose(shares, count * np.linspace(*ratios, 64), atol=1 + 0.01 * count)
  assert shares.max() <= ratios[1] * count and (hidden[hidden > 0] >= np.floor(ratios[0] * count)).all()


def test_masks_are_blocks_anywhere():
  crops = data.Crops("none", 224, mask_sample_probability=1.0, mask_ratio_min_max=(0.3, 0.3), mask_patch=16)
  mask = crops.masks(256, draws(256)).reshape(-1, 14, 14)
  beside = (mask[:, 1:] & mask[:, :-1]).sum((1, 2)) / mask.sum((1, 2))
  assert beside.mean() > 0.7  # Of patches at random 0.3.
  assert 0.02 < mask.mean(0).min() and mask.mean(0).max() < 0.6


def flat(images, draws, view):
  return images[:, :view.side, :view.side, 0]


@pytest.mark.parametrize("options, message", [
  ({"augment": "dino"}, "unknown augmentation of crops 'dino'; did you mean 'dinov2'.*none, digits"),
  ({"augment": f"{__name__}:flat"}, r"global crops of .*:flat: got shape .*12, 12\), allowed: .*12, 12, 1\)"),
  ({"global_crops_size": 15}, "global_crops_size: got 15, allowed: at most 12: the images of clutter have"),
  ({"local_crops_size": 13}, "local_crops_size: got 13, allowed: at most 12: .* 12 x 12 pixels"),
  ({"global_crops_size": 0}, "global_crops_size: got 0, allowed: a whole number of at least 1"),
  ({"local_crops_size": -6}, "local_crops_size: got -6, allowed"),
  ({"local_crops_number": -1}, "local_crops_number: got -1, allowed: a whole number of at least 0"),
  ({"local_crops_number": 2.5}, "local_crops_number: got 2.5, allowed"),
  ({"global_crops_scale": (0.0, 1.0)}, r"global_crops_scale: got \(0.0, 1.0\), allowed: two shares above 0"),
  ({"global_crops_scale": (0.3, 1.1)}, "global_crops_scale: got"),
  ({"local_crops_scale": (0.3, 0.1)}, "local_crops_scale: got .* the smaller one first"),
  ({"local_crops_scale": 0.3}, "local_crops_scale: got 0.3"),
  ({"mask_ratio_min_max": (0.5, 0.1)}, "mask_ratio_min_max: got"),
  ({"mask_sample_probability": 1.5}, "mask_sample_probability: got 1.5, allowed: a share from 0 to 1"),
  ({"mask_patch": 0}, "mask_patch: got 0, allowed: with masks .*0.5.* divides global_crops_size=12"),
  ({"mask_patch": 5}, "mask_patch: got 5, allowed: with masks"),
  ({"mask_patch": -3}, "mask_patch: got -3"),
])
def test_wrong_options(clutter, options, message):
  with pytest.raises(ValueError, match=message):
    clutter.cropped(dataclasses.replace(SMALL, **options))


def test_dinov2_is_for_gray_and_colour():
  with pytest.raises(ValueError, match="crops of dinov2: got images of 2 channels, allowed: 1 or 3"):
    data.Dataset("two", 2, (12, 12, 2), {}).cropped(dataclasses.replace(SMALL, augment="dinov2"))
