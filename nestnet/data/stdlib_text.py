"""The embedded text: the source code of the running Python's own standard library.

Megabytes of real text that every machine has, so that a language model trains without a network. It
differs between versions of Python: its hash says which one a run saw.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterable

from nestnet import errors

# One file in so many is for test, one for validation.
HELD_OUT = 20

# Folders, at any depth, that are left out. What is no part of the standard library, or is packaged apart or
# left away by distributions, so that one version of Python gives one text wherever it comes from:
_NOT_EVERYWHERE = ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo",
                   "lib2to3", "distutils", "ensurepip")
# What a program wrote: tables of characters, the manual as one string.
_GENERATED = ("encodings", "pydoc_data", "__pycache__")
_FOLDERS = frozenset((*_NOT_EVERYWHERE, *_GENERATED))
# Written when Python was built or installed, with the paths of that machine.
_OF_THE_BUILD = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@functools.cache
def documents(root: str = "") -> tuple[tuple[str, bytes], ...]:
  """The files of the standard library: `(path, content)`, sorted by path.

  Args:
    root: The folder of another library; that of the running Python by default.

  Raises:
    ValueError: There are none, as where Python came without its sources.

  Example:
    >>> found = dict(documents())
    >>> "heapq.py" in found, any(path.startswith(("test/", "site-packages/")) for path in found)
    (True, False)
  """
  folder, paths = pathlib.Path(root or sysconfig.get_path("stdlib")), []
  for at, folders, names in os.walk(folder):
    # Not walked either: thousands of packages may be installed there.
    folders[:] = [name for name in folders if _is_kept(name) and name not in _FOLDERS]
    paths += [pathlib.Path(at, name) for name in names if name.endswith(".py") and _is_kept(name)]
  named = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
  found = tuple((name, path.read_bytes()) for name, path in named)
  if not found:
    raise errors.MissingFileError(
      f"data set 'stdlib_text': no .py files in {folder}; allowed is a Python that has the sources of its "
      "standard library")
  return found


def _is_kept(name: str) -> bool:
  return not name.startswith(_OF_THE_BUILD)


def split_of(path: str) -> str:
  """The split of a file: decided by the hash of its path alone, so that a new version moves none.

  Example:
    >>> split_of("heapq.py"), split_of("enum.py"), split_of("ast.py"), split_of("abc.py")
    ('validation', 'test', 'test', 'train')
  """
  number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % HELD_OUT
  return {0: "test", 1: "validation"}.get(number, "train")


def splits(found: Iterable[tuple[str, bytes]]) -> dict[str, list[dict[str, bytes]]]:
  """Files by split, each a document with its `text`."""
  parts: dict[str, list[dict[str, bytes]]] = {"train": [], "validation": [], "test": []}
  for path, content in found:
    parts[split_of(path)].append({"text": content})
  return parts


def sha256(found: Iterable[tuple[str, bytes]]) -> str:
  """The hash of files: of each one's path and content, both with their lengths."""
  whole = hashlib.sha256()
  for path, content in found:
    for part in (path.encode(), content):
      whole.update(f"{len(part)}:".encode() + part)
  return whole.hexdigest()


def about(found: Iterable[tuple[str, bytes]]) -> str:
  """One line that says which text it is."""
  found = tuple(found)
  size = sum(len(content) for _, content in found)
  return (f"{len(found)} files of the standard library of Python {platform.python_version()}, {size:,} "
          f"bytes, sha256 {sha256(found)}")
