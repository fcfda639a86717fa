"""What users name in a config by import path."""

from __future__ import annotations

import importlib
import os
from typing import Any

from nestnet import errors


def by_path(path: str, what: str) -> Any:
  """The object that an import path `package.module:Name` names.

  Args:
    path: The import path.
    what: What messages call it, such as `"data set"`.

  Raises:
    ValueError: There is no such module or no such name in it.

  Example:
    >>> by_path("math:gcd", "function")(12, 18)
    6
  """
  module_name, _, attribute = path.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # A missing import inside the user's module is the user's to see whole.
    if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
      raise
    raise errors.UserError(
      f"{what} {path!r}: no module {error.name!r}; allowed is package.module:Name, importable from "
      f"{os.getcwd()} or PYTHONPATH") from error
  if not hasattr(module, attribute):
    names = [name for name in vars(module) if not name.startswith("_")]
    raise errors.one_of(f"{what} in {module_name}", attribute, names)
  return getattr(module, attribute)
