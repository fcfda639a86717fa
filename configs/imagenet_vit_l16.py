"""A nested ViT-L/16 on ImageNet at 224 x 224 pixels, for TPU pods.

    python -m experiments.plan --config=configs/imagenet_vit_l16.py --topology=v5e:16x16 --mesh=data:256

says what a step takes on a slice, with neither a TPU nor the images at hand. It is not trained in this
repository: there is no accuracy to state. `experiments.train` reads images of one size, which those of
TFDS's `imagenet2012` are not: name a class of your own that gives them at 224 x 224, with
`--config.data.name=my_data:ImageNet`.
"""

import ml_collections

from nestnet.recipes import recipe


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Parameters and their sums stay float32; the blocks compute in bfloat16.
  config.model = dict(name="ViT", layers=24, embed=1024, heads=16, mlp=4096, patch=16, position_std=0.02,
                      drop_path=0.1, dtype="bfloat16")
  config.space = dict(
    layers=(12, 16, 20, 24), embed=(512, 768, 1024), heads=(8, 12, 16), mlp=(1024, 2048, 3072, 4096),
    # So that a `model` axis of 2 or 4 chips cuts no group.
    groups=dict(heads=4, mlp=4))
  config.recipe = recipe(method)
  # What `experiments.plan` needs to know of the images; checked against them where they are read.
  config.data = dict(name="imagenet2012", data_dir="", augment="none", shape=(224, 224, 3), classes=1000)
  config.optim = dict(name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=10_000,
                      weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95)
  # Global batch, in images; 93,750 steps are 300 epochs.
  config.train = dict(steps=93_750, batch_size=4096, checkpoint_every=1000, log_every=100, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=-1, fsdp=1, model=1)
  return config
