"""Files and folders that are either whole or absent."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


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


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a hidden folder to write to, which then takes the place of `folder`, whole or not at all.

  What is raised inside leaves `folder` as it was. `written` says where to read one whose writer was
  killed between the two renames.

  Args:
    folder: The folder to write or replace. Missing parent folders are made.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "notes"
    >>> with atomic_folder(folder) as hidden:
    ...   (hidden / "a.txt").write_text("whole")
    5
    >>> [path.name for path in folder.iterdir()]
    ['a.txt']
  """
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  _put_back(folder)
  hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
  hidden.mkdir()
  try:
    yield hidden
    if folder.exists():
      os.rename(folder, folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old"))
    os.rename(hidden, folder)
    for replaced in _moved_aside(folder):
      shutil.rmtree(replaced, ignore_errors=True)
  finally:
    shutil.rmtree(hidden, ignore_errors=True)
    _put_back(folder)


def written(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Where a folder of `atomic_folder` is to be read, even while it is replaced."""
  folder = pathlib.Path(folder)
  # Read where it lies: to rename it would hinder a writer that is at work.
  return folder if folder.exists() else next(iter(_moved_aside(folder)), folder)


def _moved_aside(folder: pathlib.Path) -> list[pathlib.Path]:
  """What was moved away to make room, the newest first."""
  found = folder.parent.glob(f".{glob.escape(folder.name)}.{'?' * 32}.old")
  return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _put_back(folder: pathlib.Path) -> None:
  """Undoes half of an exchange: a killed writer may have left nothing under the folder's name."""
  if not folder.exists() and (aside := _moved_aside(folder)):
    os.rename(aside[0], folder)
