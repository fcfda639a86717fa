"""Compiles the training step for a TPU slice that is not here: memory, collectives, time at best.

python -m experiments.plan --config=configs/digits_vit.py --topology=v5e:4x4 --mesh=data:16

Exit code 1 if a program does not fit into a chip's memory. Needs `pip install -r
requirements-plan.txt`, and no TPU.
"""

import sys

from absl import flags

from nestnet import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "chip and shape of the slice, such as v5e:4x4", required=True)
MESH = flags.DEFINE_string(
  "mesh", "", "sizes of the mesh's axes, such as data:8,model:2; by default the config's")
SUBNETS = flags.DEFINE_string(
  "subnets", "", "sub-networks joined by ';' to plan beside those of the first step")
JSON = flags.DEFINE_string("json", None, "file to write")


def main(argv):
  del argv
  from nestnet import plan
  names = [name for name in SUBNETS.value.split(";") if name.strip()]
  found = plan.plan(CONFIG.value, TOPOLOGY.value, MESH.value, names,
                    say=lambda line: print(line, file=sys.stderr, flush=True))
  print(plan.table(found))
  if JSON.value:
    plan.write(JSON.value, found)
  return 0 if plan.fits(found) else 1


if __name__ == "__main__":
  cli.run(main)
