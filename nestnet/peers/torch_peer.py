"""Training steps in eager PyTorch, which cuts its weights anew in every forward pass.

So do Once-for-All, AutoFormer and their kin: `F.linear(x, weight[:outputs, :inputs])`, nothing compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nestnet.errors import UserError
from nestnet.execution import Supernet
from nestnet.jobs import cores
from nestnet.models.decoder import Decoder
from nestnet.models.vit import ViT
from nestnet.peers.torch_decoder import TorchDecoder
from nestnet.peers.torch_vit import TorchViT
from nestnet.sampling import Term
from nestnet.timing import median_ms

NETWORKS = {ViT: TorchViT, Decoder: TorchDecoder}


class Peer:
  """Training steps of the network: forward, backward, clipping and AdamW's update, as the config says.

  PyTorch runs where JAX does, on as many threads as there are cores, and computes in the model's type
  by `torch.autocast`. Weights that no member of a step used have no gradient and are left alone, which
  spares their update.

  Args:
    supernet: The family.
    optim: The config's group; the rate is constant.
    batch: As the config's data set gives it.

  Raises:
    ValueError: A model, space or optimizer that this file has not, or no PyTorch for the device.
  """

  def __init__(self, supernet: Supernet, optim: Mapping[str, Any], batch: Mapping[str, jax.Array]):
    model = supernet.model
    network = _network(supernet, optim, len(next(iter(batch.values())).sharding.device_set))
    self.device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    self._dtype = torch.bfloat16 if model.dtype == jax.numpy.bfloat16 else torch.float32
    self._largest = supernet.space.largest
    torch.set_num_threads(len(cores()))
    params = jax.jit(supernet.init)(jax.random.key(0))["params"]
    self.network = network(model, params).to(self.device)
    tensors = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in batch.items()}
    self._inputs, self._labels = network.example(tensors)
    self._clip = optim.get("clip_norm", 0.0)
    named = list(self.network.named_parameters())
    kernels = [p for name, p in named if name.endswith("weight")]
    others = [p for name, p in named if not name.endswith("weight")]
    groups = [{"params": kernels, "weight_decay": optim.get("weight_decay", 0.0)},
              {"params": others, "weight_decay": 0.0}]
    self._optimizer = torch.optim.AdamW(
      groups, lr=optim["learning_rate"], betas=(optim.get("b1", 0.9), optim.get("b2", 0.999)), fused=True)

  @property
  def name(self) -> str:
    return f"PyTorch {torch.__version__}, {self.device}, {torch.get_num_threads()} threads"

  def choose_threads(self) -> None:
    """Goes on with one thread, or one for each core, whichever takes less time for the largest.

    Threads wait for each other busily, which costs much where other processes use the cores too.
    """
    largest, took = (Term((self._largest,)),), {}
    for threads in {1, len(cores())}:
      torch.set_num_threads(threads)
      took[threads] = median_ms(functools.partial(self.step, largest))
    torch.set_num_threads(min(took, key=took.get))

  def step(self, terms: Sequence[Term]) -> float:
    """One step on these terms; taught ones learn from the logits of the first. The sum of their losses."""
    self._optimizer.zero_grad(set_to_none=True)
    teacher, total = None, 0.0
    for term in terms:
      with torch.autocast(self.device, self._dtype, enabled=self._dtype != torch.float32):
        logits = self.network(self._inputs, term.candidates[0]).flatten(0, -2)
      targets = teacher if term.taught else self._labels
      loss = term.weight * F.cross_entropy(logits.float(), targets)
      loss.backward()
      if teacher is None:
        teacher = logits.detach().float().softmax(-1)
      total = total + loss.detach()
    if self._clip:
      nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
    self._optimizer.step()
    if self.device == "cuda":
      torch.cuda.synchronize()
    return float(total)


def _network(supernet: Supernet, optim: Mapping[str, Any], devices: int) -> type[nn.Module]:
  """The network in PyTorch; what is not there is said."""
  model, wrong = supernet.model, []
  network = NETWORKS.get(type(model))
  if not network:
    wrong.append((f"config.model.name: got {type(model).__name__}", " or ".join(m.__name__ for m in NETWORKS)))
  else:
    wrong += network.lacks(model)
  if set(supernet.space.groups.values()) - {1}:
    wrong.append((f"config.space.groups: got {supernet.space.groups}", "none"))
  if optim["name"] != "adamw":
    wrong.append((f"config.optim.name: got {optim['name']}", "adamw"))
  if jax.default_backend() not in ("cpu", "gpu") or devices > 1:
    wrong.append((f"devices: got {devices} {jax.default_backend()}", "one cpu or gpu"))
  if jax.default_backend() == "gpu" and not torch.cuda.is_available():
    wrong.append((f"PyTorch {torch.__version__}: got no GPU", "a build with CUDA"))
  if wrong:
    raise UserError("--peer=torch: " + "; ".join(f"{got}, allowed: {allowed}" for got, allowed in wrong))
  return network
