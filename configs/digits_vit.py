"""A nested vision transformer on scikit-learn's digits, 8 x 8 pixels.

    python -m experiments.train --config=configs/digits_vit.py --workdir=runs/digits_vit

Prints a table of 36 sub-networks after 2 to 4 minutes, installation included (2 cores of an AMD EPYC,
jax 0.10.2, seed 0): the largest reaches 97.8% to 98.3% of 360 test digits, from machine to machine, the
smallest (an eleventh of its parameters) 96.7%. Against networks trained alone: docs/results/digits.md.

Another method trains with its name as the argument: `--config=configs/digits_vit.py:matformer_sampled`.
"""

import ml_collections

from nestnet.recipes import phases, recipe


def get_config(method: str = "sandwich") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="ViT", layers=4, embed=64, heads=4, mlp=256, patch=2, position_std=1.0,
                      unroll=4)
  config.space = dict(
    layers=(2, 3, 4), embed=(32, 48, 64), heads=(2, 4), mlp=(64, 256),
    # What trains. Every member of the space is evaluated.
    pool=("layers=2,embed=32,heads=2,mlp=64", "layers=3,embed=32,heads=4,mlp=256",
          "layers=2,embed=64,heads=2,mlp=256", "layers=3,embed=48,heads=2,mlp=64",
          "layers=4,embed=48,heads=4,mlp=256", "layers=4,embed=64,heads=4,mlp=256"))
  if method.startswith("matryoshka"):
    config.model.features = 64
    config.space = dict(features=(4, 8, 16, 32, 64))
    # Its baseline, FF-k: networks trained alone whose classifier reads the first k features.
    alone = method == "matryoshka_separate"
    config.recipe = recipe("separate") if alone else recipe(method, sizes=(4, 8, 16, 32, 64))
  else:
    config.recipe = recipe(method)
    if method == "sandwich":
      # Labels, and the teacher at half weight; in the papers students learn from it alone: 0.0 and 1.0.
      config.recipe["objective"].update(student_labels=1.0, distillation=0.5)
    if several := phases(method, config.space):
      config.phases = several
  config.data = dict(name="digits", data_dir="", augment="digits")
  config.optim = dict(name="adamw", learning_rate=4e-3, schedule="cosine", warmup_steps=50,
                      weight_decay=0.05, clip_norm=1.0, b1=0.9, b2=0.99)
  # Global batch, in images; the last step is always saved.
  config.train = dict(steps=1000, batch_size=128, checkpoint_every=400, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
