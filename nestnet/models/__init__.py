"""Architectures in plain linen: ordinary modules whose parameters carry axis names."""

from __future__ import annotations

import importlib

import flax.linen as nn

ARCHITECTURES = {"ViT": "nestnet.models.vit:ViT"}


def architecture(name: str) -> type[nn.Module]:
  """The class of one of nestnet's own architectures."""
  module, _, attribute = ARCHITECTURES[name].partition(":")
  return getattr(importlib.import_module(module), attribute)
