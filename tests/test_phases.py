"""Phases as data: shares of the steps, spaces that open, what a config makes of them."""

from __future__ import annotations

import pytest

from nestnet import phases, recipes
from nestnet.errors import UserError
from nestnet.space import Space

MOBILE = {f"{axis}_{s}": sizes for axis, sizes in dict(
  layers=(2, 3, 4), expand=(3, 4, 6), kernel=(3, 5, 7)).items() for s in (1, 2)} | {
    "per_layer": ("expand_1", "expand_2", "kernel_1", "kernel_2"), "pool": ("layers_1=2",)}


@pytest.mark.parametrize("steps", [6, 7, 25, 605, 10 ** 6])
def test_shares_fill_the_steps_and_no_phase_is_empty(steps):
  shares = (180, 125, 25, 125, 25, 125)
  found = phases.lengths([{"share": share} for share in shares], steps)
  assert sum(found) == steps and min(found) >= 1
  if steps >= 605:
    assert found == pytest.approx([steps * share / 605 for share in shares], abs=1)


def test_ofa_opens_kernels_then_depths_then_widths():
  """Lists, epochs, learning rates and numbers of members as in the authors' scripts."""
  made = recipes.phases("ofa", MOBILE, enter="module:sort")
  spaces = [phases.opened(MOBILE, phase.get("open", {})) for phase in made]
  assert [(s["kernel_1"], s["layers_1"], s["expand_1"]) for s in spaces] == [
    ((7,), (4,), (6,)), ((3, 5, 7), (4,), (6,)), ((3, 5, 7), (3, 4), (6,)), ((3, 5, 7), (2, 3, 4), (6,)),
    ((3, 5, 7), (2, 3, 4), (4, 6)), ((3, 5, 7), (2, 3, 4), (3, 4, 6))]
  assert [phase["share"] for phase in made] == [180, 125, 25, 125, 25, 125]
  assert [phase["optim"]["factor"] * 2.6 for phase in made[1:]] == pytest.approx(
    [0.96, 0.08, 0.24, 0.08, 0.24])
  assert [phase["optim"]["warmup_share"] * 125 for phase in made[1:]] == [5, 0, 5, 0, 5]
  assert [phase["recipe"]["sampler"]["n"] for phase in made[1:]] == [1, 2, 2, 4, 4]
  assert made[0]["recipe"] == {"sampler": {"name": "largest"}, "teacher": "largest"}
  # Channels are sorted before widths open.
  assert [phase.get("enter") for phase in made] == 4 * [None] + 2 * ["module:sort"]
  assert recipes.phases("ofa", MOBILE)[-1]["enter"] == "nestnet.importance:Sort"
  assert "enter" not in recipes.phases("ofa", MOBILE, enter="")[-1]
  # The pool has members that are not there yet; the last space is the config's own.
  assert [s["pool"] for s in spaces] == 5 * [()] + [MOBILE["pool"]]
  assert [Space(**s).size for s in spaces][::5] == [1, (9 ** 2 + 9 ** 3 + 9 ** 4) ** 2]


def test_stages_that_would_open_nothing_are_left_out():
  made = recipes.phases("ofa", dict(layers=(2, 4), embed=(8, 16, 32), heads=(2, 4)))
  assert [(phase["share"], phase["open"]) for phase in made] == [
    (180, {"layers": 1, "embed": 1, "heads": 1}), (125, {"embed": 1, "heads": 1}),
    (25, {"embed": 2, "heads": 2}), (125, {})]
  assert len(recipes.phases("ofa", dict(layers=(2,), mlp=(8,)))) == 1


def test_what_is_coupled_opens_together_and_in_the_end_all_is_open():
  """Depths coupled with widths open with these; a kind of one size keeps nothing closed."""
  coupled = dict(couple={"layers_1 expand_1": ((2, 3), (3, 4), (4, 6))}, kernel_1=(3, 5), embed=(8,))
  made = recipes.phases("ofa", coupled)
  assert [(phase["share"], phase["open"]) for phase in made] == [
    (180, {"layers": 1, "expand": 1, "kernel": 1}), (125, {"layers": 1, "expand": 1}),
    (25, {"layers": 2, "expand": 2}), (125, {})]
  assert [Space(**phases.opened(coupled, phase["open"])).size for phase in made] == [1, 2, 4, 6]
  deep = dict(layers=(2, 3), mlp=(8, 16), couple={"embed heads": ((8, 2), (16, 4))}, kernel=(3,))
  assert [phase["open"] for phase in recipes.phases("ofa", deep)][-1] == {}
  chained = dict(couple={"layers embed": ((1, 8), (2, 16))}, kernel=(3, 5))
  assert [phase["open"] for phase in recipes.phases("ofa", chained)] == [
    {"layers": 1, "embed": 1, "kernel": 1}, {"layers": 1, "embed": 1}, {}]


def test_resolutions_are_open_as_soon_as_members_are_drawn():
  made = recipes.phases("ofa", dict(layers=(1, 2), resolution=(8, 12)))
  assert [(phase["open"], phase.get("enter")) for phase in made] == [({"layers": 1}, None), ({}, None)]


def test_compofa_opens_its_coupled_space_at_once():
  space = dict(couple={"layers_1 expand_1": ((2, 3), (3, 4), (4, 6))}, kernel_1=(7,))
  made = recipes.phases("compofa", space)
  spaces = [phases.opened(space, phase.get("open", {})) for phase in made]
  assert [Space(**s).size for s in spaces] == [1, 3, 3]
  assert [phase["share"] for phase in made] == [180, 25, 125]
  assert spaces[0]["couple"] == {"layers_1 expand_1": ((4, 6),)}


def test_deps_has_one_schedule_over_its_phases():
  first, second = recipes.phases("deps", MOBILE, enter="module:sort")
  assert (first["share"], second["share"]) == (145, 125) and "optim" not in first | second
  assert first["recipe"] == {"sampler": {"name": "largest"}} and second["enter"] == "module:sort"
  assert recipes.recipe("deps")["sampler"]["ramp"] == 5 / 125
  assert recipes.phases("bignas", MOBILE) == []


def test_an_axis_of_one_stage_opens_by_its_own_name():
  """Alone, and against what is said of all stages."""
  coupled = {"couple": {"layers_1 expand_1": ((1, 2), (2, 4)), "layers_2 expand_2": ((1, 2), (2, 4))}}
  choices = lambda limits: {a: v for a, v in phases.opened(MOBILE, limits).items() if a.startswith("layers")}
  assert choices({"layers_1": 2}) == {"layers_1": (3, 4), "layers_2": (2, 3, 4)}
  assert choices({"layers": 1, "layers_1": 2}) == {"layers_1": (3, 4), "layers_2": (4,)}
  assert phases.opened(coupled, {"layers_2": 1})["couple"] == {
    "layers_1 expand_1": ((1, 2), (2, 4)), "layers_2 expand_2": ((2, 4),)}


def test_what_widens_from_phase_to_phase():
  for space, wanted in ((MOBILE, [["kernel"], ["layers"], ["layers"], ["expand"], ["expand"]]),
                        ({"couple": {"layers_1 expand_1": [[1, 2], [2, 4]]}, "kernel_1": [3, 5]},
                         [["kernel"], ["layers", "expand"]])):
    spaces = [phases.opened(space, phase["open"]) for phase in recipes.phases("ofa", space)]
    assert [phases.widened(*pair) for pair in zip(spaces, spaces[1:])] == wanted


@pytest.mark.parametrize("call, message", [
  (lambda: phases.opened(MOBILE, {"layers_3": 2}), "'layers_3'; did you mean 'layers_[12]'"),
  (lambda: phases.lengths([{"steps": 2}, {"steps": 3}], 6), r"add up to train.steps=6, got \[2, 3\].*share"),
  (lambda: phases.lengths([{"steps": -1}, {"steps": 7}], 6), r"add up to train.steps=6, got \[-1, 7\]"),
  (lambda: phases.lengths([{"steps": 2.0}, {"steps": "a"}], 6), r"got \[2.0, 'a'\]"),
  (lambda: phases.opened(MOBILE, ["layers"]), r"open: got \['layers'\], allowed is a number of choices by axis"),
  (lambda: phases.lengths([{"steps": 2}, {"share": 3}], 6), r"shares \[None, 3\] and steps \[2, None\]"),
  (lambda: phases.lengths([{"share": 2}, {"share": 0}], 6), r"a share above 0 for each"),
  (lambda: phases.lengths([{"share": 1}] * 3, 2), "train.steps=2.*each of the 3 phases"),
  (lambda: phases.opened(MOBILE, {"kernl": 1}), "'kernl'; did you mean 'kernel'"),
  (lambda: phases.opened(MOBILE, {"kernel": 0}), "kernel=0; allowed is a number of choices"),
  (lambda: phases.opened({"couple": {"layers mlp": ((1, 16), (2, 8))}}, {"layers": 1, "mlp": 1}),
   "no row of the coupled choices of 'layers mlp'"),
])
def test_mistakes_are_named(call, message):
  with pytest.raises(UserError, match=message):
    call()
