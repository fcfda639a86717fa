"""What a config becomes: its phases, built from as little as they share."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import jax
import pytest

from nestnet import build, cli, pieces, recipes, training
from nestnet.errors import UserError
from nestnet.models.layers import Linear

ROOT = pathlib.Path(__file__).resolve().parents[1]
traced = []


class Net(nn.Module):
  """Notes each time that it is traced."""

  embed: int
  mlp: int
  classes: int = 10

  @nn.compact
  def __call__(self, images, *, train=False):
    traced.append((self.embed, self.mlp))
    x = Linear("pixels -> embed", (self.embed,), name="stem")(images.reshape(len(images), -1))
    x += Linear("mlp -> embed", (self.embed,), name="down")(Linear("embed -> mlp", (self.mlp,), name="up")(x))
    return {"features": x, "logits": Linear("embed -> classes", (self.classes,), name="head")(x)}


def config(**changed):
  return {
    "model": {"name": f"{__name__}:Net", "embed": 16, "mlp": 16}, "space": {"embed": (8, 16), "mlp": (8, 16)},
    "recipe": recipes.recipe("rss"), "data": {"name": "digits"},
    "optim": {"name": "sgd", "learning_rate": 0.1, "schedule": "cosine", "warmup_share": 0.5},
    "train": {"steps": 8, "batch_size": 8, "checkpoint_every": 8, "log_every": 1, "eval_every": 0,
              "execution": "slice"},
    "mesh": {"data": 1},
    "phases": [{"share": 1, "open": {"embed": 1, "mlp": 1}}, {"share": 1, "open": {"mlp": 1}}, {"share": 2}],
  } | changed


def test_phases_share_what_is_traced():
  """Each member that is checked is traced once, whichever phases have it."""
  traced.clear()
  run = build.build(config())
  assert sorted(traced) == [(8, 8), (8, 16), (16, 16)]
  assert len({id(pieces.shared(phase.step.supernet)) for phase in run.phases}) == 1
  assert [phase.opens for phase in run.phases] == [(), ("embed",), ("mlp",)]
  # Traced no more for the state's shapes, which are those that it begins with.
  made, said = run.step.init(), run.step.abstract()
  assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), said)


def test_what_only_training_needs_is_not_built_to_look_at_a_run():
  made = config(train=config()["train"] | {"execution": "one_program"})
  with pytest.raises(UserError, match="^phase 1 of 3, .*Net has no stack of layers"):
    build.build(made)
  run = build.build(made, {"data": 1})
  with pytest.raises(UserError, match="Net has no stack of layers"):
    run.step(run.step.init(), {}, 0)


def test_each_phase_is_announced_and_counted(tmp_path, capsys):
  run = build.build(config())
  training.train(run.phases, run.batches, tmp_path, checkpoint_every=8, log_every=1)
  said = [line for line in capsys.readouterr().err.splitlines() if "compiling" in line]
  assert said == ["phase 1 of 3: 2 steps; compiling", "phase 2 of 3: 2 steps, embed opens; compiling",
                  "phase 3 of 3: 4 steps, mlp opens; compiling"]
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [int(row.partition('"phase": ')[2][0]) for row in rows] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_a_run_that_goes_on_says_where(tmp_path, capsys):
  """In the phase whose steps come next, also where it stands at a border; a single phase has no number."""
  run, short = build.build(config()), build.build(config(train=config()["train"] | {"steps": 4}, phases=None))
  training.train(short.phases, short.batches, tmp_path, checkpoint_every=8)
  assert [x for x in capsys.readouterr().err.splitlines() if "compiling" in x] == ["train: compiling"]
  training.train(run.phases, run.batches, tmp_path, checkpoint_every=8)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0] == "phase 3 of 3: 4 steps, mlp opens; compiling"
  assert lines[-1].startswith("train, phase 3 of 3, 8/8")
  training.train(run.phases, run.batches, tmp_path, checkpoint_every=8)
  assert "compiling" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits_clutter_mobilenet", "digits_clutter_resnet"])
@pytest.mark.parametrize("method", ["sandwich", *recipes.PHASES])
def test_small_networks_warm_up_over_fifty_steps(name, method):
  """Of 2,000, whatever the phases; and over fewer in a run so short that each phase has one step."""
  made = build.plain(cli.load_config(f"{ROOT / 'configs' / name}.py:{method}"))
  (_, first, _), *_ = build._stretches(made.get("phases") or [{}], build.phase_steps(made))
  rate, peak = build._rate(made["optim"], first), made["optim"]["learning_rate"]
  assert float(rate(49)) < float(rate(50)) == pytest.approx(peak) and float(rate(51)) < float(rate(50))
  for phase in made.get("phases") or [{}]:
    assert float(build._rate(made["optim"] | phase.get("optim", {}), 1)(0)) > 0


@pytest.mark.parametrize("members, message", [
  (3, "got 3, allowed is a tuple of texts"), ("embed=8", "got 'embed=8', allowed is a tuple"),
  ((3,), r"got \[3\], allowed is a tuple"), (("",), r"got \[''\], allowed is a tuple"),
  (("embed=9",), "embed=9 is outside the space; allowed for embed: 8, 16"),
  (("nonsense",), "'nonsense' is not axis=size")])
def test_members_to_show_are_read_at_start_up(members, message):
  with pytest.raises(UserError, match=f"^config.eval.members: .*{message}"):
    build.build(config(eval={"members": members}))


def test_lists_of_another_number_of_layers_are_told_at_start_up():
  made = {**cli.load_config(str(ROOT / "configs" / "stdlib_matformer.py")).to_dict(), "phases": None}
  run = build.build(made | {"model": made["model"] | {"layers": 3}})
  assert [member.chosen["mlp"] for member in run.also][0] == (64, 64, 128)
  for changes, message in (
      ({"members": ("mlp=64:64",)}, "members: mlp=64:64 lists 2 layers, but layers keeps 8"),
      ({"mix": "mpl"}, "mix: unknown axis 'mpl'; did you mean 'mlp'")):
    with pytest.raises(UserError, match=f"^config.eval.{message}"):
      build.build(made | {"eval": changes})
