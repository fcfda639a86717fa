"""Atomic writes."""

from __future__ import annotations

import doctest
import os

import pytest

from nestnet import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "a.txt"
  files.atomic_write(path, "old ±")
  with pytest.raises(UnicodeEncodeError):
    files.atomic_write(path, "new \ud800")
  assert path.read_text(encoding="utf-8") == "old ±"
  assert os.listdir(tmp_path) == ["a.txt"]


def test_readers_of_the_old_file_keep_it(tmp_path):
  path = tmp_path / "a.bin"
  files.atomic_write(path, b"old")
  with open(path, "rb") as reader:
    files.atomic_write(path, b"new")
    assert reader.read() == b"old"
  assert path.read_bytes() == b"new"


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
  files.atomic_write(tmp_path / "a", "x")
  (tmp_path / "b").write_text("x")
  assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_examples():
  assert doctest.testmod(files).failed == 0
