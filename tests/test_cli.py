"""Mistakes on the command line give one message and exit code 2; bugs keep their traceback."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from nestnet import cli
from nestnet import errors
from nestnet import options
from nestnet.sharding import MESH_AXES

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = '''
from absl import flags, logging
from nestnet import cli, errors
CONFIG = cli.define_config(DEFAULT)
WORKDIR = flags.DEFINE_string("workdir", None, "folder", required=True)
def main(_):
  import sys, warnings
  logging.info("chatter")
  warnings.warn("beware")
  print(CONFIG.value.model.embed, CONFIG.value.name, "jax" in sys.modules)
  if WORKDIR.value == "user": raise errors.MissingFileError("no checkpoint in user")
  if WORKDIR.value == "bug": raise ValueError("deep")
  if WORKDIR.value == "stop": raise KeyboardInterrupt
  return 75 if WORKDIR.value == "code" else None
if __name__ == "__main__":
  cli.run(main)
'''
CONFIG = '''
import ml_collections
def get_config(name="plain"):
  return ml_collections.ConfigDict({"name": name, "model": {"embed": 8}, "train": {"steps": 3}})
'''


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "good.py").write_text(CONFIG)
  (tmp_path / "script.py").write_text(SCRIPT.replace("DEFAULT", "None"))
  (tmp_path / "defaulted.py").write_text(SCRIPT.replace("DEFAULT", "'good.py:default'"))
  return tmp_path


def launch(folder, *arguments, script="script.py"):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, script, *arguments], cwd=folder, env=environment,
                        capture_output=True, text=True, timeout=60)
  return done.returncode, done.stdout, done.stderr


def test_overrides_argument_and_quiet_logging(folder):
  code, out, err = launch(folder, "--config=good.py:large", "--config.model.embed", "16",
                          "--workdir=d")
  assert (code, out) == (0, "16 large False\n")
  assert err == "UserWarning: beware\n"


def test_verbosity_flag_and_default_config(folder):
  code, out, err = launch(folder, "--workdir=d", "--config.model.embed=4", "--verbosity=0",
                          script="defaulted.py")
  assert (code, out) == (0, "4 default False\n")
  assert "chatter" in err


@pytest.mark.parametrize("arguments, words", [
    (["--workdir=d"], ["--config", "required"]),
    (["--workdir=d", "--config.model.embed=3"], ["--config", "required"]),
    (["--config=good.py"], ["--workdir", "required"]),
    (["--config=good.py", "--wrkdir=d"], ["'--wrkdir'", "did you mean '--workdir'"]),
    (["--config=god.py", "--workdir=d"], ["'god.py'", "did you mean 'good.py'"]),
    (["--config=good.py", "--workdir=d", "more"], ["'more'", "--name=value"]),
    (["--config=good.py", "--workdir=d", "--config.modle.embed=3"],
     ["'modle'", "did you mean 'model'", "Allowed: model, name, train"]),
    (["--config=good.py", "--workdir=d", "--config.train.steps=abc"], ["train.steps", "int"]),
    (["--config=good.py", "--workdir=user"], ["no checkpoint in user"]),
])
def test_user_mistakes(folder, arguments, words):
  code, _, err = launch(folder, *arguments)
  message = err.removeprefix("UserWarning: beware\n")
  assert code == 2
  assert message.count("\n") == 1 and "Traceback" not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize("workdir, code, last", [
    ("bug", 1, "ValueError: deep"), ("stop", 130, "script: interrupted"),
    ("code", 75, "UserWarning: beware")])
def test_other_ends(folder, workdir, code, last):
  found, _, err = launch(folder, "--config=good.py", f"--workdir={workdir}")
  assert found == code
  assert err.splitlines()[-1] == last
  assert ("Traceback" in err) == (workdir == "bug")


def config():
  return ml_collections.ConfigDict({
      "seed": 0, "rate": 0.1, "flag": True, "name": "a", "sizes": (1, 2), "names": ("a",),
      "optional": ml_collections.config_dict.placeholder(int), "model": {"embed": 8}})


@pytest.mark.parametrize("key, value", [
    ("seed", "3"), ("rate", "1e-3"), ("rate", "1"), ("flag", "false"), ("name", "5"),
    ("sizes", "3,4,5"), ("sizes", "(3,)"), ("sizes", "3"), ("names", "b"), ("optional", "3"),
    ("model.embed", "4"), ("model", "{'embed': 2}")])
def test_valid_overrides(key, value):
  cli.check_override(config(), key, value)


@pytest.mark.parametrize("key, value, words", [
    ("seed", "1.5", ["seed", "'1.5'", "int"]), ("rate", "x", ["rate", "float"]),
    ("flag", "maybe", ["flag", "bool"]), ("sizes", "3,x", ["sizes", "tuple"]),
    ("sizes", "1.5,2", ["sizes", "(1, 2)"]), ("optional", "x", ["optional", "int"]),
    ("model", "3", ["group", "--config.model.embed"]), ("seed.x", "1", ["'seed'", "no group"]),
    ("model.embd", "1", ["config.model 'embd'", "did you mean 'embed'"]),
    ("sizes[0]", "1", ["sizes[0]", "dots"]), ("phases[0].share", "1", ["phases[0].share", "0 phases"])])
def test_invalid_overrides(key, value, words):
  with pytest.raises(errors.UserError) as caught:
    cli.check_override(config(), key, value)
  for word in words:
    assert word in str(caught.value)


METHOD = '''
import ml_collections
def get_config(name="ofa"):
  return ml_collections.ConfigDict({
    "model": {"name": "SmallMobileNet"}, "space": {"layers_1": (1, 2)}, "optim": {"learning_rate": 0.1},
    "recipe": {"name": name, "sampler": {"n": 1}}, "train": {"steps": 3},
    "phases": [{"share": 2, "optim": {"factor": 0.5}}, {"share": 1}]})
'''


@pytest.fixture
def overridden(tmp_path, monkeypatch):
  """The config of a method as a command line gives it."""
  (tmp_path / "method.py").write_text(METHOD)

  def parse(*arguments):
    values = flags.FlagValues()
    argv = ["script", f"--config={tmp_path}/method.py", *arguments]
    monkeypatch.setattr("sys.argv", argv)
    config_flags.DEFINE_config_file("config", flag_values=values)
    values["config"].parser = cli._ConfigParser(None)
    values(argv)
    return values["config"].value
  return parse


@pytest.mark.parametrize("argument, path, value", [
  ("eval.calibrate_images=100", ["eval", "calibrate_images"], 100),
  ("train.accumulate=2", ["train", "accumulate"], 2), ("optim.coupled", ["optim", "coupled"], True),
  ("model.width=2", ["model", "width"], 2.0), ("model.embed_1=16", ["model", "embed_1"], 16),
  ("model.dtype=bfloat16", ["model", "dtype"], "bfloat16"),
  ("model.squeeze=(True,False)", ["model", "squeeze"], (True, False)),
  ("space.resolution=(8,12)", ["space", "resolution"], (8, 12)), ("space.pool=()", ["space", "pool"], ()),
  ("phases=()", ["phases"], ()), ("phases[0].share=3", ["phases", 0, "share"], 3),
  ("phases[1].steps=4", ["phases", 1, "steps"], 4),
  ("phases[1].optim.factor=1", ["phases", 1, "optim", "factor"], 1.0),
  ("phases[0].recipe.sampler.n=4", ["phases", 0, "recipe", "sampler", "n"], 4),
  ("recipe.name=ofa", ["recipe", "name"], "ofa")])
def test_what_the_file_does_not_list_can_be_overridden(overridden, argument, path, value):
  """With the type that it has in the model, in the phase's config or by itself."""
  before, after = overridden(), overridden(f"--config.{argument}")
  found = functools.reduce(operator.getitem, path, after)
  assert found == value and type(found) is type(value)
  if path[:2] != ["phases", 1] and len(path) > 1:
    assert [p.share for p in after.phases] == [3 if "share" in path else 2, 1]
  assert len(before.phases) == 2 and "eval" not in before


@pytest.mark.parametrize("argument, words", [
  ("eval.calibrate=100", ["config.eval 'calibrate'", "did you mean 'calibrate_images'"]),
  ("model.widht=2", ["config.model 'widht'", "did you mean 'width'", "name, classes"]),
  ("model.width=wide", ["model.width", "'wide'", "float"]), ("space.widht=(1,2)", ["did you mean 'width'"]),
  ("phases[2].share=1", ["phases[2].share", "2 phases"]),
  ("phases[0]=3", ["phases[0]", "phases[0].share"]),
  ("phases[0].shre=1", ["config.phases[0] 'shre'", "did you mean 'share'", "steps, enter, open"]),
  ("phases[0].optim.facto=1", ["config.phases[0].optim 'facto'", "did you mean 'factor'"]),
  ("phases=3", ["phases", "'3'", "tuple"]),
  ("phases=() phases[0].share=3", ["'phases' and 'phases[0].share'"]),
  ("recipe.name=bignas", ["'bignas'", "'ofa'", "FILE.py:METHOD"])])
def test_what_no_config_has_is_refused(overridden, argument, words):
  with pytest.raises(flags.Error) as caught:
    overridden(*(f"--config.{each}" for each in argument.split()))
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize("text, spec, words", [
    ("x = 1\ny = 1 / 0\n", "", ["line 2", "ZeroDivisionError"]),
    ("def get_config(:\n", "", ["line 1", "SyntaxError"]),
    ("import no_such_module\n", "", ["line 1", "no_such_module"]),
    ("x = 1\n", "", ["get_config"]),
    ("def get_config():\n  return 3\n", "", ["int", "ConfigDict"]),
    ("def get_config():\n  pass\n", ":big", ["no argument", "'big'"]),
    ("def get_config(name):\n  pass\n", "", ["needs an argument", ":ARGUMENT"]),
    ("def get_config(name):\n  return {'a': 1}[name]\n", ":big", ["line 2", "KeyError: 'big'"]),
])
def test_config_files_that_fail(tmp_path, text, spec, words):
  path = tmp_path / "bad.py"
  path.write_text(text)
  with pytest.raises(errors.UserError) as caught:
    cli.load_config(f"{path}{spec}")
  for word in ["bad.py", *words]:
    assert word in str(caught.value)


def test_missing_config_file_is_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.py"):
    cli.load_config(str(tmp_path / "none.py"))


def test_check_fields_reads_a_dataclass():
  @dataclasses.dataclass
  class Net:
    embed: int = 1
    name: str = ""
    derived: int = dataclasses.field(default=0, init=False)

  cli.check_fields({"embed": 3}, Net)
  for key in ("name", "derived", "embde"):
    with pytest.raises(ValueError, match=f"config.model '{key}'.*Allowed: embed$"):
      cli.check_fields({key: 3}, Net)


def test_the_axes_of_the_mesh_are_all_there():
  assert tuple(options.GROUPS["mesh"]) == MESH_AXES


def test_one_of_lists_all_and_suggests_only_close_names():
  assert str(errors.one_of("axis", "zzz", ["b", "a"])) == "unknown axis 'zzz'. Allowed: b, a"
  assert "did you mean 'layers'?" in str(errors.one_of("axis", "layer", ["layers", "embed"]))
