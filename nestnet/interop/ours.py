"""Which folders nestnet made, and may replace."""

from __future__ import annotations

import json
import pathlib

from nestnet.errors import UserError

FORMAT = "nestnet"
# Beside the config of another format: what made the folder, and from what.
PROVENANCE = "nestnet.json"


def check_replaceable(folder: pathlib.Path) -> None:
  """Raises `ValueError` where something stands that is no extracted network."""
  if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
    raise UserError(f"{folder} exists and is no extracted network; name another folder or remove it")


def _is_ours(folder: pathlib.Path) -> bool:
  if (folder / PROVENANCE).is_file():
    return True
  try:
    return json.loads((folder / "config.json").read_text())["format"] == FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    return False
