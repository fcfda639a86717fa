"""POA from config to extracted backbone: what its own code exports wrongly is right here."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import nestnet
from nestnet import build, cli, compare, evaluation, extraction, recipes, report, runs
from nestnet.data import arrays
from nestnet.errors import UserError

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "digits_clutter_poa.py"
CROPS = {"augment": "digits", "global_crops_size": 8, "global_crops_scale": (0.5, 1.0), "local_crops_number": 2,
         "local_crops_size": 4, "local_crops_scale": (0.2, 0.5)}
VIT = dict(model={"name": "ViT", "layers": 3, "embed": 16, "heads": 2, "mlp": 32, "head_dim": 8, "patch": 2,
                  "pool": "token", "width_scaling": "ratio"},
           space={"layers": ((0, 2), 3), "couple": {"embed heads mlp": ((8, 1, 16), (16, 2, 32))}})
SWIN = dict(model={"name": "Swin", "embed": 16, "layers_1": 1, "layers_2": 3, "multiples": (1, 2), "head_dim": 8,
                   "window": 2, "patch": 1, "width_scaling": "ratio", "masked": True},
            space={"embed": (8, 16), "layers_2": ((0, 2), 3)})
RESNET = dict(model={"name": "ResNet", "layers_1": 1, "layers_2": 2, "widths": (8, 16), "strides": (1, 2), "width": 4,
                     "stem": 4, "stem_kernel": 3, "stem_stride": 1, "pool": False, "group": 2},
              space={"width": (2, 4), "layers_2": (1, 2)})
# Of 8 x 8 cells, as the first stage has positions; the last one has a quarter of them.
MASKS = {"mask_sample_probability": 0.5, "mask_patch": 1}


def config(net=VIT, name="poa", steps=2, told_after=200, rate=1e-3, crops=CROPS, **options):
  made = recipes.self_distillation(name=name) if name == "separate" else recipes.recipe(name)
  made["objective"] |= {"prototypes": (8, 16), "hidden": 12, "bottleneck": 6, "told_after": told_after} | options
  return {
    "seed": 0, **net, "recipe": made, "data": {"name": "digits", "data_dir": "", "augment": "none", "crops": crops},
    "optim": {"name": "adamw", "learning_rate": rate, "schedule": "cosine", "warmup_steps": 0,
              "weight_decay": 0.04, "weight_decay_end": 0.4, "layer_decay": 0.9, "clip_norm": 1.5},
    "train": {"steps": steps, "batch_size": 16, "checkpoint_every": 2, "log_every": 1, "eval_every": 0,
              "execution": "slice"},
    "eval": {"bank": 200, "readouts": ("logistic",)}, "mesh": {"data": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("net, small, options", [
  (VIT, "layers=0+2,embed=8,heads=1,mlp=16", {}),
  (SWIN, "embed=8,layers_2=0+2", {"patches": 1.0, "crops": CROPS | MASKS}),
  (RESNET, "width=2,layers_2=1", {})],
  ids=["vit", "swin, masked", "resnet"])
def test_backbones_of_every_size_come_out_with_their_heads(tmp_path, net, small, options):
  run, out = tmp_path / "run", tmp_path / "small"
  assert runs.train(config(net, **options), run, show_progress=False)
  rows = report.read_rows(run / "subnets.json")
  size = runs.opened(run)[0].supernet.space.size
  assert len(rows) == size and all(0 <= row["knn"] <= 1 and 0 <= row["validation_knn"] <= 1 for row in rows)
  _, difference = extraction.extract_run(run, out, small)
  assert difference == 0
  opened, _, state = runs.opened(run)
  member = opened.supernet.space.subnet(small)
  module, variables = nestnet.load(out)
  images = arrays(opened.dataset, "test", 8)["image"]
  # Of the averaged teacher, not of the student.
  cut = opened.supernet.cut({"params": state.teacher["model"], **state.fixed}, member)
  expected = jax.jit(opened.supernet.module(member).apply)(cut, images)["features"]
  np.testing.assert_array_equal(jax.jit(module.apply)(variables, images)["features"], expected)
  student = opened.supernet.cut({"params": state.trained["model"], **state.fixed}, member)
  assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(student), jax.tree.leaves(cut)))
  # The heads beside it read its width, scaled as its own layers are.
  (beside,) = [path for path in out.glob("*.safetensors") if path.stem != "model"]
  heads = safetensors.numpy.load_file(beside)
  axis, width = module.representation
  assert expected.shape[-1] == width
  whole = state.teacher["objective"]["head_1"]["up"]["kernel"]
  (kernel,) = [value for name, value in heads.items() if "head_1" in name and "up" in name and "kernel" in name]
  np.testing.assert_allclose(kernel, whole[:width] * (len(whole) / width), rtol=1e-6)
  record = json.loads((out / "config.json").read_text())
  assert "self_distillation" in json.dumps(record)


@pytest.mark.slow
def test_a_run_that_does_not_learn_says_so(tmp_path, caplog):
  assert runs.train(config(steps=4, told_after=2, rate=1e-9), tmp_path / "run", show_progress=False)
  told = [record.message for record in caplog.records if "collapsed or did not begin" in record.message]
  # Once, not at each of the steps 2, 3 and 4.
  assert len(told) == 1 and "ln K" in told[0] and "step 2" in told[0]
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert {"teacher_entropy", "feature_std", "effective_rank", "cross_view", "koleo"} <= set(rows[-1])


def test_flops_are_those_of_all_crops():
  found = build.build(config())
  of = {side: evaluation.member_flops(found.supernet, (side, side, 1)) for side in (8, 4)}
  terms = found.step.recipe.sampler.terms(0)
  trained = sum(2 * of[8](t.candidates[0], True) + 2 * of[4](t.candidates[0], True) for t in terms)
  taught = 2 * of[8](found.supernet.space.largest, False)
  assert evaluation.step_flops(found.step)(0) == trained + taught and len(terms) == 2


@pytest.mark.slow
def test_the_config_compares_three_of_nine_members(tmp_path):
  made = [cli.load_config(f"{CONFIG}:{name}") for name in ("separate", "poa", "poa_no_same_view", "truncate")]
  tasks = compare.plan(made, 1, tmp_path, ("equal steps", "equal shares"))
  sizes = made[1].space.pool
  nested = next(task for task in tasks if task.recipe == "poa")
  assert nested.sizes == sizes and len(tasks) == 2 * len(sizes) + 3
  alone = [t.train_flops for t in tasks if t.recipe == "separate" and t.budgets == ("equal shares",)]
  assert alone == pytest.approx([nested.train_flops / 3] * 3, rel=0.01)
  # All nine train, not those alone that are compared.
  drawn = build.build(nested.config).step.recipe.sampler
  assert len({drawn.terms(step)[1].candidates[0] for step in range(60)}) == 8


def test_options_of_crops_that_the_config_leaves_out_are_known():
  made = cli.load_config(str(CONFIG))
  cli.check_override(made, "data.crops.mask_sample_probability", "0.5")
  assert made.data.crops.get_type("mask_sample_probability") is float
  with pytest.raises(UserError, match="unknown key of config.data.crops 'mask_share'.*mask_patch"):
    cli.check_override(made, "data.crops.mask_share", "0.5")


@pytest.mark.parametrize("change, message", [
  (lambda c: c["data"].pop("crops"), "learns from global.*config.data.crops"),
  (lambda c: c["data"]["crops"].update(global_crops_size=16), "global_crops_size.*at most 8"),
  (lambda c: c["data"]["crops"].update(local_crops_size=3), "3 x 3 does not divide into patches of 2"),
  (lambda c: c["recipe"].update(teacher="largest"), "hands_out=teacher"),
  (lambda c: c["recipe"].update(hands_out="student"), "hands_out.*trained, teacher"),
  (lambda c: c["recipe"].update(ema_end=1.5), "config.recipe.ema_end: got 1.5, allowed is 0 to 1"),
  (lambda c: c["recipe"]["objective"].update(prototypes=(1,)), "prototypes"),
  (lambda c: c["eval"].update(knn_k=(5000,)), "knn_k"),
  (lambda c: c["optim"].update(layer_decay=1.5), "layer_decay=1.5"),
  (lambda c: c["optim"].update(multipliers={"model/patches": 0.1}), "model/patches"),
  (lambda c: c["recipe"]["objective"].update(patches=1.0), "mask"),
])
def test_wrong_configs_are_told_at_the_start(change, message):
  made = config()
  made = json.loads(json.dumps(made))
  made["space"]["couple"] = VIT["space"]["couple"]
  change(made)
  with pytest.raises((UserError, ValueError), match=message):
    build.build(made)
