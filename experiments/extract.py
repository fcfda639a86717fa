"""Writes one member of a trained family as an ordinary network, and verifies it.

python -m experiments.extract --workdir=runs/digits_vit --max_params=50000 --out=small
"""

from absl import flags

from nestnet import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
OUT = flags.DEFINE_string("out", None, "folder to write; an extracted network there is replaced",
                          required=True)
SUBNET = flags.DEFINE_string("subnet", None, "which one, such as 'layers=2,embed=32', smallest or largest; "
                             "or give a budget")
PARAMS = flags.DEFINE_float("max_params", None, "at most so many parameters")
FLOPS = flags.DEFINE_float("max_flops", None, "at most so many FLOPs for an image, or a window of "
                           "text")
LATENCY = flags.DEFINE_float("max_latency_ms", None, "at most so many milliseconds for one, here")
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors"], "what to write")


def main(argv):
  del argv
  from nestnet import evaluation, extraction, report
  row, difference = extraction.extract_run(
    WORKDIR.value, OUT.value, SUBNET.value, PARAMS.value, FLOPS.value, LATENCY.value)
  print(report.table(evaluation.shown([row])))
  print(f"written: {OUT.value}\nlargest difference from the slice in place: {difference:.3g}")


if __name__ == "__main__":
  cli.run(main)
