"""Once-for-All's MobileNetV3, 1.2 times as wide, on ImageNet at 224 x 224 pixels: progressive shrinking.

    python -m experiments.train --config=configs/imagenet_ofa_mbv3.py --workdir=runs/imagenet_ofa_mbv3

Six phases of 605 epochs in one run that resumes: the whole network; then its frozen copy teaches random
members of spaces that open kernels, depths and widths (1908.09791). It takes about 1,200 hours of V100 in
the authors' code and is not trained in this repository: there is no accuracy to state.
`experiments.train` reads images of one size, which those of TFDS's `imagenet2012` are not: name a class
of your own that gives them at 224 x 224, with `--config.data.name=my_data:ImageNet`.

Another method trains with its name as the argument: `--config=configs/imagenet_ofa_mbv3.py:bignas`.
BigNAS, AttentiveNAS and AlphaNet have networks and spaces of their own, with the widths of stages and the
side of the images, of 320 pixels in BigNAS and 288 in the others; all other methods have this space.
"""

import ml_collections

from nestnet import recipes
from nestnet.models import architecture, big_nas, mobilenet

STAGES = range(1, 6)
# Epochs of 1,281,167 images; those of AttentiveNAS are BigNAS's and AlphaNet's too.
EPOCHS = {"ofa": 605, "compofa": 330, "deps": 270}
BATCH = {"bignas": 4096}
# Networks of other methods: name, choices, sides of the images, stages from the last one with drop path.
_ATTENTIVE = "AttentiveNAS", big_nas.ATTENTIVE_NAS, (192, 224, 256, 288), 2
OWN = {"bignas": ("BigNAS", big_nas.BIG_NAS, (192, 224, 288, 320), 7), "attentive_nas": _ATTENTIVE,
       "attentive_nas_worst_up": _ATTENTIVE, "alphanet": _ATTENTIVE}


def get_config(method: str = "ofa") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  # Parameters and their sums stay float32; the blocks compute in bfloat16.
  config.model = dict(name="MobileNetV3", width=1.2, transforms=method == "ofa", dropout=0.1,
                      dtype="bfloat16")
  # Kernels of DepS are not elastic.
  choices = dict(layers=(2, 3, 4), expand=(3, 4, 6), kernel=(7,) if method == "deps" else (3, 5, 7))
  config.space = {f"{axis}_{s}": sizes for axis, sizes in choices.items() for s in STAGES}
  config.space.per_layer = tuple(f"{axis}_{s}" for axis in ("expand", "kernel") for s in STAGES)
  if method == "compofa":
    # Depth and expansion of a stage go together; kernels are not elastic.
    config.space = dict(couple={f"layers_{s} expand_{s}": ((2, 3), (3, 4), (4, 6)) for s in STAGES},
                        **{f"kernel_{s}": (7,) for s in STAGES})
  side = 224
  if method in OWN:
    name, choices, sides, stages = OWN[method]
    config.model = dict(name=name, dropout=0.2, drop_path=0.2, drop_path_stages=stages, dtype="bfloat16")
    config.space = mobilenet.space(architecture(name)(1000), **choices).to_json() | {"resolution": sides}
    side = max(sides)
  config.recipe = recipes.recipe(method)
  if several := recipes.phases(method, config.space):
    config.phases = several
  # What `experiments.plan` needs to know of the images; checked against them where they are read.
  config.data = dict(name="imagenet2012", data_dir="", augment="none", shape=(side, side, 3), classes=1000)
  # Methods that come without one take Once-for-All's.
  config.optim = recipes.optim(method if method in recipes.OPTIM else "ofa")
  # Global batch, in images.
  batch = BATCH.get(method, 2048)
  config.train = dict(steps=EPOCHS.get(method, 360) * 1_281_167 // batch, batch_size=batch,
                      checkpoint_every=1000, log_every=100, eval_every=0, execution="auto",
                      per_shard_subnets=False, accumulate=1)
  # Devices; -1 takes all that are there.
  config.mesh = dict(data=-1, fsdp=1, model=1)
  return config
