"""The data of a config: the data set, the crops of its images, and what batches have of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nestnet.cli import check_fields
from nestnet.data import Crops, Dataset, Text, load
from nestnet.errors import UserError
from nestnet.training import Phase


def check_data(data: Mapping[str, Any]) -> None:
  """Raises `ValueError` unless what a config says of the shape, the classes, the crops can be so."""
  shape, classes, crops = data.get("shape"), data.get("classes"), data.get("crops")
  for key in ("length", "vocab"):
    if (value := data.get(key)) is not None and not (isinstance(value, int) and value > 0):
      raise UserError(f"config.data.{key}: got {value}, allowed is a whole number of at least 1")
  if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(
      isinstance(n, int) and n > 0 for n in shape)):
    raise UserError(f"config.data.shape: got {shape}, allowed is (height, width, channels)")
  if classes is not None and not (isinstance(classes, int) and classes > 1):
    raise UserError(f"config.data.classes: got {classes}, allowed is a whole number of at least 2")
  if crops is not None and not isinstance(crops, Mapping):
    raise UserError(f"config.data.crops: got {crops!r}, allowed is a dict, such as {{'global_crops_size': 224}}")
  check_fields(crops or {}, Crops, "data.crops")


def data_of(config: Mapping[str, Any]) -> Dataset | Text:
  """The data set of a config.

  Raises:
    ValueError: As `data.load`, or it is not what the config states of it.
    FileNotFoundError: It is not there.
  """
  data = config["data"]
  dataset = load(data["name"], data.get("data_dir") or None, length=data.get("length") or 0,
                 tokenizer=data.get("tokenizer") or "")
  for key, there in dataset.facts.items():
    if data.get(key) not in (None, there):
      raise UserError(f"config.data.{key}: got {data[key]}, allowed is {there}, as "
                      f"{data['name']} has it here")
  return _cropped(dataset, data)


def stated(data: Mapping[str, Any]) -> Dataset | Text | None:
  """The data set without its examples, where a config states enough of it."""
  if data.get("shape") and data.get("classes"):
    return _cropped(Dataset(data["name"], data["classes"], tuple(data["shape"]), {}), data)
  if data.get("length") and data.get("vocab"):
    return _cropped(Text(data["name"], data["length"], data["vocab"], {}), data)
  return None


def _cropped(dataset: Dataset | Text, data: Mapping[str, Any]) -> Dataset | Text:
  """The data set with the crops that a config asks for."""
  if data.get("crops") is None:
    return dataset
  if not isinstance(dataset, Dataset):
    raise UserError(f"config.data.crops are of images; {dataset.name} is text; allowed with it: none")
  options = {k: tuple(v) if isinstance(v, list) else v for k, v in data["crops"].items() if v is not None}
  return dataset.cropped(Crops(**options))


def entries_of(dataset: Dataset | Text, phases: Sequence[Phase]) -> list[str]:
  """The entries of batches that a run reads, where all its objectives say what, and labels."""
  objectives = [phase.step.recipe.objective for phase in phases]
  read = {"label"}.union(*((*o.needs, *o.uses) for o in objectives)) if all(o.needs for o in objectives) else (
    dataset.entries)
  return [name for name in dataset.entries if name in read]
