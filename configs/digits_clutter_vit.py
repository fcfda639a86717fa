"""A nested vision transformer on cluttered digits, 12 x 12 pixels, a task on which size matters.

    python -m experiments.train --config=configs/digits_clutter_vit.py --workdir=runs/digits_clutter_vit

Another method trains with its name as the argument: `--config=configs/digits_clutter_vit.py:sorted`.
"""

import ml_collections

from nestnet.recipes import phases, recipe

# Matryoshka methods nest the features of one size, a network of a third of the cost.
FEATURES = (3, 6, 12, 48)


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="ViT", layers=4, embed=64, heads=4, mlp=256, patch=3, position_std=1.0,
                      unroll=4)
  config.space = dict(
    layers=(2, 3, 4), embed=(32, 48, 64), heads=(2, 3, 4), mlp=(32, 64, 128, 256),
    # What trains. The table shows a sample of the space.
    pool=("layers=2,embed=32,heads=2,mlp=32", "layers=3,embed=32,heads=2,mlp=128",
          "layers=3,embed=48,heads=3,mlp=128", "layers=4,embed=64,heads=4,mlp=256"))
  if method.startswith("matryoshka"):
    config.model.update(layers=3, embed=48, heads=3, mlp=128, features=48)
    config.space = dict(features=FEATURES)
    # Its baseline, FF-k: networks trained alone whose classifier reads the first k features.
    alone = method == "matryoshka_separate"
    config.recipe = recipe("separate") if alone else recipe(method, sizes=FEATURES)
  else:
    config.recipe = recipe(method)
    if method == "sandwich":
      # Labels, and the teacher at half weight; in the papers students learn from it alone: 0.0 and 1.0.
      config.recipe["objective"].update(student_labels=1.0, distillation=0.5)
    if several := phases(method, config.space):
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
