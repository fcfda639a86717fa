"""Measures what slicing costs against networks of the same size that stand alone.

python -m experiments.bench --config=configs/digits_vit.py
"""

from absl import flags

from nestnet import cli

CONFIG = cli.define_config("configs/digits_vit.py")
JSON = flags.DEFINE_string("json", None, "file to write")
BATCH = flags.DEFINE_integer("batch_size", 0, "in images; by default the config's, doubled until the "
                             "smallest network's step takes 50 ms")
PAIRS = flags.DEFINE_integer("pairs", 20, "measured pairs for each ratio")


def main(argv):
  del argv
  from nestnet import bench
  found = bench.bench(CONFIG.value, BATCH.value, PAIRS.value)
  print(bench.table(found))
  if JSON.value:
    bench.write(JSON.value, found)


if __name__ == "__main__":
  cli.run(main)
