"""Strict settings for every test: 8 devices, no silent broadcasting of ranks, one compilation cache."""

import os
import pathlib

import jax
import pytest

from nestnet.timing import compilations

CACHE = pathlib.Path(os.environ.get("NESTNET_TEST_CACHE", "~/.cache/nestnet/compiled")).expanduser()

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture
def compiled():
  """The names of the programs that a test has compiled until now, such as `"jit(step)"`.

  JAX's own count of what a function has compiled forgets what has not run for a while.
  """
  with compilations() as found:
    yield found.programs


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory):
  """Embedded data sets are prepared once, in a folder of the test's own."""
  previous = os.environ.get("TFDS_DATA_DIR")
  worker = os.environ.get("PYTEST_XDIST_WORKER", "")
  os.environ["TFDS_DATA_DIR"] = str(tmp_path_factory.getbasetemp().parent / f"nestnet_data{worker}")
  yield
  if previous is None:
    del os.environ["TFDS_DATA_DIR"]
  else:
    os.environ["TFDS_DATA_DIR"] = previous
