"""Trains a nested family, evaluates its members and draws them.

python -m experiments.train --config=configs/digits_vit.py --workdir=runs/digits_vit

With several processes the same command runs on each host; `tpu/` has scripts that do so.
"""

from absl import flags

from nestnet import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; a run that stands there goes on",
                              required=True)
PROCESSES = flags.DEFINE_string(
  "processes", "1", "how many processes train together; 'auto': as a TPU pod, GKE or Slurm says")
PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0; not with 'auto'")
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT for process 0 to listen on; not with 'auto'")


def main(argv):
  del argv
  from nestnet import supervision
  place = supervision.place(PROCESSES.value, PROCESS.value, COORDINATOR.value)
  if place is None:
    return train(None)
  return supervision.supervised(lambda: train(place), place)


def train(place):
  from nestnet import evaluation, processes, references, report, runs
  with processes.joined(place):
    finished = runs.train(CONFIG.value, WORKDIR.value)
    if not processes.first():
      return
    if not finished:
      print(f"stopped; the same command goes on from the checkpoint in {WORKDIR.value}")
      return
    rows = report.read_rows(f"{WORKDIR.value}/subnets.json")
    print(report.table(evaluation.shown(rows)))
    if beside := references.written(WORKDIR.value):
      print(f"without training:\n{beside}")
    print(evaluation.budget_text(rows[0]))
    print(f"written: {WORKDIR.value}/subnets.json, {WORKDIR.value}/pareto.png")


if __name__ == "__main__":
  cli.run(main)
