"""Architectures in plain linen: ordinary modules whose parameters carry axis names."""

from __future__ import annotations

import importlib

import flax.linen as nn

from nestnet.errors import one_of

ARCHITECTURES = {
  "ViT": "nestnet.models.vit:ViT", "Decoder": "nestnet.models.decoder:Decoder",
  "MobileNet": "nestnet.models.mobilenet:MobileNet",
  "MobileNetV3": "nestnet.models.mobilenet_v3:MobileNetV3",
  "SmallMobileNet": "nestnet.models.small_mobilenet:SmallMobileNet",
  "BigNAS": "nestnet.models.big_nas:BigNAS", "AttentiveNAS": "nestnet.models.big_nas:AttentiveNAS",
  "ProxylessNAS": "nestnet.models.proxyless_nas:ProxylessNAS",
  "ResNet50D": "nestnet.models.resnet50d:ResNet50D",
  "SmallResNet": "nestnet.models.small_resnet:SmallResNet",
  "ResNet": "nestnet.models.resnet:ResNet", "TinyResNet": "nestnet.models.tiny_resnet:TinyResNet",
  "Swin": "nestnet.models.swin:Swin"}


def architecture(name: str) -> type[nn.Module]:
  """The class of one of nestnet's own architectures; raises `ValueError` for an unknown name."""
  if name not in ARCHITECTURES:
    raise one_of("model", name, (*ARCHITECTURES, "package.module:Name"))
  module, _, attribute = ARCHITECTURES[name].partition(":")
  return getattr(importlib.import_module(module), attribute)
