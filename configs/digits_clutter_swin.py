"""A nested Swin transformer on cluttered digits, 12 x 12 pixels: one width for all stages, and their depths.

    python -m experiments.train --config=configs/digits_clutter_swin.py --workdir=runs/digits_clutter_swin

Patches of 2 x 2 pixels make a stage of 6 x 6 positions, four windows of 3 x 3, and one of 3 x 3, a single
window. Which layers shift their windows is theirs: a member of other layers has other shifts.
Another method trains with its name as the argument: `--config=configs/digits_clutter_swin.py:sorted`.
"""

import ml_collections

from nestnet import recipes


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="Swin", embed=48, layers_1=2, layers_2=4, multiples=(1, 2), head_dim=8, window=3,
                      patch=2, unroll=4)
  config.space = dict(
    embed=(16, 32, 48), layers_1=(1, 2), layers_2=(1, 2, 4),
    # What trains. The table shows the space.
    pool=("layers_1=1,layers_2=1,embed=16", "layers_1=2,layers_2=2,embed=16", "layers_1=2,layers_2=2,embed=32",
          "layers_1=2,layers_2=4,embed=48"))
  config.recipe = recipes.recipe(method)
  if method == "sandwich":
    # Labels, and the teacher at half weight; in the papers students learn from it alone: 0.0 and 1.0.
    config.recipe["objective"].update(student_labels=1.0, distillation=0.5)
  if several := recipes.phases(method, config.space):
    config.phases = several
  config.data = dict(name="digits_clutter", data_dir="", augment="none")
  config.optim = dict(name="adamw", learning_rate=4e-3, schedule="cosine", warmup_steps=50,
                      weight_decay=0.05, clip_norm=1.0, b1=0.9, b2=0.99)
  # Global batch, in images; the last step is always saved.
  config.train = dict(steps=2000, batch_size=128, checkpoint_every=500, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
