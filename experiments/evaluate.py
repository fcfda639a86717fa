"""Evaluates sub-networks of a run.

python -m experiments.evaluate --workdir=runs/digits_vit --subnets='layers=2,embed=32;layers=0+3'
"""

from absl import flags

from nestnet import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
SUBNETS = flags.DEFINE_string("subnets", "", "sub-networks joined by ';', such as 'smallest;layers=2', with "
                              "the largest of what is left out; the space or a sample of it by default")
BATCHES = flags.DEFINE_list("calibration_batches", [], "instead, accuracy by the number of batches that "
                            "calibrate, such as 0,1,4,16: of the smallest sub-network, or of --subnets")


def main(argv):
  del argv
  from nestnet import evaluation, report, runs
  from nestnet.subnet import folded
  run, step, state = runs.opened(WORKDIR.value)
  space = run.supernet.space
  texts = [text for text in SUBNETS.value.split(";") if text.strip()]
  if BATCHES.value:
    for member in [space.subnet(text) for text in texts] or [space.smallest]:
      rows = evaluation.by_calibration(run, state, member, BATCHES.value)
      print(f"{folded(member)}\n{evaluation.calibration_table(rows)}")
    return
  members = [space.subnet(text) for text in texts] or evaluation.evaluated(run)
  rows = evaluation.evaluate(run, state, members, show_progress=True)
  print(report.table(evaluation.shown(rows)))
  print(f"{len(rows)} of {space.size} sub-networks, at step {step} of {run.steps}")
  if not texts:
    report.write_rows(f"{WORKDIR.value}/subnets.json", rows)


if __name__ == "__main__":
  cli.run(main)
