"""Trains a nested family, evaluates its members and draws them.

python -m experiments.train --config=configs/digits_vit.py --workdir=runs/digits_vit
"""

from absl import flags

from nestnet import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run that stands there goes on",
                              required=True)


def main(argv):
  del argv
  from nestnet import evaluation, report, runs
  if not runs.train(CONFIG.value, WORKDIR.value):
    print(f"stopped; the same command goes on from the checkpoint in {WORKDIR.value}")
    return
  rows = report.read_rows(f"{WORKDIR.value}/subnets.json")
  print(report.table(evaluation.shown(rows)))
  print(evaluation.budget_text(rows[0]))
  print(f"written: {WORKDIR.value}/subnets.json, {WORKDIR.value}/pareto.png")


if __name__ == "__main__":
  cli.run(main)
