"""Freed memory is kept for the next step."""

import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from nestnet import memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "keep" and not memory.keep_freed():
  sys.exit("no glibc")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
  buffers = [libc.malloc(8 << 20) for _ in range(5)]
  for buffer in buffers:
    ctypes.memset(buffer, 1, 8 << 20)
  for buffer in buffers:
    libc.free(ctypes.c_void_p(buffer))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
  done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True)
  if "no glibc" in done.stderr:
    pytest.skip("the C library is not glibc")
  return int(done.stdout)


def test_pages_are_mapped_once():
  assert faults("keep") < 0.2 * faults("leave")
