"""The model card of an exported network: what it is, where it comes from, how good it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nestnet
---

# {architecture}, {params:,} parameters

A member of a nested family, cut with nestnet out of one network that contains them all. It is an ordinary
{architecture}: `AutoModelForCausalLM.from_pretrained` loads it.

| | |
|---|---|
{rows}
"""
_SIZES = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
          "heads of keys and values": "num_key_value_heads", "width of a head": "head_dim",
          "width of the MLP": "intermediate_size", "vocabulary": "vocab_size",
          "context": "max_position_embeddings", "type of the weights": "torch_dtype"}
# Longer values, such as the choices of a space, are in nestnet.json.
_LONGEST = 200


def card_text(config: Mapping[str, Any], params: int, record: Mapping[str, Any]) -> str:
  """A `README.md` as Hugging Face's hub shows it.

  Args:
    config: The `config.json`.
    params: Number of parameters.
    record: Provenance and figures: nested mappings of numbers and texts.

  Example:
    >>> config = dict.fromkeys(_SIZES.values(), 2) | {"architectures": ["LlamaForCausalLM"]}
    >>> print(card_text(config, 12_345, {"parent": {"run": "runs/a", "step": 7}}))
    ---
    ...
    # LlamaForCausalLM, 12,345 parameters
    ...
    | parent: run | runs/a |
    | parent: step | 7 |
    <BLANKLINE>
  """
  sizes = {name: config[key] for name, key in _SIZES.items()}
  rows = [f"| {name} | {_shown(value)} |" for name, value in (*sizes.items(), *_flat(record))]
  return _TEXT.format(architecture=config["architectures"][0], params=params, rows="\n".join(rows))


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in record.items():
    name = prefix + str(key).replace("_", " ")
    if isinstance(value, Mapping):
      yield from _flat(value, f"{name}: ")
    elif value not in (None, "", [], ()):
      yield name, value


def _shown(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return textwrap.shorten(text, _LONGEST, placeholder=" ...").replace("|", "\\|")
  return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
