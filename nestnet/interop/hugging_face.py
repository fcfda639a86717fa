"""Decoders as Hugging Face folders, in and out, without PyTorch: Llama, Qwen3, Mistral.

    module, variables = read_folder("Llama-3.2-1B")
    logits = module.apply(variables, tokens)["logits"]
    write_folder("half", *extract(module, variables, Subnet(mlp=4096), tokens), tokenizer_from="Llama-3.2-1B")

What is written is an ordinary folder for `AutoModelForCausalLM.from_pretrained`. Only JSON and
safetensors are read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from nestnet.errors import MissingFileError, UserError, counted
from nestnet.files import atomic_folder
from nestnet.interop.cards import card_text
from nestnet.interop.layouts import (
  EMBEDDING, HEAD, LAYOUTS, Place, computed, config_of, fields_of, mismatch, places, shapes_of, uneven)
from nestnet.interop.ours import FORMAT, PROVENANCE, check_replaceable
from nestnet.models.decoder import Decoder
from nestnet.space import Space, volume
from nestnet.subnet import Subnet, is_depth

SHARD_BYTES = 5 * 10**9
# What may be copied from the folder of a parent: no code, no weights.
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")
BESIDE = (*TOKENIZER, "generation_config.json")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
CONVERT = ("python -c \"import sys; from transformers import AutoModelForCausalLM as m; "
           "m.from_pretrained(sys.argv[1], torch_dtype='auto').save_pretrained(sys.argv[2])\" {} OUT")


def is_folder(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder has a `config.json` of `transformers`."""
  try:
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
  except (OSError, ValueError):
    return False
  return (isinstance(config, Mapping) and config.get("format") != FORMAT
          and not {"architectures", "model_type"}.isdisjoint(config))


def read_folder(folder: str | os.PathLike[str]) -> tuple[Decoder, dict[str, Any]]:
  """Reads a decoder: `module, variables = read_folder(folder)`, ready for `module.apply`.

  Args:
    folder: With `config.json` and `model.safetensors`, or the index of its parts.

  Returns:
    The network in the type of its weights (of several, the one that holds all), and
    `{"params": ...}`. `module.clone(dtype=...)` computes in another.

  Raises:
    ValueError: The architecture is not supported; or weights are missing, unexpected, of another shape or
      type, which are counted and the first of them listed; or a file is damaged.
    FileNotFoundError: There is no such folder, or no weights that may be read.
  """
  module, files, found = _opened(folder)
  leaves = {path: np.empty(shape.shape, shape.dtype) for path, shape in shapes_of(module).items()}
  head = None
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():
        if name in found:
          place, array = found[name], tensors.get_tensor(name)
          leaf = leaves[place.path] if place.layer is None else leaves[place.path][place.layer]
          leaf[...] = place.to_ours(array)
        elif name == HEAD:
          head = tensors.get_tensor(name)
  if head is not None and not np.array_equal(head, leaves[found[EMBEDDING].path].astype(head.dtype)):
    raise UserError(f"{folder}: config.json says tie_word_embeddings=true, and {HEAD} is not {EMBEDDING}")
  return module, {"params": unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})}


def peek(folder: str | os.PathLike[str]) -> Decoder:
  """The network of `read_folder`; of the weights only names, shapes and types are read, and checked.

  Raises:
    ValueError: As `read_folder`.
    FileNotFoundError: As `read_folder`.
  """
  return _opened(folder)[0]


def model_fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """`config.model` of a network as in a folder: `config.model = model_fields(folder)`.

  Raises:
    ValueError: The architecture is not supported, or `config.json` is damaged.
    FileNotFoundError: There is no such folder.
  """
  folder = pathlib.Path(folder)
  return {"name": "Decoder", **fields_of(_config(folder), str(folder))}


def end_tokens(folder: str | os.PathLike[str]) -> list[int]:
  """The tokens that end a text, as `generation_config.json` and `config.json` of a folder name them.

  Raises:
    ValueError: A file is damaged, or names something else than tokens.
  """
  found = []
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(folder) / name
    if not path.is_file():
      continue
    try:
      value = dict(json.loads(path.read_text())).get("eos_token_id")
    except (OSError, ValueError, TypeError) as error:
      raise UserError(f"{path} is damaged: {error}") from error
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in tokens):
      raise UserError(f"{path}: eos_token_id={value!r}; allowed is a token's number, or a list of them")
    found += tokens
  return list(dict.fromkeys(found))


def _opened(folder: str | os.PathLike[str]) -> tuple[Decoder, list[pathlib.Path], dict[str, Place]]:
  """The network of a folder, its files, and where each tensor goes; what is in the files is checked."""
  folder = pathlib.Path(folder)
  fields = fields_of(_config(folder), str(folder))
  files = _files(folder)
  shapes, types = {}, {}
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():
        part = tensors.get_slice(name)
        shapes[name], types[name] = tuple(part.get_shape()), part.get_dtype()
  try:
    module = Decoder(**fields)
  except UserError as error:
    raise UserError(f"{folder}/config.json: {error}") from error
  found = places(module)
  expected = {name: place.theirs for name, place in found.items()}
  got = {name: shape for name, shape in shapes.items() if not computed(name)}
  if module.tied and got.get(HEAD) == expected[EMBEDDING]:
    del got[HEAD]
  problems = mismatch(expected, got) | {"of a type that is not supported": [
    f"{name}: got {types[name]}, supported are {', '.join(_TYPES)}" for name in expected
    if name in types and types[name] not in _TYPES]}
  if any(problems.values()):
    raise counted(f"the weights in {folder} are not those of its config.json", problems)
  dtype = jnp.dtype(functools.reduce(jnp.promote_types, {_TYPES[types[name]] for name in found}))
  return module.clone(dtype=dtype, param_dtype=dtype), files, found


def _config(folder: pathlib.Path) -> dict[str, Any]:
  if not (folder / "config.json").is_file():
    what = "config.json is missing" if folder.is_dir() else "there is no such folder"
    raise MissingFileError(f"no Hugging Face folder {folder}: {what}. This makes one, where there is a "
                           "network: hf download REPOSITORY --local-dir=FOLDER")
  try:
    return dict(json.loads((folder / "config.json").read_text()))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{folder}/config.json is damaged: {error}") from error


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of weights: one, or those that an index names."""
  if (folder / _SINGLE).is_file():
    return [folder / _SINGLE]
  if not (folder / _INDEX).is_file():
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (
      ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"))
    pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in there)
    hint = (". Pickles are not read; where PyTorch and transformers are installed, this writes safetensors:"
            f"\n  {CONVERT.format(folder)}") * pickled
    raise MissingFileError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; of weights there are: "
                           f"{', '.join(there) or 'none'}{hint}")
  try:
    named = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    paths = [folder / name for name in named]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{folder / _INDEX} is damaged: {error}") from error
  for path in paths:
    if path.parent != folder:
      raise UserError(f"{folder / _INDEX} names {path}; allowed are files beside it")
  if missing := [path.name for path in paths if not path.is_file()]:
    raise MissingFileError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names")
  return paths


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Any]:
  try:
    with safetensors.safe_open(file, framework="numpy") as tensors:
      yield tensors
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{file} is damaged: {error}") from error


def write_folder(folder: str | os.PathLike[str], module: nn.Module, variables: Mapping[str, Any], *,
                 tokenizer_from: str | os.PathLike[str] | None = None, card: Mapping[str, Any] | None = None,
                 check: Callable[[pathlib.Path], None] | None = None, member: Subnet | None = None,
                 space: Space | None = None, shard_bytes: int = SHARD_BYTES) -> None:
  """Writes a decoder for `AutoModelForCausalLM.from_pretrained`, whole or not at all.

  The folder has `config.json`, the weights in the type in which they are given (in parts with an index,
  where they are many), a model card `README.md`, and `nestnet.json`, which says that nestnet made it.

  Args:
    folder: Where; an extracted network that stands there is replaced.
    module: A `Decoder` whose layers are of one size.
    variables: Its variables, of which `params` are written.
    tokenizer_from: A folder whose tokenizer, generation config and special tokens are taken over; or a
      `tokenizer.json`. Where no end of texts is named there, it is that of `nestnet.data.tokenizer`. None:
      the 256 tokens of a network that has so many are bytes, and 0 ends a text.
    card: What the card and `nestnet.json` say: parent, recipe, sub-network, costs, metrics.
    check: As in `nestnet.save`.
    member: Which sub-network it is; with `space`, to say which others are near where it is refused.
    space: Its family.
    shard_bytes: The most that one file of weights holds, but for a tensor that is larger.

  Raises:
    ValueError: The network is no decoder, or `transformers` has none with such sizes; or the variables are
      not its own; or `folder` holds something else than an extracted network; or the tokenizer has no end
      of texts, or one that the network lacks.
    FileNotFoundError: There is no tokenizer in `tokenizer_from`.
  """
  folder = pathlib.Path(folder)
  check_exportable(module, member, space)
  leaves = flatten_dict(dict(meta.unbox(variables))["params"])
  shapes = lambda tree: {"/".join(path): tuple(leaf.shape) for path, leaf in tree.items()}
  problems = mismatch(shapes(shapes_of(module)), shapes(leaves))
  if any(problems.values()):
    raise counted("the variables are not those of the module", problems)
  dtype = functools.reduce(jnp.promote_types, {leaf.dtype for leaf in leaves.values()})
  if dtype not in map(jnp.dtype, _TYPES.values()):
    raise UserError(f"the weights are {dtype}; allowed are float32, float16 and bfloat16")
  config, copied = config_of(module, str(dtype)), _copied(tokenizer_from)
  config |= _tokens(tokenizer_from, module.vocab)
  end = config["eos_token_id"]
  said = {"tokens": f"bytes; {end} ends a text"} if _bytes(tokenizer_from, module.vocab) else {}
  check_replaceable(folder)
  with atomic_folder(folder) as hidden:
    (hidden / "config.json").write_text(_dumped(config))
    (hidden / PROVENANCE).write_text(_dumped({"format": "hugging_face", **(card or {})}))
    count = sum(leaf.size for leaf in leaves.values())
    (hidden / "README.md").write_text(card_text(config, count, said | dict(card or {})))
    _write_tensors(hidden, places(module), leaves, shard_bytes)
    for name, path in copied.items():
      shutil.copyfile(path, hidden / name)
    _end_generation(hidden / "generation_config.json", end)
    if check:
      check(hidden)


def check_exportable(module: nn.Module, member: Subnet | None = None, space: Space | None = None) -> None:
  """Raises `ValueError` where `write_folder` would refuse a network for its kind or its sizes."""
  if type(module) is not Decoder:
    raise UserError(f"Hugging Face's folders are written of a Decoder, got a {type(module).__name__}; "
                    "allowed is --format=safetensors")
  if lists := uneven(module):
    text = ", ".join(f"{field}={':'.join(map(str, getattr(module, field)))}" for field in lists)
    known = ", ".join(layout.architecture for layout in LAYOUTS)
    raise UserError(f"{text}: layers differ, and {known} have one size for all layers"
                    f"{_nearest(member, space)}; --format=safetensors holds any member")
  config_of(module, "float32")


def _nearest(member: Subnet | None, space: Space | None) -> str:
  """The uniform members next to one with lists, smaller and larger, in words."""
  if member is None or space is None:
    return ""
  lists = [axis for axis, size in member.chosen.items() if isinstance(size, tuple) and not is_depth(axis)]
  found = []
  for sizes in itertools.product(*map(space.sizes, lists)):
    with contextlib.suppress(UserError):
      found.append(space.subnet({**member.chosen, **dict(zip(lists, sizes))}))
  below = [other for other in found if volume(other) <= volume(member)]
  above = [other for other in found if volume(other) > volume(member)]
  near = [*([f"not larger: {max(below, key=volume)}"] if below else []),
          *([f"larger: {min(above, key=volume)}"] if above else [])]
  return f". The nearest uniform members: {'; '.join(near)}" if near else ""


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder has a tokenizer for `write_folder` to take over."""
  return any((pathlib.Path(folder) / name).is_file() for name in TOKENIZER)


def _copied(source: str | os.PathLike[str] | None) -> dict[str, pathlib.Path]:
  """What is copied from a parent, by the name that it gets."""
  if source is None:
    return {}
  source = pathlib.Path(source)
  if source.is_file():
    return {"tokenizer.json": source}
  found = {name: source / name for name in BESIDE if (source / name).is_file()}
  if not has_tokenizer(source):
    raise MissingFileError(f"no tokenizer in {source}; looked for {', '.join(TOKENIZER)}")
  return found


def _tokens(source: str | os.PathLike[str] | None, vocab: int) -> dict[str, Any]:
  """The special tokens that the config of a parent names, and the tokenizer's end where it names none."""
  config = _config(pathlib.Path(source)) if source is not None and is_folder(source) else {}
  found = {key: config[key] for key in _TOKENS if key in config}
  return found if found.get("eos_token_id") is not None else found | {"eos_token_id": _end(source, vocab)}


def _bytes(source: str | os.PathLike[str] | None, vocab: int) -> bool:
  """Whether tokens are bytes: those of a network that has so many, and no tokenizer."""
  # Data sets take long to import.
  from nestnet.data.tokenization import BYTES
  return source is None and vocab == BYTES.vocab


def _end(source: str | os.PathLike[str] | None, vocab: int) -> int | None:
  """The token that ends a text; None where nothing says which."""
  from nestnet.data.tokenization import BYTES, tokenizer
  if source is None:
    return BYTES.end if _bytes(source, vocab) else None
  if pathlib.Path(source).is_dir() and not (pathlib.Path(source) / "tokenizer.json").is_file():
    return None
  made = tokenizer(source)
  if made.end >= vocab:
    raise UserError(f"the tokenizer {made.name} ends a text with token {made.end}; allowed is one of the "
                    f"network's, 0 to {vocab - 1}")
  return made.end


def _end_generation(file: pathlib.Path, end: int | list[int] | None) -> None:
  """Names the end of texts in a generation config that names none: `transformers` looks nowhere else."""
  try:
    content = json.loads(file.read_text())
  except (OSError, ValueError):
    return
  if isinstance(content, dict) and content.get("eos_token_id") is None and end is not None:
    file.write_text(_dumped(content | {"eos_token_id": end}))


def _write_tensors(folder: pathlib.Path, found: Mapping[str, Place], leaves: Mapping[tuple[str, ...], Any],
                   most: int) -> None:
  size = lambda name: int(np.prod(found[name].shape)) * leaves[found[name].path].dtype.itemsize
  parts, room = [], 0
  for name in sorted(found, key=_position):
    if not parts or size(name) > room:
      parts.append([])
      room = most
    parts[-1].append(name)
    room -= size(name)
  files = [_SINGLE] if len(parts) == 1 else [
    f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
  leaves = {path: np.asarray(jax.device_get(leaf)) for path, leaf in leaves.items()}
  for file, names in zip(files, parts):
    tensors = {}
    for name in names:
      place = found[name]
      leaf = leaves[place.path]
      tensors[name] = place.to_theirs(leaf if place.layer is None else leaf[place.layer])
    # Older versions of transformers refuse a file that does not say so.
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    # That makes files which their owner alone may read, whatever the umask says.
    shutil.copymode(folder / "config.json", folder / file)
  if len(parts) > 1:
    total = sum(map(size, found))
    (folder / _INDEX).write_text(_dumped({"metadata": {"total_size": total}, "weight_map": {
      name: file for file, names in zip(files, parts) for name in names}}))


def _position(name: str) -> float:
  """Where a tensor stands in a forward pass."""
  layer = re.search(r"\.(\d+)\.", name)
  return int(layer[1]) if layer else -1 if name == EMBEDDING else float("inf")


def _dumped(content: Any) -> str:
  return json.dumps(content, indent=2) + "\n"
