"""Searches a trained family for the member that is best within budgets, or for a front.

python -m experiments.search --workdir=runs/digits_vit --max_flops=1e6 --beyond_pool --out=found
python -m experiments.search --workdir=runs/digits_vit --method=nsga2 --costs=params --out=front
"""

from absl import flags

from nestnet import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
OUT = flags.DEFINE_string("out", None, "folder for search.json, search.md, search.png", required=True)
PARAMS = flags.DEFINE_float("max_params", None, "at most so many parameters")
FLOPS = flags.DEFINE_float("max_flops", None, "at most so many FLOPs for an image, or a window of "
                           "text")
LATENCY = flags.DEFINE_float("max_latency_ms", None, "at most so many milliseconds for one, here")
METHOD = flags.DEFINE_enum("method", "evolution", ["evolution", "nsga2", "coarse_to_fine", "random"],
                           "how to search")
COSTS = flags.DEFINE_list("costs", [], "what nsga2 weighs against accuracy: params, flops, latency_ms; "
                          "by default those with a budget, or flops")
ACCURACY = flags.DEFINE_enum("accuracy", "auto", ["auto", "predicted", "measured"], "by a predictor or "
                             "evaluating each; auto measures small families, coarse_to_fine and random")
SAMPLES = flags.DEFINE_integer("samples", 500, "random members that the predictor learns from")
POPULATION = flags.DEFINE_integer("population", 100, "members of a generation; random draws one")
GENERATIONS = flags.DEFINE_integer("generations", None, "how many; by default 500, of nsga2 40, of "
                                  "coarse_to_fine 5")
SEED = flags.DEFINE_integer("seed", 0, "of the search")
BEYOND = flags.DEFINE_bool("beyond_pool", False, "search the whole space even where only its pool "
                           "trained")


def main(argv):
  del argv
  from nestnet import search_run
  from nestnet.subnet import folded
  limits = {"params": PARAMS.value, "flops": FLOPS.value, "latency_ms": LATENCY.value}
  result = search_run.search_run(
    WORKDIR.value, OUT.value, {name: limit for name, limit in limits.items() if limit is not None},
    METHOD.value, ACCURACY.value, COSTS.value, SAMPLES.value, POPULATION.value, GENERATIONS.value, SEED.value,
    BEYOND.value)
  print(f"{search_run.table(result)}\n{search_run.summary(result)}\nnext: python -m experiments.extract "
        f"--workdir={WORKDIR.value} --subnet='{folded(result['subnet'])}' --out=...")


if __name__ == "__main__":
  cli.run(main)
