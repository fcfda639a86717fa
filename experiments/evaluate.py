"""Evaluates sub-networks of a run.

python -m experiments.evaluate --workdir=runs/digits_vit --subnets='layers=2,embed=32;layers=0+3'
python -m experiments.evaluate --workdir=runs/truncate --subnets='mlp=64;mlp=128' --sort_by=activation
python -m experiments.evaluate --workdir=runs/truncate --subnets='layers=3' --rank_layers
python -m experiments.evaluate --workdir=runs/text --against=runs/text
"""

from absl import flags

from nestnet import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
SUBNETS = flags.DEFINE_string("subnets", "", "sub-networks joined by ';', such as 'smallest;layers=2', with "
                              "the largest of what is left out; the space or a sample of it by default")
BATCHES = flags.DEFINE_list("calibration_batches", [], "instead, accuracy by the number of batches that "
                            "calibrate, such as 0,1,4,16: of the smallest sub-network, or of --subnets")
SORT = flags.DEFINE_enum("sort_by", None, ["activation", "l1", "l2"], "put the most important units first "
                         "before sub-networks are cut: by their mean size on training batches, or by the "
                         "weights that read them; the run stays as it is")
RANK = flags.DEFINE_bool("rank_layers", False, "where a sub-network has so many layers, keep those that change "
                         "most what they are given, not the first; the table names them")
SORT_BATCHES = flags.DEFINE_integer("sort_batches", 8, "training batches for --sort_by=activation and "
                                    "--rank_layers")
AGAINST = flags.DEFINE_string("against", None, "folder of a run of text, this one or another: how often each "
                              "sub-network and its largest network find the same next token most probable, "
                              "and their KL divergence in nats")


def main(argv):
  del argv
  from nestnet import against, evaluation, importance, report, runs
  from nestnet.subnet import folded
  run, step, state = runs.opened(WORKDIR.value)
  space, few = run.supernet.space, BATCHES.value
  texts = [text for text in SUBNETS.value.split(";") if text.strip()]
  members = [space.subnet(text) for text in texts] or (
    [space.smallest] if few else evaluation.evaluated(run))
  other = against.largest(AGAINST.value, run) if AGAINST.value else None
  if RANK.value:
    members = importance.with_ranked_layers(run.step, state, members, run.batches, SORT_BATCHES.value)
  if SORT.value:
    state = importance.sorted_for(run.step, state, members, run.batches, SORT.value, SORT_BATCHES.value)
  if few:
    for member in members:
      rows = evaluation.by_calibration(run, state, member, few)
      print(f"{folded(member)}\n{evaluation.calibration_table(rows)}")
    return
  rows = evaluation.evaluate(run, state, members, show_progress=True)
  if other:
    beside = against.compared(run, state, members, other, show_progress=True)
    rows = [row | own for row, own in zip(rows, beside)]
  print(report.table(evaluation.shown(rows)))
  order = f", units sorted by {SORT.value}" if SORT.value else ""
  print(f"{evaluation.counted(space, members)}, at step {step} of {run.steps}{order}")
  if not (texts or SORT.value or RANK.value or other):
    report.write_rows(f"{WORKDIR.value}/subnets.json", rows)


if __name__ == "__main__":
  cli.run(main)
