"""Rotary positions: wave lengths, their scaling, and what is turned against what."""

from __future__ import annotations

import numpy as np
import pytest

from nestnet.errors import UserError
from nestnet.models.rotary import frequencies, rotate, scaling

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)


def test_scaled_waves_are_those_of_llama_3():
  """Long waves eight times as long, short ones as they are, and in between a straight line."""
  plain, scaled = frequencies(128, 500000.0), frequencies(128, 500000.0, scaling(LLAMA3))
  waves = 2 * np.pi / plain
  short, long = waves < 8192 / 4, waves > 8192 / 1
  assert short.any() and long.any() and not (short | long).all()
  np.testing.assert_allclose(scaled[short], plain[short])
  np.testing.assert_allclose(scaled[long], plain[long] / 8)
  between = ~(short | long)
  smooth = (8192 / waves[between] - 1) / (4 - 1)
  np.testing.assert_allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between])


def test_halves_turn_as_one_complex_number():
  x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
  positions, angles = np.array([[0, 1, 5]]), frequencies(8, 100.0)
  turned = np.asarray(rotate(x, positions, angles))
  z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, :, None, None] * angles[None, None, None])
  np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)


def test_scaling_is_pairs_in_order_and_none_where_there_is_none():
  pairs = scaling(LLAMA3)
  assert scaling([list(pair) for pair in pairs[::-1]]) == pairs == tuple(sorted(LLAMA3.items()))
  assert scaling(None) is scaling({}) is None
  with pytest.raises(ValueError, match="type llama3: got extra, .*allowed are rope_type, factor, high_freq"):
    scaling(LLAMA3 | {"extra": 1})


@pytest.mark.parametrize("given, message", [
  ([1], r"rope_scaling: got \[1\]; allowed is a mapping"),
  ({"rope_type": ["linear"], "factor": 2.0}, "unknown rope_type"),
  (LLAMA3 | {"factor": "8"}, "factor='8'; allowed is a number above 0"),
  (LLAMA3 | {"factor": True}, "factor=True; allowed is a number above 0"),
  ({"rope_type": "linear", "factor": 0}, "factor=0; allowed is a number above 0"),
  (LLAMA3 | {"low_freq_factor": 4.0}, "high_freq_factor=4.0; allowed is a number above low_freq_factor=4.0")])
def test_what_is_no_scaling_is_said(given, message):
  with pytest.raises(UserError, match=message):
    scaling(given)
