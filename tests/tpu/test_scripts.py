"""The launchers: what they would run, how a worker answers for its end, and that shellcheck is content."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("tpu/*.sh"))
FLAGS = ["--config=configs/digits_vit.py:sandwich", "--workdir=/data/run", "--config.train.steps=20"]
SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())


def sh(script, *arguments, **environment):
  return subprocess.run([ROOT / "tpu" / script, *arguments], capture_output=True, text=True, timeout=60,
                        env=os.environ | environment)


def said(script, *arguments):
  """The commands of a dry run, as lists of words."""
  done = sh(script, *arguments, *FLAGS, "--dry_run")
  assert done.returncode == 0, done.stderr
  return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck(script):
  beside = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
  done = subprocess.run([shellcheck, "--enable=quote-safe-variables", script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert os.access(script, os.X_OK)


def test_every_launcher_ends_in_the_same_command():
  (worker,) = said("worker.sh")
  assert worker == said("worker.sh", "--dry_run", "--restarts=2")[0]
  assert worker[1:] == ["-m", "experiments.train", *FLAGS]
  local = sorted(said("local.sh", "--processes=3"))
  assert [line[1:-3] for line in local] == [worker[1:]] * 3
  assert [line[-3:-1] for line in local] == [["--processes=3", f"--process={i}"] for i in range(3)]
  assert len({line[-1] for line in local}) == 1 and local[0][-1].startswith("--coordinator=localhost:")
  submit, job = filter(None, said("slurm.sh", "--nodes=2", "--gpus=4", "--sbatch=--time=1-00:00 -p gpu"))
  assert submit[0] == "sbatch" and submit[-5:] == ["tpu/slurm.sh", "--restarts=20", *FLAGS]
  assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1-00:00", "-p"} < set(submit)
  assert job[0] == "srun" and job[-5:] == ["tpu/worker.sh", *FLAGS, "--processes=auto"]
  (pod,) = said("pod.sh", "run", "--name=pod", "--zone=here", "--restarts=7")
  assert pod[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"] and "--worker=all" in pod
  (command,) = [word for word in pod if word.startswith("--command=")]
  words = shlex.split(command)
  start = words.index("tpu/worker.sh")
  assert words[start + 1:start + 6] == ["--restarts=7", *FLAGS, "--processes=auto"]


@pytest.mark.parametrize("action, words", [
  (["create", "--type=v6e-16", "--spot"],
   "gcloud compute tpus queued-resources create pod --node-id=pod --zone=here --accelerator-type=v6e-16 "
   "--runtime-version=v2-alpha-tpuv6e --spot"),
  (["status"], "gcloud compute tpus queued-resources describe pod --zone=here"),
  (["logs", "--worker=3"],
   "gcloud compute tpus tpu-vm ssh pod --worker=3 --command='tail -n 100 -F nestnet.log' --zone=here"),
  (["stop"], "gcloud compute tpus tpu-vm ssh pod --worker=all --command='kill -TERM $(cat nestnet.pid)' "
   "--zone=here"),
  (["delete"], "gcloud compute tpus queued-resources delete pod --zone=here --force"),
])
def test_what_a_pod_is_told(action, words):
  done = sh("pod.sh", action[0], "--dry_run", "--name=pod", "--zone=here", *action[1:])
  assert shlex.split(done.stdout) == shlex.split(words), done.stderr


@pytest.mark.parametrize("arguments, message", [
  (["pod.sh", "fly"], "got 'fly', allowed: create,"),
  (["pod.sh", "stop", "--name=a"], "--name and --zone are required"),
  (["pod.sh", "create", "--name=a", "--zone=b", "--type=v9-8"], "got 'v9-8', allowed: v6e-N"),
  (["pod.sh", "stop", "--name=a", "--zone=b", "--workdir=c"], "got '--workdir=c', which stop does not take"),
  (["gke.sh", "run", "--name=a"], "--image and --claim are required"),
  (["gke.sh", "run", "--name=a", "--image=i", "--claim=c", "--topology=2x3"], "divide over hosts of 4 chips"),
  (["worker.sh", "--config=c"], "--workdir=''"),
  (["local.sh", "--processes=none", "--workdir=w"], "--processes='none'"),
])
def test_mistakes_are_said(arguments, message):
  done = sh(*arguments)
  assert done.returncode == 2 and message in done.stderr


def jobset(*arguments):
  done = sh("gke.sh", "run", "--dry_run", "--name=job", "--image=image", "--claim=claim", *arguments)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def test_jobset_is_one():
  flags = [*FLAGS, "--config.recipe.name='a \"b\" \\ c'"]
  found = jobset("--topology=4x8", "--restarts=3", *flags)
  jsonschema.validate(found, SCHEMA)
  spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert spec["completions"] == spec["parallelism"] == 8
  assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
  assert 75 not in spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
  (container,) = spec["template"]["spec"]["containers"]
  assert container["command"] == ["tpu/worker.sh", *flags, "--processes=auto"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize("path, value", [
  (("spec", "failurePolicy", "rules", 0, "action"), "FailEverything"),
  (("spec", "replicatedJobs", 0, "podFailurePolicy"), {"rules": []}),
  (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "four"),
  (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "comand"), []),
])
def test_the_schema_refuses_what_is_none(path, value):
  found = copy.deepcopy(jobset())
  place = found
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(found, SCHEMA)


def trainer(folder, text):
  """A program in Python's place: the worker's answer depends on how it ends alone."""
  path = folder / "trainer"
  path.write_text(f"#!/usr/bin/env bash\necho start >>{folder}/starts\n{text}\n")
  path.chmod(0o755)
  return path


def starts(folder):
  path = folder / "starts"
  return path.read_text().count("start") if path.exists() else 0


@pytest.mark.parametrize("text, code, times", [
  ("touch {folder}/done", 0, 1),
  ("exit 0", 75, 3),
  ("exit 75", 75, 3),
  ("kill -KILL $$", 75, 3),
  ("exit 1", 1, 1),
  ("exit 2", 2, 1),
  ("(( $(wc -l <{folder}/starts) < 2 )) || touch {folder}/done", 0, 2),
])
def test_a_worker_answers_for_its_end(tmp_path, text, code, times):
  program = trainer(tmp_path, text.format(folder=tmp_path))
  done = sh("worker.sh", "--restarts=2", "--pause=0", f"--workdir={tmp_path}", PYTHON=str(program))
  assert (done.returncode, starts(tmp_path)) == (code, times), done.stderr
  assert ("the same command goes on; exit 75" in done.stderr) == (code == 75)


# Runs a command that Ctrl-C reaches: in the background it is ignored, and would stay so.
HEARING = (sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
           "os.execv(sys.argv[1], sys.argv[1:])")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
@pytest.mark.parametrize("script", ["worker.sh", "local.sh"])
def test_a_stop_reaches_the_training_and_is_no_reason_to_restart(tmp_path, script, how):
  program = trainer(
    tmp_path, f"trap 'echo saved >>{tmp_path}/saved; exit 0' TERM\nsleep 30 & wait $!\nexit 9")
  with open(tmp_path / "log", "w") as log:
    process = subprocess.Popen([*HEARING, ROOT / "tpu" / script, "--restarts=5", "--pause=0", "--workdir", tmp_path],
                               env=os.environ | {"PYTHON": str(program)}, stderr=log)
  count = 2 if script == "local.sh" else 1
  deadline = time.monotonic() + 20
  while starts(tmp_path) < count and time.monotonic() < deadline:
    time.sleep(0.02)
  # The program may not have set its trap yet.
  time.sleep(0.3)
  process.send_signal(how)
  assert process.wait(timeout=20) == 75
  assert (tmp_path / "saved").read_text().count("saved") == count
  assert starts(tmp_path) == count and "starts again" not in (tmp_path / "log").read_text()
