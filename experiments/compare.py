"""Compares recipes at equal steps and at equal training FLOPs; the same command does what is missing.

python -m experiments.compare --out=runs/compare_digits --seeds=3 \
  --configs=configs/digits_vit.py:separate,configs/digits_vit.py:truncate,configs/digits_vit.py:sandwich
"""

import shlex
import sys

from absl import flags

from nestnet import cli

CONFIGS = flags.DEFINE_list("configs", None, "config files, one for each recipe, joined by ','",
                            required=True)
OUT = flags.DEFINE_string("out", None, "folder of the runs; what is done there is kept", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each kind")
BUDGETS = flags.DEFINE_list("budgets", "equal steps,equal FLOPs", "what the recipes have in "
                            "common; 'equal shares' too: of the first nested run, for each one alone")
OVERRIDE = flags.DEFINE_multi_string("override", [], "'train.steps=400', for every config; may be repeated")
DOCS = flags.DEFINE_string("docs", None, "the page to write, such as docs/results/digits.md; in --out by "
                           "default")
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time, each on its share of the cores")


def main(argv):
  del argv
  configs = [cli.load_config(spec) for spec in CONFIGS.value]
  from nestnet import compare, jobs
  for config in configs:
    for text in OVERRIDE.value:
      compare.override(config, text)
  jobs.keep_programs(f"{OUT.value}/compiled")
  command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
  tables = compare.compare(configs, SEEDS.value, OUT.value, BUDGETS.value, DOCS.value, JOBS.value, command)
  print(tables or f"stopped; the same command goes on from what stands in {OUT.value}")


if __name__ == "__main__":
  cli.run(main)
