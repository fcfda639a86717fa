"""Self-supervised pre-training of a nested vision transformer on cluttered digits, 12 x 12 pixels, by POA.

    python -m experiments.train --config=configs/digits_clutter_poa.py --workdir=runs/digits_clutter_poa

No label is seen in training. The table shows how well nearest neighbours (with 10 labels of each class, and
with all) and linear readouts tell digits apart by the features of nine sub-networks, taken out of the averaged
teacher; below it stand pixels, their principal components, and networks that never trained. Another method
trains with its name as the argument: `--config=configs/digits_clutter_poa.py:poa_no_same_view`;
or `separate` (each size alone, by self-distillation), `truncate` (slices of the largest alone).
"""

import ml_collections

from nestnet.choices import spaced
from nestnet.errors import one_of
from nestnet.recipes import recipe, self_distillation

METHODS = ("poa", "poa_no_same_view", "separate", "truncate")
STEPS = 800


def get_config(method: str = "poa") -> ml_collections.ConfigDict:
  if method not in METHODS:
    raise one_of("method of digits_clutter_poa", method, METHODS)
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="ViT", layers=4, embed=48, heads=3, mlp=192, head_dim=16, classes=0, patch=3, pool="token",
                      width_scaling="ratio", unroll=4)
  config.space = dict(
    layers=spaced(4, (2, 3, 4)),
    couple={"embed heads mlp": ((16, 1, 64), (32, 2, 128), (48, 3, 192))},
    # Small, base and large, 1:6:16 in parameters: what is compared. All nine train and stand in a run's table.
    pool=("layers=0+3,embed=16,heads=1,mlp=64", "layers=0+1+3,embed=32,heads=2,mlp=128",
          "layers=4,embed=48,heads=3,mlp=192"))
  config.recipe = self_distillation(name=method) if method in ("separate", "truncate") else recipe(method)
  # At the published temperatures (0.04 to 0.07), with an average that moves by 0.02 and a rate of 0.001, so short a
  # run does not get off uniform assignments: its loss stays at ln K
  # (docs/results/digits_clutter_poa_rates.md).
  config.recipe["objective"].update(
    prototypes=(64, 128, 256), hidden=128, bottleneck=32, teacher_temperature=0.02, warmup_temperature=0.02)
  config.recipe.update(ema=0.9, ema_end=0.99)
  config.recipe["sampler"]["whole"] = True
  config.data = dict(name="digits_clutter", data_dir="", augment="none", crops=dict(
    augment="digits", global_crops_size=12, global_crops_scale=(0.6, 1.0), local_crops_number=2, local_crops_size=9,
    local_crops_scale=(0.3, 0.6)))
  # The best of 0.002, 0.004 and 0.008 for `poa` and, over all sizes, for `separate`:
  # docs/results/digits_clutter_poa_rates.md.
  config.optim = dict(name="adamw", learning_rate=4e-3, schedule="cosine", warmup_steps=STEPS // 10,
                      weight_decay=0.04, clip_norm=1.5, b1=0.9, b2=0.999)
  # Global batch, in images; the last step is always saved.
  config.train = dict(steps=STEPS, batch_size=128, checkpoint_every=200, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
