"""Pairs and their order, ratios, and what JAX's compile log says."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestnet import errors, timing


class Clock:
  """Calls take time by this clock only."""

  def __init__(self):
    self.seconds, self.calls = 0.0, []

  def __call__(self):
    return self.seconds

  def call(self, name, seconds):
    def run():
      self.calls.append(name)
      self.seconds += seconds[min(self.calls.count(name) - 1, len(seconds) - 1)]
    return run


def test_pairs_are_interleaved_and_the_first_alternates():
  clock = Clock()
  timing.ratio(clock.call("own", [1.0]), [clock.call("a", [1.0]), clock.call("b", [1.0])], 3, clock)
  assert clock.calls == ["own", "a", "b"] * 3 + ["own", "a", "b", "a", "b", "own", "own", "a", "b"]


def test_ratios_are_taken_pair_by_pair():
  clock = Clock()
  # After three calls to warm up. The machine is twice as slow in the second pair: no ratio changes.
  own, base = clock.call("own", [9, 9, 9, 1.5, 3.0, 1.5]), clock.call("base", [7, 7, 7, 1.0, 2.0, 1.0])
  found = timing.ratio(own, base, 3, clock)
  assert (found.lower, found.median, found.upper) == (1.5, 1.5, 1.5)
  assert (found.own_ms, found.base_ms) == (1500, 1000)
  with pytest.raises(errors.UserError, match="pairs: got 0"):
    timing.ratio(own, base, 0)


def test_programs_are_counted_once_each_and_nothing_is_printed(capfd):
  def first(x):
    return jnp.sin(x) + jnp.cumsum(x)

  calls, logger = [jax.jit(first), jax.jit(lambda x: 3 * x)], logging.getLogger("jax")
  before, inputs = list(logger.handlers), jax.device_put(np.ones(2, np.float32))
  with timing.compilations() as found:
    for call in calls * 2:
      call(inputs)
  jax.jit(lambda x: 5 * x)(inputs)
  assert found.programs == ["jit(first)", "jit(<lambda>)"] and 0 < found.seconds < 60
  assert logger.handlers == before and capfd.readouterr().err == ""
