"""Files that are either whole or absent."""

from __future__ import annotations

import os
import pathlib
import uuid


def atomic_write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes a file so that readers see the old content or the whole new one, never a part.

  The content goes to a hidden file in the same folder, reaches the disk, and is renamed over the
  target. Missing parent folders are made. A process killed in between leaves the target as it was.

  Args:
    path: the file to write or replace.
    content: text (written as UTF-8) or bytes.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes" / "a.txt"
    >>> atomic_write(path, "whole")
    >>> path.read_text()
    'whole'
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Not tempfile: its files are readable by their owner only, and so would the result be.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with open(temporary, "xb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
