"""Two processes train as one does; they agree, leave together, and tell when one is gone."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nestnet import errors, processes, report, runs, supervision

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 60
MODEL = '''
import json
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from nestnet import data, errors, processes, sharding
from nestnet.execution import Supernet
from nestnet.models.layers import Linear
from nestnet.objectives import objective
from nestnet.sampling import sampler
from nestnet.space import Space
from nestnet.steps import Recipe, Step

class Net(nn.Module):
  embed: int
  mlp: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1))
    h = jnp.tanh(Linear("embed -> mlp", (self.mlp,), name="up")(x))
    h = nn.Dropout(0.2, deterministic=not train)(h)
    x += Linear("mlp -> embed", (self.embed,), name="down")(h)
    return {"features": x, "logits": Linear("embed -> classes", (self.classes,), name="head")(x)}

def sgd(mask):
  """Steps against the gradient and keeps it as its state."""
  return optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p: (jax.tree.map(lambda x: -0.1 * x, g), g))

def figures():
  """Loss and gradient of 10 steps from common parameters, and the parameters after 20 of SGD."""
  space = Space(mlp=(8, 16))
  supernet = Supernet(Net(16, 16), space, (jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32),))
  recipe = Recipe(sampler("sandwich", space), objective("classification"))
  batches = data.Batches(data.load("digits"), "train", 16, 0, data.augmentation("digits"),
                         *sharding.batch_part(sharding.make_mesh({"data": 2})))
  mesh, found = sharding.make_mesh({"data": 2}), {}
  step = Step(supernet, recipe, sgd, mesh)
  for i in range(10):
    state, metrics = step(step.init(), sharding.put_batch(batches[i], mesh), i)
    found |= {f"loss {i}": metrics["loss"], f"gradient {i}": state.opt_state["model"]}
  state = step.init()
  for i in range(20):
    state, _ = step(state, sharding.put_batch(batches[i], mesh), i)
  found["parameters"] = state.trained["model"]
  flat, _ = jax.tree_util.tree_flatten_with_path(found)
  return {jax.tree_util.keystr(path): jax.device_get(x) for path, x in flat}

def refused(work, *arguments):
  """The message with which a call is refused."""
  try:
    work(*arguments)
  except errors.UserError as error:
    return str(error)

def meetings():
  """What each of two processes sees of the other."""
  index, asked = jax.process_index(), []
  mesh = sharding.make_mesh({"data": 2})

  def late():
    asked.append(index)
    return {"seen": index == 0 or len(asked) == 3}

  def wrong():
    raise errors.UserError(f"wrong in process {index}")

  processes.agree(late, "late is fine", tries=4)
  rows = sharding.put_batch({"rows": np.arange(2) + 2 * index}, mesh)["rows"]
  found = {
    "asked": len(asked), "led": processes.led(lambda: index), "wrong": refused(processes.led, wrong),
    "differs": refused(processes.agree, lambda: {"index": index, "count": 2}, "be one"),
    "texts": processes.gather("ä" * index), "rows": sharding.local(rows).tolist(),
    "parts": [sharding.batch_part(m) for m in (mesh, sharding.make_mesh({"data": 1, "model": 2}))],
    "meshes": [refused(sharding.make_mesh, {"data": size}) for size in (4, 1, -1)]}
  return [json.loads(text) for text in processes.gather(json.dumps(found))]
'''
CONFIG = f'''
import ml_collections
from nestnet.recipes import recipe

def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name="two_model:Net", embed=16, mlp=16)
  config.space = dict(embed=(8, 16), mlp=(8, 16))
  config.recipe = recipe("sandwich")
  config.data = dict(name="digits", data_dir="", augment="digits")
  config.optim = dict(name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=5,
                      weight_decay=0.05, clip_norm=1.0)
  config.train = dict(steps={STEPS}, batch_size=16, checkpoint_every=20, log_every=1, eval_every=30)
  config.mesh = dict(data=-1)
  return config
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  (folder / "two.py").write_text(CONFIG)
  (folder / "two_model.py").write_text(MODEL)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield folder


def surroundings(folder, devices=1):
  path = [str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
  return {
    **os.environ, "PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices), "PYTHON": sys.executable,
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}


def free_port():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def place(index, port):
  return ["--processes=2", f"--process={index}", f"--coordinator=localhost:{port}"]


def launch(folder, workdir, *flags, own=((), ())):
  """Both processes of a job; what each says goes to a file of its own."""
  port, jobs = free_port(), []
  for index in range(2):
    with open(folder / f"{workdir.name}.{index}.log", "w") as log:
      jobs.append(subprocess.Popen(
        [sys.executable, "-m", "experiments.train", f"--config={folder}/two.py", f"--workdir={workdir}",
         *flags, *own[index], *place(index, port)],
        cwd=ROOT, env=surroundings(folder), stdout=log, stderr=log))
  return jobs


def scripts(folder, text):
  """Both processes of a script, which gets its index and the coordinator."""
  port = free_port()
  return [subprocess.Popen([sys.executable, "-c", text, str(index), f"localhost:{port}"], cwd=folder,
                           env=surroundings(folder)) for index in range(2)]


def ends(jobs, timeout=240):
  return [job.wait(timeout=timeout) for job in jobs]


def said(folder, workdir):
  return [(folder / f"{workdir.name}.{index}.log").read_text() for index in range(2)]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder):
  """And each sees the other's data, facts and mistakes."""
  jobs = scripts(
    folder,
    "import json, sys, numpy as np, two_model; from nestnet import processes, supervision\n"
    "with processes.joined(supervision.Place(2, int(sys.argv[1]), sys.argv[2])):\n"
    "  met, found = two_model.meetings(), two_model.figures()\n"
    "  if processes.first():\n"
    "    np.savez('found.npz', **found)\n"
    "    json.dump(met, open('met.json', 'w'))\n")
  import two_model
  wanted = two_model.figures()
  assert ends(jobs) == [0, 0]
  for index, met in enumerate(json.loads((folder / "met.json").read_text())):
    larger, smaller, fitting = met.pop("meshes")
    assert larger == "mesh {'data': 4, 'fsdp': 1, 'model': 1} needs 4 devices, 2 are here in 2 processes"
    assert "it needs 1, 2 are here in 2 processes; allowed with several processes is all of them" in smaller
    assert fitting is None
    assert met == {
      "asked": 3, "led": 0, "wrong": "wrong in process 0", "texts": ["", "ä"], "rows": [0, 1, 2, 3],
      "differs": "the processes of this job differ; be one:\n  index: 1 in process 1, 0 in process 0",
      "parts": [[index, 2], [0, 1]]}
  found = dict(np.load(folder / "found.npz"))
  assert set(found) == set(wanted) and len(wanted) == 10 + 11 * 8
  for name in wanted:
    np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_unequal_processes_are_told(folder):
  workdir = folder / "unequal"
  jobs = launch(folder, workdir, own=((), ["--config.recipe.sampler.random=1"]))
  assert ends(jobs) == [2, 2]
  for text in said(folder, workdir):
    assert "the processes of this job differ; every host runs the same command" in text
    assert "config.recipe.sampler.random: 1 in process 1, 2 in process 0" in text
    assert "sub-networks of step 0: " in text
    assert "Traceback" not in text and "Check failure" not in text
  assert not workdir.exists()


def test_a_process_that_says_its_message_late_says_it(folder):
  """The other one, gone by then, does not end it."""
  assert ends(scripts(
    folder,
    "import os, sys, time; from nestnet import errors, processes, supervision\n"
    "try:\n"
    "  with processes.joined(supervision.Place(2, int(sys.argv[1]), sys.argv[2])):\n"
    "    raise errors.UserError('wrong')\n"
    "except errors.UserError:\n"
    "  time.sleep(2 * int(sys.argv[1]))\n"
    "  os._exit(2)\n")) == [2, 2]


@pytest.mark.slow
def test_hosts_that_see_different_folders_are_told(folder):
  workdir = folder / "folders"
  jobs = launch(folder, workdir, own=((), [f"--workdir={workdir}.other"]))
  assert ends(jobs) == [2, 2]
  for text in said(folder, workdir):
    assert "must be one folder that every host sees:\n  config.json is there: false in process 1" in text


@pytest.mark.parametrize("flags, message", [
  (("two", 0, "a:1"), "--processes: got 'two', allowed: a whole number"),
  (("2", None, "a:1"), "--process: got None, allowed with --processes=2: 0 to 1"),
  (("2", 2, "a:1"), "--process: got 2, allowed with --processes=2: 0 to 1"),
  (("2", 0, "localhost"), "--coordinator: got localhost, allowed: HOST:PORT"),
  (("auto", 0, None), "leave them out"),
])
def test_a_place_that_is_none(flags, message):
  with pytest.raises(errors.UserError, match=re.escape(message)):
    supervision.place(*flags)


def test_without_a_cluster_auto_says_what_to_give(folder):
  done = subprocess.run([sys.executable, "-m", "experiments.train", f"--config={folder}/two.py",
                         f"--workdir={folder}/auto", "--processes=auto"], cwd=ROOT, text=True,
                        env=surroundings(folder), capture_output=True, timeout=120)
  assert done.returncode == 2 and "--processes=N --process=I --coordinator=HOST:PORT" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text, code, message", [
  ("raise SystemExit(3)", 3, ""),
  ("return 4", 4, ""),
  ("raise errors.Lost('gone')", 75, "gone"),
  # JAX's threads talk until the process ends; what matters stands below it.
  ("sys.stdout = Late()\n  raise errors.Lost('gone')", 75, "gone"),
  ("raise KeyError('bug')", 1, "KeyError: 'bug'"),
  ("os.abort()", 75, "process 0 of 2: another process of the job is gone"),
  ("os.kill(os.getpid(), 9)", 75, "process 0 of 2: ended by SIGKILL. The same command"),
  ("os.kill(os.getppid(), 15); time.sleep(30)", 75, "ended by SIGTERM"),
])
def test_a_parent_answers_for_its_child(text, code, message):
  script = ("import os, sys, time\nfrom nestnet import errors, supervision\n"
            "class Late:\n  flush = lambda self: os.write(2, b'late\\n')\n"
            f"def work():\n  {text}\n"
            "sys.exit(supervision.supervised(work, supervision.Place(2, 0, 'a:1')))")
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
                        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
  assert done.returncode == code and message in (done.stderr.splitlines() or [""])[-1]
  assert ("Traceback" in done.stderr) == ("bug" in message)


def test_a_process_alone_agrees_with_itself():
  processes.agree(lambda: pytest.fail("asked"), "nothing to compare")
  assert processes.led(lambda: [1, "x"]) == [1, "x"]


def reached(workdir):
  """The last step in `metrics.jsonl`."""
  with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
    return json.loads((workdir / "metrics.jsonl").read_text().split("\n")[-2])["step"]
  return 0


def when(moment, jobs, timeout=240):
  deadline = time.monotonic() + timeout
  while not moment():
    assert all(job.poll() is None for job in jobs), "the job ended before the moment came"
    assert time.monotonic() < deadline, "the moment never came"
    time.sleep(0.001)


def child(job):
  """The process that works, below the one that waits."""
  return int(pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text())


def same(found, wanted):
  (_, *left), (_, *right) = runs.opened(found), runs.opened(wanted)
  assert left[0] == right[0] == STEPS
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(state) for _, state in (left, right)))
  assert (found / "metrics.jsonl").read_text() == (wanted / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(folder):
  workdir = folder / "uninterrupted"
  assert ends(launch(folder, workdir)) == [0, 0], said(folder, workdir)
  return workdir


@pytest.mark.slow
def test_what_two_processes_leave(folder, uninterrupted):
  """One of everything, and figures that one process with two devices has too."""
  alone = folder / "alone"
  subprocess.run([sys.executable, "-m", "experiments.train", f"--config={folder}/two.py",
                  f"--workdir={alone}"], cwd=ROOT, env=surroundings(folder, devices=2), check=True,
                 timeout=240, capture_output=True)
  names = [sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in workdir.iterdir())
           for workdir in (uninterrupted, alone)]
  assert names[0] == names[1]
  tables = [report.read_rows(w / "subnets.json") for w in (uninterrupted, alone)]
  assert len(tables[0]) == 4
  for one, two in zip(*tables):
    assert [one[k] for k in ("subnet", "params", "flops", "train_flops")] == [
      two[k] for k in ("subnet", "params", "flops", "train_flops")]
    assert abs(one["validation_loss"] - two["validation_loss"]) < 1e-2
  rows = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
          for w in (uninterrupted, alone)]
  assert [set(row) for row in rows[0]] == [set(row) for row in rows[1]]
  np.testing.assert_allclose(*([row["loss"] for row in r if "loss" in row] for r in rows), rtol=1e-3)
  first, second = said(folder, uninterrupted)
  assert "written: " in first and f"{STEPS}/{STEPS}" in first
  assert "train" not in second and "evaluate" not in second


@pytest.mark.slow
def test_sigterm_and_losses_are_met_by_all_and_the_restart_is_exact(folder, uninterrupted):
  """One run through a SIGTERM to one process, three ways of dying, and a damaged checkpoint."""
  workdir = folder / "interrupted"
  jobs = launch(folder, workdir)
  when(lambda: reached(workdir) >= random.Random(os.getpid()).randint(3, 10), jobs)
  jobs[1].send_signal(signal.SIGTERM)
  assert ends(jobs, 120) == [0, 0]
  saved = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
  assert max(saved) == reached(workdir) < STEPS and not (workdir / "done").exists()
  assert f"goes on from the checkpoint in {workdir}" in said(folder, workdir)[0]

  def lost(victim, after, kill):
    """Kills, and gives what the other one says, and how it ends, within a minute."""
    jobs = launch(folder, workdir)
    when(lambda: reached(workdir) > after, jobs)
    kill(jobs[victim])
    began = time.monotonic()
    code = jobs[1 - victim].wait(timeout=60)
    print(f"process {victim} lost after step {after}, the other {time.monotonic() - began:.1f} s later")
    assert code == 75
    last = said(folder, workdir)[1 - victim].strip().split("\n")[-1]
    assert last.startswith(f"train: process {1 - victim} of 2: another process of the job is gone"), last
    assert last.endswith("The same command on every host goes on from the newest checkpoint"), last
    return jobs[victim]

  assert lost(1, 21, lambda job: job.kill()).wait(timeout=20) == -signal.SIGKILL
  # The waiting parent speaks for a child that was killed.
  assert lost(0, 23, lambda job: os.kill(child(job), signal.SIGKILL)).wait(timeout=20) == 75
  assert "process 0 of 2: ended by SIGKILL" in said(folder, workdir)[0]
  # A machine that hangs closes no connection: only its silence tells.
  frozen = lost(1, 41, lambda job: os.kill(child(job), signal.SIGSTOP))
  frozen.kill()
  frozen.wait(timeout=20)
  steps = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
  newest = workdir / "checkpoints" / max(steps, key=int)
  largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  assert ends(launch(folder, workdir)) == [0, 0]
  assert ["damaged and skipped" in text for text in said(folder, workdir)] == [True, False]
  same(workdir, uninterrupted)


def running(workdir, program, *flags):
  """The processes that run `program`, a script or a module, in `workdir` with these flags."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      words = path.read_bytes().decode().split("\0")
      if program in words[1:3] and {f"--workdir={workdir}", *flags} <= set(words):
        found.append(int(path.parent.name))
  return found


@pytest.mark.slow
def test_a_local_job_under_the_wrapper_restarts_and_finishes(folder, uninterrupted):
  workdir = folder / "wrapped"
  with open(folder / "wrapped.log", "w") as log:
    job = subprocess.Popen(
      [ROOT / "tpu" / "local.sh", "--processes=2", "--restarts=4", "--pause=1", f"--config={folder}/two.py",
       f"--workdir={workdir}"], env=surroundings(folder), stdout=log, stderr=log)
  when(lambda: reached(workdir) > 22, [job])
  victims = running(workdir, "experiments.train", "--process=1")
  assert victims
  os.kill(min(victims), signal.SIGKILL)
  assert job.wait(timeout=300) == 0, (folder / "wrapped.log").read_text()
  log = (folder / "wrapped.log").read_text()
  assert "worker.sh: starts again in 1 s (1 of 4)" in log and "another process of the job is gone" in log
  assert (workdir / "done").exists()
  same(workdir, uninterrupted)


SRUN = '''#!/usr/bin/env bash
# Slurm's part: two tasks on one node, the largest exit code.
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; (( code > worst )) && worst=$code; done
exit $worst
'''


@pytest.mark.slow
def test_a_job_of_slurm_finds_its_processes_by_itself(folder):
  """JAX reads the place of each process from the variables that Slurm sets."""
  tools, workdir = folder / "bin", folder / "slurm"
  tools.mkdir()
  (tools / "srun").write_text(SRUN)
  (tools / "scontrol").write_text(f"#!/usr/bin/env bash\necho \"$@\" >>{folder}/requeued\n")
  for tool in tools.iterdir():
    tool.chmod(0o755)
  port = random.Random().randint(0, 4095)
  environment = surroundings(folder) | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": str(port)}

  def job(*flags):
    return subprocess.Popen(["tpu/slurm.sh", f"--config={folder}/two.py", f"--workdir={workdir}", *flags],
                            cwd=ROOT, env=environment)

  started = job()
  when(lambda: reached(workdir) > 2, [started])
  workers = running(workdir, "tpu/worker.sh")
  assert len(workers) == 2
  for worker in workers:
    os.kill(worker, signal.SIGTERM)
  assert started.wait(timeout=120) == 75
  assert (folder / "requeued").read_text() == f"requeue {port}\n"
  assert job().wait(timeout=240) == 0 and (workdir / "done").exists()
