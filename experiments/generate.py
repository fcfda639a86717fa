"""Writes on from prompts with a member of a trained family, or with a network in a folder.

python -m experiments.generate --workdir=runs/stdlib_matformer --prompt='def main(' --draft=mlp=64
python -m experiments.generate --workdir=runs/stdlib_matformer --held_out=50 --batch_size=1 --draft=mlp=64
"""

from absl import flags

from nestnet import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run")
FOLDER = flags.DEFINE_string("folder", None, "or of a network by itself")
SUBNET = flags.DEFINE_string("subnet", None, "which member of the run, such as 'mlp=128'; else the largest")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to go on from; may be given several times")
PROMPTS = flags.DEFINE_string("prompts", None, "file with one prompt a line, or .json with a list of them")
HELD_OUT = flags.DEFINE_integer("held_out", None, "measure drafts on so many prompts of the run's test split")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "tokens of each of these")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "prompts that are decoded together; by default all")
NEW = flags.DEFINE_integer("max_new_tokens", 128, "at most so many tokens are added to each")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the most probable token; 1: as the network says")
TOP_K = flags.DEFINE_integer("top_k", None, "draw from so many of the most probable tokens")
TOP_P = flags.DEFINE_float("top_p", None, "draw from the fewest tokens that together have this probability")
STOP = flags.DEFINE_multi_string("stop", [], "text of a token that ends a text, beside that between "
                                 "documents; may be given several times")
DRAFT = flags.DEFINE_multi_string("draft", [], "member that drafts tokens which the network then checks; "
                                  "axes left out are the network's own. The output stays what it was; a "
                                  "report follows. May be given several times")
DRAFT_TOKENS = flags.DEFINE_multi_integer("draft_tokens", [4], "tokens that are drafted at a time; may be "
                                          "given several times")
SHARE_CACHE = flags.DEFINE_bool("share_cache", None, "whether the draft reads the network's cache; by "
                                "default where it is its leading layers")
SEED = flags.DEFINE_integer("seed", 0, "of draws")


def main(argv):
  del argv
  from nestnet import generate_run
  texts = generate_run.prompts(PROMPT.value, PROMPTS.value)
  writer = generate_run.opened(WORKDIR.value, FOLDER.value, SUBNET.value)
  written, reports = generate_run.generate_run(
    writer, texts, held_out=HELD_OUT.value, prompt_tokens=PROMPT_TOKENS.value, batch_size=BATCH_SIZE.value,
    max_new_tokens=NEW.value, temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value,
    stop=STOP.value, drafts=DRAFT.value, draft_tokens=DRAFT_TOKENS.value, share_cache=SHARE_CACHE.value,
    seed=SEED.value)
  for number, (text, new) in enumerate(zip(texts, written), 1):
    print(f"[{number}] {text}{new}" if len(texts) > 1 else text + new)
  if reports:
    print("\n" * bool(texts) + generate_run.table(reports))


if __name__ == "__main__":
  cli.run(main)
