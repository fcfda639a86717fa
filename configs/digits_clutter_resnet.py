"""A nested ResNet-D on cluttered digits, 12 x 12 pixels: Once-for-All's choices at a small size.

    python -m experiments.train --config=configs/digits_clutter_resnet.py --workdir=runs/digits_clutter_resnet

Depth in each of three stages, expansion in each block, and the widths of the stem and of each stage:
2^4 (2 + 4 + 8)^3 = 43,904 members, which train as data to one program. In it each block chooses from the
widths that it reads and writes, so that their combinations are no networks of their own.
Another method trains with its name as the argument: `configs/digits_clutter_resnet.py:ofa`.
`--config.space.resolution='(8, 12)'` adds the side of the images, in pixels, to the choices.
"""

import ml_collections

from nestnet import recipes

STAGES = (1, 2, 3)
CHOICES = dict(layers=(1, 2, 3), expand=(50, 100))
# What is inside the stem is as narrow as it may be.
WIDTHS = tuple(f"width_{s}" for s in (0, *STAGES))
# Warm-up of 50 steps in 2,000: as a share of the first phase, where it has an optimizer of its own.
WARMUP = {"ofa": 0.063, "compofa": 0.046}


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Dropout, zeros and smoothed labels for every method, lest they decide a comparison.
  config.model = dict(name="SmallResNet", dropout=0.1, zero_gamma=True)
  config.space = {f"{axis}_{s}": sizes for axis, sizes in CHOICES.items() for s in STAGES}
  config.space.update({axis: (50, 100) for axis in WIDTHS})
  # Free in every block.
  config.space.per_layer = tuple(f"expand_{s}" for s in STAGES)
  # What the table shows of the space.
  config.space.pool = tuple(
    ",".join([*(f"layers_{s}={d},expand_{s}={e}" for s in STAGES), *(f"{axis}={w}" for axis in WIDTHS)])
    for d, e, w in ((1, 50, 50), (3, 100, 50), (2, 50, 100), (3, 100, 100)))
  if method == "compofa":
    # Depth and expansion of a stage go together.
    config.space = {axis: (50, 100) for axis in WIDTHS} | {
      "couple": {f"layers_{s} expand_{s}": ((1, 50), (3, 100)) for s in STAGES},
      "pool": config.space.pool[:2]}
  config.recipe = recipes.recipe(method)
  config.recipe["objective"]["label_smoothing"] = 0.1
  if "whole" in config.recipe["sampler"]:
    config.recipe["sampler"]["whole"] = True
  if several := recipes.phases(method, config.space):
    config.phases = several
  config.data = dict(name="digits_clutter", data_dir="", augment="none")
  config.optim = dict(name="sgd", learning_rate=0.1, schedule="cosine",
                      warmup_share=WARMUP.get(method, 0.025), weight_decay=1e-4, clip_norm=1.0, momentum=0.9)
  # Global batch, in images; the last step is always saved.
  config.train = dict(steps=2000, batch_size=128, checkpoint_every=500, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
