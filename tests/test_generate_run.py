"""Text written by the network in a folder, through the command line."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import runpy
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from flax.core import meta

from nestnet import Space, build, cli, errors, generate_run, runs, save
from nestnet.data.tokenization import BYTES
from nestnet.models.decoder import Decoder
from nestnet.models.vit import ViT

MODEL = Decoder(layers=2, embed=16, heads=4, kv_heads=2, mlp=16, vocab=256, context=48)
TOKENS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
PROMPT = "def é("


def zeros(module, inputs):
  shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), meta.unbox(shapes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("networks") / "bytes"
  variables = zeros(MODEL, TOKENS)
  # Blocks add nothing, and byte 100, a "d", is always the most probable.
  variables["params"]["embedding"]["embedding"][:, 0] = 1
  variables["params"]["embedding"]["embedding"][100, 0] = 2
  variables["params"]["norm"]["scale"][0] = 1
  save(folder, MODEL, variables)
  return folder


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the script in this process, as `python -m` would: its exit code, output and errors."""
  monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
  monkeypatch.chdir(pathlib.Path(__file__).resolve().parents[1])
  app.define_help_flags()

  def run(*arguments):
    before = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", ["experiments/generate.py", *map(str, arguments)])
    try:
      with pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.generate", run_name="__main__")
    finally:
      for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err

  return run


def test_prompts_go_on(command, folder, tmp_path):
  (tmp_path / "prompts.json").write_text(json.dumps(["a\nb"]))
  code, out, err = command(f"--folder={folder}", f"--prompt={PROMPT}", f"--prompts={tmp_path}/prompts.json",
                           "--max_new_tokens=4")
  assert (code, out) == (0, f"[1] {PROMPT}dddd\n[2] a\nbdddd\n"), err
  code, out, err = command(f"--folder={folder}", f"--prompt={PROMPT}", "--max_new_tokens=4", "--stop=d")
  assert (code, out) == (0, f"{PROMPT}\n"), err


@pytest.mark.parametrize("drafts, drafted, rows", [
  (("layers=1",), (4, 1), [("layers=1", "5.7k", "4", "shared", "4.00"), ("layers=1", "5.7k", "1", "shared", "2.00")]),
  pytest.param(("layers=1", "mlp=8"), (4,), [
    ("layers=1", "5.7k", "4", "shared", "4.00"), ("mlp=8", "6.5k", "4", "own", "4.00")], marks=pytest.mark.slow)])
def test_a_draft_reports(command, folder, drafts, drafted, rows):
  code, out, err = command(f"--folder={folder}", f"--prompt={PROMPT}", "--max_new_tokens=4",
                           *(f"--draft={draft}" for draft in drafts), *(f"--draft_tokens={n}" for n in drafted))
  lines = out.splitlines()
  assert code == 0 and lines[:2] == [f"{PROMPT}dddd", ""], err
  found = [dict(zip(lines[2].split(), re.split("  +", line))) for line in lines[3:3 + len(rows)]]
  columns = ("draft", "params", "drafted", "cache", "tokens/call")
  assert [tuple(row[name] for name in columns) for row in found] == rows
  for row in found:
    assert (row["accepted"], row["equal"], row["ties"], row["other"]) == ("100.0%", "1 of 1", "0", "0")


def test_rows_are_written_in_batches(command, folder, monkeypatch):
  sizes, right = [], generate_run.generate
  monkeypatch.setattr(generate_run, "generate", lambda module, variables, prompts, **options: (
    sizes.append(len(prompts)), right(module, variables, prompts, **options))[1])
  code, out, err = command(f"--folder={folder}", *(f"--prompt={c}" for c in "abc"), "--max_new_tokens=2",
                           "--batch_size=2")
  assert (code, out, sizes) == (0, "[1] add\n[2] bdd\n[3] cdd\n", [2, 1]), err


@pytest.mark.parametrize("name, value", [
  ("config.json", 100), ("generation_config.json", 100), ("generation_config.json", [999, 7, 100])])
def test_what_a_folder_names_as_an_end_ends_a_text(command, folder, tmp_path, name, value):
  shutil.copytree(folder, tmp_path / "out")
  file = tmp_path / "out" / name
  config = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(config | {"eos_token_id": value}))
  code, out, err = command(f"--folder={tmp_path}/out", f"--prompt={PROMPT}", "--max_new_tokens=4")
  assert (code, out) == (0, f"{PROMPT}\n"), err
  file.write_text(json.dumps(config | {"eos_token_id": "d"}))
  code, out, err = command(f"--folder={tmp_path}/out", f"--prompt={PROMPT}", "--max_new_tokens=4")
  assert code == 2 and f"{name}: eos_token_id='d'; allowed is a token's number" in err


def test_prompts_of_a_folder_alone_get_special_tokens():
  begun = dataclasses.replace(BYTES, encode_prompts=lambda texts: [np.array([1, *text]) for text in texts])
  of_run = generate_run.Writer(MODEL, {}, begun)
  of_folder = dataclasses.replace(of_run, special=True)
  assert (of_run.prompt("ab"), of_folder.prompt("ab")) == ([97, 98], [1, 97, 98])
  assert of_folder.stop(["b"]) == [0, 98]
  assert dataclasses.replace(of_folder, tokenizer=BYTES).prompt("ab") == [97, 98]


@pytest.mark.interop
def test_prompts_of_a_folder_are_those_of_transformers(folder, tmp_path, monkeypatch):
  import tokenizers
  import transformers
  from tokenizers import models, pre_tokenizers, processors

  shutil.copytree(folder, tmp_path / "out")
  made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "ab": 5, "c": 6}, unk_token="c"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  made.save(str(tmp_path / "out" / "tokenizer.json"))
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
  seen = []
  monkeypatch.setattr(generate_run, "generate", lambda module, variables, prompts, **options: (
    seen.extend(prompts), [[1] for _ in prompts])[1])
  assert generate_run.generate_run(generate_run.opened(folder=tmp_path / "out"), ["c ab", ""])[0] == ["", ""]
  assert seen == [theirs(text)["input_ids"] for text in ("c ab", "")] == [[0, 6, 5], [0]]


@pytest.mark.parametrize("arguments, words", [
  ([], ["no prompts", "--prompts=FILE"]),
  (["--prompt="], ["prompt 1 is empty"]),
  (["--prompt=" + 40 * "x", "--max_new_tokens=9"], ["prompt 1 has 40 tokens", "48", "context"]),
  (["--prompt=x", "--draft=layers=3"], ["draft layers=3 is larger than the target"]),
  (["--prompt=x", "--draft=layer=1"], ["'layer'", "did you mean 'layers'"]),
  (["--prompt=x", "--draft=layers=1", "--draft_tokens=0"], ["draft_tokens: got 0"]),
  (["--prompt=x", "--draft=layers=1", "--draft_tokens=two"], ["draft_tokens", "two"]),
  (["--prompt=x", "--batch_size=0"], ["batch_size: got 0"]),
  (["--held_out=2"], ["--held_out=2 measures drafts", "--draft=SPEC"]),
  (["--held_out=2", "--draft=layers=1"], ["--held_out=2 is of a run, --workdir"]),
  (["--held_out=two"], ["held_out", "two"]),
  (["--prompt=x", "--draft=layers=1", "--draft=layers=3"], ["draft layers=3 is larger than the target"]),
  (["--prompt=x", "--temperature=-1"], ["temperature: got -1"]),
  (["--prompt=x", "--top_p=2"], ["top_p: got 2"]),
  (["--prompt=x", "--stop=ab"], ["stop: 'ab' is 2 tokens"]),
  (["--prompt=x", "--subnet=mlp=8"], ["--subnet=mlp=8 is of a run"]),
  (["--prompt=x", "--workdir=there"], ["either a run or a network"]),
  (["--prompt=x", "--promt=y"], ["unknown flag '--promt'; did you mean '--prompt'"]),
  (["--prompts=none.txt"], ["no file none.txt"]),
])
def test_what_is_wrong_is_said(command, folder, arguments, words):
  code, out, err = command(f"--folder={folder}", *arguments)
  assert code == 2 and not out and err.startswith("generate: ") and err.count("\n") == 1, err
  for word in words:
    assert word in err


def test_only_what_writes_text_is_opened(tmp_path, folder):
  with pytest.raises(errors.UserError, match="no extracted network"):
    generate_run.opened(folder=tmp_path / "none")
  vit = ViT(layers=1, embed=8, heads=2, mlp=8, classes=2)
  save(tmp_path / "vit", vit, zeros(vit, jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)))
  with pytest.raises(errors.UserError, match="holds a ViT; allowed is a Decoder"):
    generate_run.opened(folder=tmp_path / "vit")
  words = MODEL.clone(vocab=300)
  save(tmp_path / "words", words, zeros(words, TOKENS))
  with pytest.raises(errors.UserError, match=r"300 tokens, the tokenizer \(bytes\) 256"):
    generate_run.opened(folder=tmp_path / "words")
  with pytest.raises(errors.UserError, match="allowed is a list of texts"):
    (tmp_path / "prompts.json").write_text("[1]")
    generate_run.prompts([], tmp_path / "prompts.json")


@pytest.mark.slow
def test_a_member_of_a_run_writes_and_another_drafts(command, tmp_path):
  config = cli.load_config("configs/stdlib_matformer.py")
  with config.unlocked():
    config.model.update(layers=2, embed=16, heads=4, kv_heads=2, mlp=32)
    config.space.mlp = (8, 16, 32)
    config.data.length = 32
    config.train.update(steps=2, batch_size=2, log_every=1)
    config.optim.warmup_steps = 1
    config.eval.examples = 4
  assert runs.train(config, tmp_path / "run", show_progress=False)
  write = functools.partial(command, f"--workdir={tmp_path}/run", f"--prompt={PROMPT}", "--max_new_tokens=9",
                            "--stop=\n")
  writer = generate_run.opened(tmp_path / "run")
  assert writer.held_out(3, 8) == build.data_of(config).split("test").stretches(3, 8).tolist()
  alone = write("--subnet=mlp=16")
  assert alone[0] == 0 and alone[1].startswith(PROMPT), alone[2]
  code, out, err = write("--subnet=mlp=16", "--draft=mlp=8")
  assert code == 0 and out.startswith(alone[1]) and "1 of 1 " in out, err
  code, out, err = write("--subnet=mlp=16", "--draft=largest")
  assert code == 2 and "larger than the target" in err
  held = functools.partial(command, f"--workdir={tmp_path}/run", "--max_new_tokens=9", "--prompt_tokens=8",
                           "--draft=smallest")
  code, out, err = held("--held_out=3", "--batch_size=1")
  assert code == 0 and out.startswith("draft ") and "3 of 3" in out, err
  code, out, err = held("--held_out=1000000")
  assert code == 2 and "stdlib_text/test has" in err and err.count("\n") == 1


def test_a_draft_of_a_run_is_named_as_its_space_names_it():
  space = Space(layers=(2, 3, 4), mlp=(8, 16, 32), heads=(4,))
  of = lambda target: generate_run.Writer(None, {}, BYTES, space.subnet(target), space)
  # What is left out is as large as the target, and layers are counted among its own.
  assert str(of("layers=3,mlp=16").draft("layers=2")) == "layers=2,mlp=16,heads=4"
  assert str(of("layers=0+2+3,mlp=16").draft("layers=0+3")) == "layers=0+2,mlp=16,heads=4"
  assert str(of("mlp=8:16:16:32").draft("mlp=8")) == "layers=4,mlp=8,heads=4"
  assert str(of("largest").draft("smallest")) == "layers=2,mlp=8,heads=4"
  with pytest.raises(errors.UserError, match="mlp=32.* is larger than the target layers=3,mlp=16"):
    of("layers=3,mlp=16").draft("mlp=32")
  with pytest.raises(errors.UserError, match="mlp=9 is outside the space"):
    of("largest").draft("mlp=9")
