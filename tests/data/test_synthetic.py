"""Random images stand in for a data set that is not there."""

import numpy as np

from nestnet import build, cli
from nestnet.data import Batches, load, synthetic


def test_noise_is_a_function_of_its_number():
  noise = synthetic.Noise(10, (4, 4, 3), classes=5)
  images = np.stack([example["image"] for example in noise])
  assert images.shape == (10, 4, 4, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 100
  np.testing.assert_array_equal(noise[-1]["image"], images[9])
  assert {example["label"] for example in synthetic.Noise(100, (1, 1, 1), classes=5)} == set(range(5))


def test_batches_have_the_shape_of_imagenet():
  dataset = load("nestnet.data.synthetic:ImageNet")
  batch = Batches(dataset, batch_size=2)[0]
  assert batch["image"].shape == (2, 224, 224, 3) and -1 <= batch["image"].min() < batch["image"].max() <= 1
  assert dataset.classes == 1000


def test_the_supernet_of_the_bench_is_as_large_as_vit_b16():
  run = build.build(cli.load_config("configs/bench_vit_b16.py"))
  shapes = run.supernet.shapes["params"]
  assert 85e6 < sum(np.prod(leaf.shape) for leaf in build.jax.tree.leaves(shapes)) < 88e6
  assert run.supernet.model.dtype == "bfloat16" and run.supernet.space.size == 108
