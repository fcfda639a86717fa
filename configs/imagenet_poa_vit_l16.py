"""POA's pre-training of a nested ViT-L/16 on ImageNet, as published: 143 sub-networks from ViT-S on, for TPU pods.

    python -m experiments.plan --config=configs/imagenet_poa_vit_l16.py --topology=v5e:16x16 --mesh=data:-1 \\
      --config.train.batch_size=1536

says what a step takes on a slice, with neither a TPU nor the images at hand: docs/results/plan_poa.md. It is not
trained in this repository: there is no accuracy to state. `experiments.train` reads images of one size, which those of
TFDS's `imagenet2012` are not: name a class of your own that gives them, with
`--config.data.name=my_data:ImageNet`. Numbers are those of the paper (2408.01031, section 4.1, appendix C) and,
where it leaves them open, of its code; iBOT's term is on, as there, after the first 30 epochs.
"""

import ml_collections

from nestnet.choices import spaced
from nestnet.recipes import recipe

# Iterations of an epoch, and what the code stretches its schedules by.
EPOCH, STRETCH = 800, 0.78
LAYERS, DECAY = 24, 0.9


def get_config(method: str = "poa") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    name="ViT", layers=LAYERS, embed=1024, heads=16, mlp=4096, head_dim=64, classes=0, patch=16, pool="token",
    position_std=0.02, layer_scale=1e-5, drop_path=0.2, masked=True, exact_gelu=True, width_scaling="ratio",
    remat=True, dtype="bfloat16")
  widths = range(384, 1025, 64)
  config.space = dict(layers=spaced(LAYERS, range(12, LAYERS + 1)), couple={
    "embed heads mlp": tuple((width, width // 64, 4 * width) for width in widths)})
  config.recipe = recipe(method)
  config.recipe["objective"].update(
    warmup_steps=30 * EPOCH, frozen_steps=EPOCH, patches=1.0, patch_delay=30 * EPOCH, told_after=10 * EPOCH)
  # What 0.9999 becomes where the schedules are cut; so weight decay, of 0.4.
  config.recipe.update(ema_end=0.999)
  # Of the images, what `experiments.plan` needs to know; checked against them where they are read.
  config.data = dict(name="imagenet2012", data_dir="", augment="none", shape=(224, 224, 3), classes=1000, crops=dict(
    augment="dinov2", global_crops_size=224, global_crops_scale=(0.32, 1.0), local_crops_number=8,
    local_crops_size=96, local_crops_scale=(0.05, 0.32), mask_sample_probability=0.5, mask_ratio_min_max=(0.1, 0.5),
    mask_patch=16))
  # 0.004 times the root of 1600 / 1024.
  config.optim = dict(
    name="adamw", learning_rate=0.005, schedule="cosine", warmup_steps=10 * EPOCH, floor=2e-5 / 0.005, until=STRETCH,
    weight_decay=0.04, weight_decay_end=0.36, clip_norm=1.5, b1=0.9, b2=0.999, layer_decay=DECAY,
    multipliers={"model/patch": 0.2 * DECAY ** (LAYERS + 1), "model/positions": DECAY ** (LAYERS + 1),
                 "model/token": DECAY ** (LAYERS + 1), "model/mask": DECAY ** (LAYERS + 1)})
  # Global batch, in images. Each data shard has an elastic student of its own.
  config.train = dict(steps=346 * EPOCH, batch_size=1600, checkpoint_every=EPOCH, log_every=100, eval_every=0,
                      execution="auto", per_shard_subnets=True, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=-1, fsdp=1, model=1)
  return config
