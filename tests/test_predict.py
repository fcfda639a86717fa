"""Codes of members, what an MLP learns of them, and evaluations that survive a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nestnet import Space, Subnet, errors, logs, predict
from nestnet.choices import spaced

SPACE = Space(layers=(1, 2, 3), couple={"embed heads": ((8, 1), (8, 2), (16, 2))}, mlp=(8, 16, 32),
              kernel=(3, 5), per_layer=("mlp", "kernel"))


def truth(member):
  """A known accuracy: each layer adds less than the one before, and widths pay off in pairs."""
  layers = [member.layer("layers", i) for i in range(member["layers"])]
  gain = sum((np.log2(l["mlp"]) + 0.5 * l["kernel"]) / (1 + i) for i, l in enumerate(layers))
  return 0.6 + 0.01 * gain + 0.002 * member["heads"] * member["embed"] / 8


def test_codes_are_one_hot_and_zero_where_a_layer_is_absent():
  code = predict.encode(SPACE, [Subnet(layers=2, embed=16, heads=2, mlp=(8, 32), kernel=5)])[0]
  assert code.tolist() == [0, 1, 0, 0, 0, 1, *(1, 0, 0), *(0, 0, 1), *(0, 0, 0), *(0, 1), *(0, 1), *(0, 0)]


@pytest.mark.parametrize("space", [SPACE, Space(layers=spaced(4, (2, 3)), mlp=(8, 16), per_layer=("mlp",))],
                         ids=["coupled", "spaced"])
def test_codes_are_read_back(space):
  members = predict.drawn(space, 40)
  codes = predict.encode(space, members)
  assert codes.shape == (len(members), sum(size for _, size in space.genes))
  assert predict.decode(space, codes) == members


def test_members_are_distinct_always_the_same_and_of_the_space():
  members = predict.drawn(SPACE, 60, seed=1)
  assert len(set(members)) == 60 and all(m in SPACE for m in members)
  assert members[:20] == predict.drawn(SPACE, 20, seed=1) != predict.drawn(SPACE, 20, seed=2)
  tiny = Space(embed=(8, 16))
  assert set(predict.drawn(tiny, 60)) == set(tiny)


def test_it_learns_a_function_of_genes():
  members = predict.drawn(SPACE, 260)
  accuracies = [truth(m) for m in members]
  made = predict.train(SPACE, members[60:], accuracies[60:], hidden=(32, 32), epochs=200)
  found = predict.quality(made(members[:60]), accuracies[:60])
  spread = np.std(accuracies[:60])
  assert found["kendall_tau"] > 0.9 and found["rmse"] < 0.4 * spread, (found, spread)
  np.testing.assert_array_equal(made(members[:60])[:5], made(members[:5]))


def test_it_begins_at_the_mean_and_is_the_same_again():
  members = predict.drawn(SPACE, 40)
  accuracies = [truth(m) for m in members]
  made = predict.train(SPACE, members, accuracies, epochs=1, hidden=(8,))
  assert made.mean == pytest.approx(np.mean(accuracies), abs=np.std(accuracies))
  again = predict.train(SPACE, members, accuracies, epochs=1, hidden=(8,))
  np.testing.assert_array_equal(made(members), again(members))
  with pytest.raises(errors.UserError, match="at least 10"):
    predict.train(SPACE, members[:9], accuracies[:9])


def test_quality():
  found = predict.quality([0.1, 0.2, 0.4], [0.1, 0.3, 0.2])
  assert found["kendall_tau"] == pytest.approx(1 / 3) and found["rmse"] == pytest.approx((0.05 / 3) ** 0.5)
  constant = predict.quality([0.2, 0.2, 0.2], [0.1, 0.3, 0.2])
  assert constant["kendall_tau"] == 0.0 and constant["rmse"] == pytest.approx((0.02 / 3) ** 0.5)


class Killed(Exception):
  pass


def test_one_bar_shows_all_that_is_evaluated(tmp_path, capsys):
  evaluate = lambda some: [{"subnet": str(m)} for m in some]
  bar, members = logs.Progress(0, label="evaluate"), predict.drawn(SPACE, 10)
  for some in (members[:6], members):
    predict.evaluated(tmp_path / "members.jsonl", some, evaluate, at_once=3, progress=bar)
  # What the file has is not done again.
  lines = capsys.readouterr().err.splitlines()
  assert [line.split("  ")[0] for line in lines] == ["evaluate 6/6", "evaluate 10/10"]


def test_a_kill_loses_nothing_and_nothing_is_evaluated_twice(tmp_path):
  path, members, asked = tmp_path / "runs" / "members.jsonl", predict.drawn(SPACE, 10), []

  def evaluate(some, stop=10 ** 9):
    if len(asked) >= stop:
      raise Killed
    asked.extend(some)
    return [{"subnet": str(m), "validation_accuracy": truth(m)} for m in some]

  with pytest.raises(Killed):
    predict.evaluated(path, members, lambda some: evaluate(some, 6), at_once=3)
  assert len(path.read_text().splitlines()) == 6
  path.write_bytes(path.read_bytes()[:-5])
  rows = predict.evaluated(path, members, evaluate, at_once=3)
  assert asked == [*members[:6], members[5], *members[6:]]
  assert [row["subnet"] for row in rows] == [str(m) for m in members]
  assert [row["validation_accuracy"] for row in rows] == [truth(m) for m in members]
  assert predict.evaluated(path, members[::-1], evaluate) == rows[::-1] and len(asked) == 11
  assert len([json.loads(line) for line in path.read_text().splitlines()]) == 10
  path.write_text("{}\n" + path.read_text())
  with pytest.raises(errors.UserError, match="line 1 is damaged"):
    predict.evaluated(path, members, evaluate)
