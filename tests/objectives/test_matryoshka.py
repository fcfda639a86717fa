"""MRL (2205.13147, eq. 1): the sum over sizes m of c_m * CE(W_m z[:m] + b_m)."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from nestnet.errors import UserError
from nestnet.objectives import Targets, objective
from nestnet.slicing import take
from nestnet.space import Space
from nestnet.subnet import Subnet

SIZES, CLASSES = (2, 4, 8), 3
SPACE = Space(features=SIZES)
MODEL = types.SimpleNamespace(classes=CLASSES)
RNG = np.random.default_rng(0)
Z, LABELS = RNG.normal(size=(6, 8)).astype(np.float32), RNG.integers(0, CLASSES, 6)


def made(**options):
  mrl = objective("matryoshka", sizes=SIZES, **options)
  params, axes, state = mrl.init(jax.random.key(0), MODEL, SPACE)
  assert state == {}
  return mrl, jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), params), axes


def ce(logits, smoothing=0.0):
  log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return np.mean([-(1 - smoothing) * log[i, y] - smoothing * log[i].mean()
                  for i, y in enumerate(LABELS)])


def head(params, tied, m):
  own = params if tied else params[str(m)]
  return own["kernel"][:m], own["bias"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights, smoothing", [((), 0.0), ((0.5, 1.0, 2.0), 0.1)])
def test_loss_is_the_weighted_sum(tied, weights, smoothing):
  mrl, params, _ = made(tied=tied, weights=weights, label_smoothing=smoothing)
  value, metrics = mrl.loss(params, {}, {"features": Z}, Targets({"label": LABELS}), 0, None)
  wanted, heads = 0.0, {m: head(params, tied, m) for m in SIZES}
  for c, (m, (kernel, bias)) in zip(weights or (1, 1, 1), heads.items()):
    logits = Z[:, :m] @ kernel + bias
    wanted += c * ce(logits, smoothing)
    np.testing.assert_allclose(metrics[f"accuracy_{m}"], np.mean(logits.argmax(1) == LABELS))
  np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_one_head_a_size_or_one_matrix_with_one_bias():
  _, params, axes = made()
  assert {m: p["kernel"].shape for m, p in params.items()} == {str(m): (m, CLASSES) for m in SIZES}
  assert jax.tree.structure(params) == jax.tree.structure(axes)
  _, params, axes = made(tied=True)
  assert params["kernel"].shape == (8, CLASSES) and params["bias"].shape == (CLASSES,)
  assert take(params, axes, Subnet(features=4))["kernel"].shape == (4, CLASSES)


@pytest.mark.parametrize("tied", [False, True])
def test_attach_replaces_the_models_head(tied):
  """Evaluation and extraction hand `attach` the objective's weights already cut."""
  mrl, params, axes = made(tied=tied, head="head")
  variables = {"params": {"head": None, "stem": 1}, "constants": 2}
  small = Subnet(features=4)
  found = mrl.attach(variables, take(params, axes, small, strict=False), small)
  kernel, bias = head(params, tied, 4)
  np.testing.assert_array_equal(found["params"]["head"]["kernel"], kernel)
  np.testing.assert_array_equal(found["params"]["head"]["bias"], bias)
  assert found["params"]["stem"] == 1 and found["constants"] == 2
  assert variables["params"]["head"] is None


def test_mistakes_are_named():
  with pytest.raises(UserError, match="2 weights for the 3 sizes"):
    objective("matryoshka", sizes=SIZES, weights=(1.0, 2.0))
  other = objective("matryoshka", sizes=(2, 8))
  for space in (SPACE, Space(embed=(2, 8))):
    with pytest.raises(UserError, match="sizes .2, 8. must be the space's choices of features"):
      other.init(jax.random.key(0), MODEL, space)
