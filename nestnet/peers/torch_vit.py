"""The nested vision transformer in eager PyTorch, which cuts its weights anew in every forward pass.

So do Once-for-All, AutoFormer and their kin: `F.linear(x, weight[:outputs, :inputs])`, nothing
compiled. The function is that of `nestnet.models.vit.ViT`, whose weights it takes.
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
from nestnet.models.vit import ViT
from nestnet.sampling import Term
from nestnet.subnet import Subnet, kept_ids
from nestnet.timing import median_ms

Params = Mapping[str, Any]


class TorchViT(nn.Module):
  """The largest network; a forward pass runs one of its members.

  Args:
    model: The supernet in JAX.
    params: Its parameters.
  """

  def __init__(self, model: ViT, params: Params):
    super().__init__()
    self.model = model
    self.patch_weight = _parameter(_matrix(params["patch"]["kernel"], 3))
    self.patch_bias = _parameter(params["patch"]["bias"])
    self.positions = _parameter(params["positions"])
    self.token = _parameter(params["token"]) if model.pool == "token" else None
    layers = (jax.tree.map(lambda leaf: leaf[i], params["blocks"]) for i in range(model.layers))
    self.blocks = nn.ModuleList(Block(model.head_dim, layer) for layer in layers)
    self.norm = Norm(params["norm"])
    self.head_weight = _parameter(_matrix(params["head"]["kernel"], 1))
    self.head_bias = _parameter(params["head"]["bias"])

  def forward(self, images: torch.Tensor, member: Subnet) -> torch.Tensor:
    """Images `[batch, height, width, channels]` to the logits `[batch, classes]` of a member."""
    model, chosen = self.model, member.chosen
    embed = chosen.get("embed", model.embed)
    layers = kept_ids(chosen.get("layers", model.layers))
    heads, mlp = (_each(chosen.get(axis, getattr(model, axis)), layers) for axis in ("heads", "mlp"))
    x = F.linear(self._patches(images), self.patch_weight[:embed], self.patch_bias[:embed])
    if self.token is not None:
      x = torch.cat([self.token[:, :embed].to(x.dtype).expand(len(x), 1, embed), x], 1)
    x = x + self.positions[:, :embed].to(x.dtype)
    for i, h, m in zip(layers, heads, mlp):
      x = self.blocks[i](x, h, m)
    x = self.norm(x)
    features = (x[:, 0] if self.token is not None else x.mean(1))[:, :chosen.get("features", model.features)]
    return F.linear(features, self.head_weight[:, :features.shape[1]], self.head_bias)

  def _patches(self, images):
    batch, height, width, channels = images.shape
    p = self.model.patch
    x = images.reshape(batch, height // p, p, width // p, p, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, p * p * channels)


class Block(nn.Module):
  """Attention and an MLP, each on a residual branch."""

  def __init__(self, head_dim: int, params: Params):
    super().__init__()
    attention, mlp = params["attention"], params["mlp"]
    self.head_dim = head_dim
    self.attention_norm, self.mlp_norm = Norm(attention["norm"]), Norm(mlp["norm"])
    qkv = np.asarray(attention["qkv"]["kernel"])
    # `[3, heads * head_dim, embed]`: leading heads are then leading rows of each of the three.
    self.qkv_weight = _parameter(qkv.transpose(2, 1, 3, 0).reshape(3, -1, len(qkv)))
    self.qkv_bias = _parameter(np.asarray(attention["qkv"]["bias"]).swapaxes(0, 1).reshape(3, -1))
    self.out_weight = _parameter(_matrix(attention["out"]["kernel"], 2))
    self.out_bias = _parameter(attention["out"]["bias"])
    self.up_weight = _parameter(_matrix(mlp["up"]["kernel"], 1))
    self.up_bias = _parameter(mlp["up"]["bias"])
    self.down_weight = _parameter(_matrix(mlp["down"]["kernel"], 1))
    self.down_bias = _parameter(mlp["down"]["bias"])

  def forward(self, x: torch.Tensor, heads: int, mlp: int) -> torch.Tensor:
    """Tokens `[batch, tokens, embed]` to the same, with so many heads and hidden units."""
    batch, tokens, embed = x.shape
    inner = heads * self.head_dim
    weight = self.qkv_weight[:, :inner, :embed].reshape(3 * inner, embed)
    qkv = F.linear(self.attention_norm(x), weight, self.qkv_bias[:, :inner].reshape(-1))
    q, k, v = qkv.view(batch, tokens, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, inner)
    x = x + F.linear(y, self.out_weight[:embed, :inner], self.out_bias[:embed])
    y = F.linear(self.mlp_norm(x), self.up_weight[:mlp, :embed], self.up_bias[:mlp])
    y = F.gelu(y, approximate="tanh")
    return x + F.linear(y, self.down_weight[:embed, :mlp], self.down_bias[:embed])


class Norm(nn.Module):
  """LayerNorm over the width of its input."""

  def __init__(self, params: Params):
    super().__init__()
    self.scale, self.bias = _parameter(params["scale"]), _parameter(params["bias"])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), self.scale[:width], self.bias[:width], 1e-6)


class Peer:
  """Training steps of the network: forward, backward, clipping and AdamW's update, as the config says.

  PyTorch runs where JAX does, on as many threads as there are cores, and computes in the model's type
  by `torch.autocast`. Weights that no member of a step used have no gradient and are left alone, which
  spares their update.

  Args:
    supernet: The family.
    optim: The config's group; the rate is constant.
    batch: Images and labels.

  Raises:
    ValueError: A model, space or optimizer that this file has not, or no PyTorch for the device.
  """

  def __init__(self, supernet: Supernet, optim: Mapping[str, Any], batch: Mapping[str, jax.Array]):
    model = supernet.model
    _check(supernet, optim, len(batch["image"].sharding.device_set))
    self.device = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    self._dtype = torch.bfloat16 if model.dtype == jax.numpy.bfloat16 else torch.float32
    self._largest = supernet.space.largest
    torch.set_num_threads(len(cores()))
    params = jax.jit(supernet.init)(jax.random.key(0))["params"]
    self.network = TorchViT(model, params).to(self.device)
    images, labels = (torch.from_numpy(np.array(batch[name])) for name in ("image", "label"))
    self._images, self._labels = images.to(self.device), labels.long().to(self.device)
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
        logits = self.network(self._images, term.candidates[0])
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


def _check(supernet: Supernet, optim: Mapping[str, Any], devices: int) -> None:
  model, wrong = supernet.model, []
  if type(model) is not ViT or not model.classes:
    wrong.append((f"config.model.name: got {type(model).__name__}", "ViT with classes"))
  elif model.drop_path or model.dropout:
    wrong.append((f"config.model: got drop_path={model.drop_path}, dropout={model.dropout}", "0.0 for both"))
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


def _each(size, layers: Sequence[int]) -> tuple[int, ...]:
  return size if isinstance(size, tuple) else (size,) * len(layers)


def _matrix(kernel: Any, inputs: int) -> np.ndarray:
  """A kernel whose first `inputs` dimensions are contracted, as `[outputs, inputs]`."""
  kernel = np.asarray(kernel)
  return kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T


def _parameter(array: Any) -> nn.Parameter:
  return nn.Parameter(torch.from_numpy(np.array(array, np.float32, order="C")))
