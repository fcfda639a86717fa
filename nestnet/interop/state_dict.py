"""State dicts of PyTorch as safetensors files; pickles are not read here."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from nestnet.errors import MissingFileError, UserError

# Makes a safetensors file of a published one.
CONVERT = (
  "python -c \"import sys, torch, safetensors.torch as s; f = torch.load(sys.argv[1], map_location='cpu', "
  "weights_only=True); s.save_file({k: v.clone().contiguous() for k, v in f.get('state_dict', f).items()}, "
  "sys.argv[2])\" PUBLISHED OUT.safetensors")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """The tensors of a `.safetensors` file by name.

  Raises:
    ValueError: What is named is no such file; how to make one is said.
    FileNotFoundError: There is no such file.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise UserError(f"state is {path!r}; allowed are a mapping of names to arrays and the path of a "
                    ".safetensors file")
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f"{path} is a folder; allowed is a .safetensors file")
  if not path.is_file():
    raise MissingFileError(f"no file {path}")
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UserError(f"{path} is no safetensors file ({error}). This makes one from a published file, where "
                    f"PyTorch is installed:\n  {CONVERT}") from error
