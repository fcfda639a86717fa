"""Members evaluated as data to one program: the same rows as alone, whatever their number."""

from __future__ import annotations


import jax
import pytest

from nestnet import build, cost, evaluation, predict
from nestnet.data.synthetic import Noise
from nestnet.evaluation import as_data
from nestnet.evaluators.classification import classification_all

NET = {"name": "MobileNet", "widths": (8, 8), "head": (8,), "strides": (1, 1), "squeeze": (False, False),
       "activations": ("relu", "relu"), "layers_1": 2, "expand_1": 2, "kernel_1": 3, "stem": 8}
CONV = NET, {"layers_1": (1, 2), "expand_1": (1, 2), "resolution": (4, 6), "per_layer": ("expand_1",)}
VIT = ({"name": "ViT", "layers": 2, "embed": 16, "heads": 2, "mlp": 16, "patch": 3, "head_dim": 4},
       {"layers": (1, (0, 1)), "embed": (8, 16), "heads": (1, 2), "mlp": (8, 16), "per_layer": ("mlp",)})


class Few:
  """Noise enough to tell members apart."""
  classes = 3
  train, validation, test = (Noise(size, (6, 6, 1), 3) for size in (24, 20, 270))


def built(model, space, **recipe):
  return build.build({
    "seed": 0, "model": model, "space": space,
    "recipe": {"name": "free", "sampler": {"name": "sorted_nested"}, "objective": {"name": "classification"}}
    | recipe,
    "data": {"name": f"{__name__}:Few", "data_dir": "", "augment": "none"},
    "optim": {"name": "sgd", "learning_rate": 0.1}, "mesh": {"data": 1},
    "train": {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "eval_every": 0},
    "eval": {"calibrate_images": 8, "calibrate_batch_size": 8}})


@pytest.mark.slow
@pytest.mark.parametrize("model, space", [CONV, VIT], ids=["mobilenet, resolutions", "vit"])
def test_many_members_have_the_rows_of_each_alone(model, space, compiled):
  """One program for all, however many there are; with statistics of its own for each."""
  run = built(model, space)
  state, family = run.step.init(), run.supernet.space
  members = [family.smallest, *predict.drawn(family, 8)][:9]
  rows = evaluation.evaluate(run, state, members)
  assert compiled.count("jit(all_scores)") == 1
  row, member = rows[1], members[1]
  (alone,) = evaluation.evaluate(run, state, [member])
  assert list(row) == list(alone)
  for name, value in alone.items():
    assert row[name] == (pytest.approx(value, rel=1e-5) if name.endswith("loss") else value), name
  net, inputs = run.supernet.module(member), run.supernet.inputs_of(member)
  assert (row["params"], row["flops"]) == (cost.count_params(net, *inputs), cost.flops(net, *inputs))
  assert len({row["loss"] for row in rows}) == len(set(members))


def test_when_members_are_data():
  step = built(*CONV).step
  one = as_data(step.supernet)
  assert one.worth == 4 and evaluation._as_data(step, 9) is one and evaluation._as_data(step, 8) is None
  features = {**VIT[1], "features": (8, 16), "constraint": None}
  heads = built(VIT[0] | {"features": 16}, features, objective={"name": "matryoshka", "sizes": (8, 16)}).step
  # Each size of the features has a head of its own.
  assert as_data(heads.supernet).possible and evaluation._as_data(heads, 10 ** 6) is None


def test_members_that_are_not_calibrated_are_said():
  run = built(*CONV)
  one = as_data(run.supernet)
  params = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), run.supernet.shapes["params"])
  data = {"image": jax.numpy.zeros((1, 6, 6, 1)), "label": [0]}
  with pytest.raises(ValueError, match="this MobileNet is not calibrated"):
    dict(classification_all(one, {"params": params}, {}, one.vector(
      run.supernet.space.largest)[None], data))


@pytest.mark.slow
def test_ten_thousand_members_are_calibrated_and_evaluated_by_one_program_each(monkeypatch, compiled):
  monkeypatch.setattr("nestnet.evaluators.classification.BATCH", 8)
  monkeypatch.setattr(Few, "test", Noise(8, (6, 6, 1), 3))
  run = built(NET | {"layers_1": 9}, {"layers_1": (8, 9), "expand_1": (1, 2), "kernel_1": (1, 3),
                                      "per_layer": ("expand_1", "kernel_1")})
  state, members = run.step.init(), predict.drawn(run.supernet.space, 10_000)
  rows = evaluation.evaluate(run, state, members, splits=("test",))
  assert compiled.count("jit(all_moments)") == compiled.count("jit(all_scores)") == 1
  assert len(set(members)) == 10_000 and len({row["loss"] for row in rows}) > 9_000
