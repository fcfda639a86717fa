"""A nested ViT-B/16 at 224 x 224 pixels on random images, to measure what nesting costs on a GPU or TPU.

    python -m experiments.bench --config=configs/bench_vit_b16.py --batch_size=128 --json=bench.json

It compares steps of one program with networks that stand alone, and says how much of the device the
largest network's step uses. Nothing is to be learned from the images: there is no accuracy to state.
"""

import ml_collections

from nestnet.recipes import recipe


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Parameters and their sums stay float32; the blocks compute in bfloat16.
  config.model = dict(name="ViT", layers=12, embed=768, heads=12, mlp=3072, patch=16, position_std=0.02,
                      dtype="bfloat16", unroll=1)
  config.space = dict(layers=(6, 8, 10, 12), embed=(384, 576, 768), heads=(6, 9, 12), mlp=(1536, 2304, 3072))
  config.recipe = recipe("sandwich")
  config.data = dict(name="nestnet.data.synthetic:ImageNet", data_dir="", augment="none")
  config.optim = dict(name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=1,
                      weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95)
  # Global batch, in images.
  config.train = dict(steps=100, batch_size=128, checkpoint_every=100, log_every=10, eval_every=0)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1)
  return config
