"""Networks whose stages have elastic widths: BigNAS (2003.11142) and AttentiveNAS (2011.09011).

One kernel and one expansion serve a whole stage. The choices are arguments of `mobilenet.space`:

    space(AttentiveNAS(1000), **ATTENTIVE_NAS)

Both papers vary the resolution beside, and a shortcut here is projected where widths are equal too.
"""

from __future__ import annotations

from typing import Any

from nestnet.models.mobilenet import MobileNet
from nestnet.subnet import Size

BIG_NAS: dict[str, Any] = {
  "tie": "stage", "kernel": (3, 5), "expand": (6,),
  "stem": (32, 40), "embed_0": (16, 24), "embed_1": (24, 32), "embed_2": (40, 48), "embed_3": (80, 88),
  "embed_4": (112, 120, 128), "embed_5": (192, 200, 208, 216), "embed_6": (320, 328, 336, 344, 352),
  "layers_0": (1, 2), "layers_1": (2, 3), "layers_2": (2, 3), "layers_3": (2, 3, 4),
  "layers_4": (2, 3, 4, 5, 6), "layers_5": (2, 3, 4, 5, 6), "layers_6": (1, 2),
  "features": tuple(range(1280, 1409, 8))}

ATTENTIVE_NAS: dict[str, Any] = {
  "tie": "stage", "kernel": (3, 5), "expand": (4, 5, 6), "expand_5": (6,), "expand_6": (6,),
  "stem": (16, 24), "embed_0": (16, 24), "embed_1": (24, 32), "embed_2": (32, 40), "embed_3": (64, 72),
  "embed_4": (112, 120, 128), "embed_5": (192, 200, 208, 216),
  "layers_0": (1, 2), "layers_1": (3, 4, 5), "layers_2": (3, 4, 5, 6), "layers_3": (3, 4, 5, 6),
  "layers_4": (3, 4, 5, 6, 7, 8), "layers_5": (3, 4, 5, 6, 7, 8), "layers_6": (1, 2),
  "features": (1792, 1984),
  # The convolution behind the stages has six times their channels.
  "couple": {"embed_6 head_0": ((216, 1296), (224, 1344))}}


class BigNAS(MobileNet):
  """The largest network of BigNAS: kernels of 3 x 3 in the first two stages, else up to 5 x 5.

  Example:
    >>> BigNAS(1000).hidden(1)[:2]
    (144, 192)
  """

  layers_0: int | None = 2
  layers_1: int = 3
  layers_2: int = 3
  layers_3: int = 4
  layers_4: int = 6
  layers_5: int = 6
  layers_6: int = 2
  kernel_1: Size = 3
  kernel_2: Size = 5
  kernel_3: Size = 5
  kernel_4: Size = 5
  kernel_5: Size = 5
  kernel_6: Size = 5
  embed_0: int | None = 24
  embed_1: int | None = 32
  embed_2: int | None = 48
  embed_3: int | None = 88
  embed_4: int | None = 128
  embed_5: int | None = 216
  embed_6: int | None = 352
  features: int | None = 1408
  stem: int = 40
  widths: tuple[int, ...] = (24, 32, 48, 88, 128, 216, 352)
  head: tuple[int, ...] = (1408,)
  strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
  squeeze: tuple[bool, ...] = (True,) * 7
  activations: tuple[str, ...] = ("swish",) * 7
  stem_activation: str = "swish"
  head_activation: str = "swish"
  shortcuts: bool = True
  zero_gamma: bool = True


class AttentiveNAS(BigNAS):
  """The largest network of AttentiveNAS and AlphaNet, as their code has it.

  Example:
    >>> AttentiveNAS(1000).heads()
    {'head_0': 1344, 'features': 1984}
  """

  layers_1: int = 5
  layers_2: int = 6
  layers_3: int = 6
  layers_4: int = 8
  layers_5: int = 8
  kernel_0: Size = 5
  kernel_1: Size = 5
  embed_2: int | None = 40
  embed_3: int | None = 72
  embed_6: int | None = 224
  head_0: int | None = 1344
  features: int | None = 1984
  stem: int = 24
  widths: tuple[int, ...] = (24, 32, 40, 72, 128, 216, 224)
  head: tuple[int, ...] = (1344, 1984)
  squeeze: tuple[bool, ...] = (False, False, True, False, True, True, True)
