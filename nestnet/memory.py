"""Memory of the host process."""

from __future__ import annotations

import ctypes
import ctypes.util

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed() -> bool:
  """Makes glibc keep freed memory for the next allocation; call it before the first step.

  XLA allocates its buffers anew at every step on CPU. By default glibc gives large ones back to the
  kernel, which must then clear and map every page again.

  Returns:
    Whether the C library took the settings; False where it is not glibc.
  """
  name = ctypes.util.find_library("c")
  mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
  if mallopt is None:
    return False
  settings = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
  return all([mallopt(option, value) for option, value in settings])
