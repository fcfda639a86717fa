"""Measures what nesting costs against networks of the same size that stand alone.

python -m experiments.bench --config=configs/digits_vit.py
"""

import os
import sys

from absl import flags

from nestnet import cli

CONFIG = cli.define_config("configs/digits_vit.py")
JSON = flags.DEFINE_string("json", None, "file to write")
BATCH = flags.DEFINE_integer("batch_size", 0, "in images; by default the config's, doubled until the "
                             "smallest network's step takes 50 ms")
PAIRS = flags.DEFINE_integer("pairs", 20, "measured pairs for each ratio")
ONLY = flags.DEFINE_list("only", [], "what to measure, of slices, one_program, sandwich, compilation, "
                         "memory, utilisation; by default all")
PEER = flags.DEFINE_string("peer", "", "torch: also against eager PyTorch that slices its weights")


def main(argv):
  del argv
  if PEER.value:
    # By default JAX takes most of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from nestnet import bench, bench_table
  found = bench.bench(CONFIG.value, BATCH.value, PAIRS.value, ONLY.value, PEER.value,
                      say=lambda line: print(line, file=sys.stderr, flush=True))
  print(bench_table.table(found))
  if JSON.value:
    bench_table.write(JSON.value, found)


if __name__ == "__main__":
  cli.run(main)
