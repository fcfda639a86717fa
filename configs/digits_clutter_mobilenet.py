"""A nested MobileNet on cluttered digits, 12 x 12 pixels: Once-for-All's choices at a small size.

    python -m experiments.train --config=configs/digits_clutter_mobilenet.py \
      --workdir=runs/digits_clutter_mobilenet

Depth in each of three stages, and expansion and kernel in each block: 6 + 6^2 + 6^3 choices in a stage,
258^3 = 1.7e7 members in all, which train as data to one program. Another method trains with its name as
the argument: `configs/digits_clutter_mobilenet.py:ofa`. `--config.space.resolution='(8, 12)'` adds the side
of the images, in pixels, to the choices. Methods compared: docs/results/digits_clutter_mobilenet.md.

    python -m experiments.bench --config=configs/digits_clutter_mobilenet.py --batch_size=128 \
      --only=one_program,compilation --pairs=5

The largest member's gradient takes 18 ms alone and 28 ms in the one program, the smallest's 5 and 9 ms; the
programs of a run compile in 39 s (2 cores of an AMD EPYC, jax 0.10.2).
"""

import ml_collections

from nestnet import recipes

STAGES = (1, 2, 3)
CHOICES = dict(layers=(1, 2, 3), expand=(2, 3, 4), kernel=(3, 5))
# Peak rates that differ from 0.4, by mean validation accuracy of the pool among 0.1, 0.4 and 1: seed 0 of
# `experiments.compare --seeds=1 '--budgets=equal FLOPs' --override=train.steps=1500
# --override=optim.learning_rate=R` for separate, ofa, bignas, deps and rss. Others have not been tried.
RATES = {"separate": 1.0, "ofa": 1.0}
# Warm-up of 50 steps in 2,000: as a share of the first phase, where it has an optimizer of its own.
WARMUP = {"ofa": 0.084, "compofa": 0.046}


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Dropout, zeros and smoothed labels for every method, lest they decide a comparison.
  config.model = dict(name="SmallMobileNet", dropout=0.1, zero_gamma=True)
  config.space = {f"{axis}_{s}": sizes for axis, sizes in CHOICES.items() for s in STAGES}
  # Free in every block. Without this the blocks of a stage have one of each.
  config.space.per_layer = tuple(f"{axis}_{s}" for axis in ("expand", "kernel") for s in STAGES)
  shown = ((1, 2, 3), (2, 3, 3), (2, 3, 5), (3, 4, 5))
  if method == "compofa":
    # Depth and expansion of a stage go together; kernels are not elastic.
    config.space = {f"kernel_{s}": (5,) for s in STAGES}
    config.space.couple = {f"layers_{s} expand_{s}": ((1, 2), (2, 3), (3, 4)) for s in STAGES}
    shown = ((1, 2, 5), (2, 3, 5), (3, 4, 5))
  # What the table shows of the space.
  config.space.pool = tuple(
    ",".join(f"layers_{s}={d},expand_{s}={e},kernel_{s}={k}" for s in STAGES) for d, e, k in shown)
  config.recipe = recipes.recipe(method)
  config.recipe["objective"]["label_smoothing"] = 0.1
  if "whole" in config.recipe["sampler"]:
    config.recipe["sampler"]["whole"] = True
  if several := recipes.phases(method, config.space):
    config.phases = several
  config.data = dict(name="digits_clutter", data_dir="", augment="none")
  config.optim = dict(name="sgd", learning_rate=RATES.get(method, 0.4), schedule="cosine",
                      warmup_share=WARMUP.get(method, 0.025), weight_decay=1e-4, clip_norm=1.0, momentum=0.9)
  # Global batch, in images; the last step is always saved.
  config.train = dict(steps=2000, batch_size=128, checkpoint_every=500, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
