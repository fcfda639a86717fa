"""Rows of metrics: kept up to the step of the checkpoint, and read with care."""

import json

import pytest

from nestnet import errors, logs


def steps(folder):
  return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, step, rows):
  log = logs.Logs(folder, step)
  for row in rows:
    log.write(row, {"loss": 0.5})
  log.close()


def test_rows_past_the_step_and_half_a_line_are_dropped(tmp_path):
  write(tmp_path, 0, [1, 2, 3])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')
  write(tmp_path, 2, [3])
  assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("line", [
  b"{", b"[1]", b"{}", b'{"step": "x"}', b'{"step": null}', b"\0\0", b"\xff"])
def test_a_damaged_line_is_named_and_nothing_is_changed(tmp_path, line):
  write(tmp_path, 0, [1])
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + line + b"\n" + b'{"step": 2}\n')
  before = path.read_bytes()
  with pytest.raises(errors.UserError, match="metrics.jsonl, line 2 is damaged"):
    logs.Logs(tmp_path, 2)
  assert path.read_bytes() == before


def test_the_time_left_is_that_of_steps_and_not_of_compilation(monkeypatch, capsys):
  clock = iter([0, 60, 61, 75])
  monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
  progress = logs.Progress(total=1000, start=500)
  for step in (510, 511, 540):
    progress.update(step, {"loss": 0.5})
  # The first step's end took a minute, the next 30 steps 15 seconds.
  assert capsys.readouterr().err.splitlines() == [
    "train 510/1000  loss 0.5", "train 540/1000  2.0 steps/s  230 s left  loss 0.5"]
