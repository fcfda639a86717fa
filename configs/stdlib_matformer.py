"""A nested decoder on the source code of Python's standard library, byte by byte.

    python -m experiments.train --config=configs/stdlib_matformer.py --workdir=runs/stdlib_matformer

Prints a table of the four granularities of MatFormer (1/8, 1/4, 1/2 and all of the MLP) with bits per byte on
held-out files, and of three mixtures of neighbouring ones that never trained (Mix'n'Match). Any other:

    python -m experiments.evaluate --workdir=runs/stdlib_matformer --subnets='mlp=64:64:64:64:64:64:128:128'

Another method trains with its name as the argument: `--config=configs/stdlib_matformer.py:matformer_joint`;
or `sorted`, `sandwich`, `separate`, `truncate`. With `soft` and `layerskip` the sizes are depths, and every
second layer is an exit of one forward pass. Methods side by side, 3 seeds, at a fifth of the steps and half the
batch: docs/results/stdlib_matformer.md, where its command stands.
"""

import ml_collections

from nestnet.errors import one_of
from nestnet.recipes import phases, recipe

METHODS = ("separate", "truncate", "sandwich", "sorted", "matformer_joint", "matformer_sampled", "soft",
           "layerskip")
LAYERS, EMBED, MLP = 8, 128, 512


def get_config(method: str = "matformer_sampled") -> ml_collections.ConfigDict:
  if method not in METHODS:
    raise one_of("method of stdlib_matformer", method, METHODS)
  config = ml_collections.ConfigDict()
  config.seed = 0
  # 2.0 million parameters, 33 thousand of them in the embedding of 256 bytes.
  config.model = dict(name="Decoder", layers=LAYERS, embed=EMBED, heads=4, kv_heads=2, mlp=MLP, context=256)
  config.space = dict(mlp=(MLP // 8, MLP // 4, MLP // 2, MLP))
  if method in ("soft", "layerskip"):
    config.space = dict(layers=(LAYERS // 4, LAYERS // 2, LAYERS * 3 // 4, LAYERS))
    config.recipe = recipe(method, depths=config.space["layers"])
    config.model["layer_dropout"] = 0.1 * (method == "layerskip")
    if method == "layerskip":
      # One exit a step beside the deepest: of the four here, where the paper's has one behind every layer.
      config.recipe["objective"]["interval"] = len(config.space["layers"])
  else:
    config.recipe = recipe(method) | {"objective": dict(
      name="language_modelling", student_labels=0.0, distillation=1.0, temperature=1.0, divergence="forward",
      delay=0, ramp=0)}
  if method == "sandwich":
    # The text, and the teacher at half weight.
    config.recipe["objective"].update(student_labels=1.0, distillation=0.5)
  if several := phases(method, config.space):
    config.phases = several
  # Bytes that a network is given at once; those of a document end with the byte 0.
  config.data = dict(name="stdlib_text", data_dir="", length=256, tokenizer="")
  config.optim = dict(name="adamw", learning_rate=3e-3, schedule="cosine", warmup_steps=100, weight_decay=0.1,
                      clip_norm=1.0, b1=0.9, b2=0.95)
  # Global batch, in windows; the last step is always saved.
  config.train = dict(steps=1000, batch_size=16, checkpoint_every=200, log_every=10, eval_every=0,
                      execution="auto", per_shard_subnets=False, accumulate=1)
  # Of each held-out split so many windows are evaluated, the same for all, spread over all its files.
  config.eval = dict(examples=512)
  if "mlp" in config.space:
    # Mixtures of neighbouring sizes are shown too.
    config.eval.mix = "mlp"
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=1, fsdp=1, model=1)
  return config
