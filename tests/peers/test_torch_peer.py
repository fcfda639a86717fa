"""The peer in PyTorch computes what the network in JAX computes, members and training steps alike."""

import jax
import numpy as np
import pytest

from nestnet import Space, errors
from nestnet.execution import Supernet
from nestnet.models.decoder import Decoder
from nestnet.models.vit import ViT
from nestnet.objectives import objective
from nestnet.optim import optimizer, schedule
from nestnet.sampling import sampler
from nestnet.sharding import make_mesh, put_batch
from nestnet.steps import Recipe, Step

pytestmark = pytest.mark.interop

BATCH = {"image": np.random.default_rng(1).normal(size=(6, 8, 8, 1)).astype(np.float32),
         "label": np.array([0, 1, 2, 0, 1, 2], np.int32)}
INPUT = (jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32),)
MODEL = ViT(layers=3, embed=16, heads=4, mlp=24, classes=3, head_dim=4)
SPACE = Space(layers=(1, 2, 3), embed=(8, 12, 16), heads=(2, 4), mlp=(8, 24), per_layer=("heads", "mlp"))
OPTIM = dict(name="adamw", learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, b1=0.9, b2=0.99)


TOKENS = np.random.default_rng(2).integers(0, 12, (3, 9)).astype(np.int32)
DECODER = Decoder(layers=3, embed=16, heads=4, kv_heads=2, mlp=24, vocab=12, head_dim=4, context=16)
TEXTS = Space(layers=(1, 2, 3), embed=(8, 12, 16), heads=(2, 4), mlp=(8, 24), per_layer=("heads", "mlp"))


@pytest.fixture(scope="module")
def torch_peer():
  pytest.importorskip("torch")
  from nestnet.peers import torch_peer
  return torch_peer


def randomised(net):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), net.shapes["params"])


@pytest.mark.parametrize("model, space", [
  (MODEL, SPACE),
  (MODEL.clone(pool="token", features=8), Space(
    layers=((0, 2), 3), embed=(12, 16), heads=(4,), mlp=(8, 24), features=(4, 8))),
  (DECODER, TEXTS),
  (DECODER.clone(kv_heads=4, tied=False, qk_norm=True, attention_bias=True), Space(
    layers=((0, 2), 3), couple={"heads kv_heads": ((2, 2), (4, 4))}, mlp=(8, 24)))])
def test_logits_are_equal(torch_peer, model, space):
  import torch
  inputs = TOKENS if isinstance(model, Decoder) else BATCH["image"]
  net = Supernet(model, space, (jax.ShapeDtypeStruct(inputs.shape, inputs.dtype),))
  params = randomised(net)
  peer = torch_peer.NETWORKS[type(model)](model, params)
  for member in (space.smallest, space.largest, *(space.sample((3, i)) for i in range(2))):
    run = jax.jit(lambda v, x, m=member: net.module(m).apply(net.cut(v, m), x)["logits"])
    ours = np.asarray(run({"params": params}, inputs))
    theirs = peer(torch.from_numpy(inputs), member).detach().numpy()
    scale = float(np.abs(ours).max())
    np.testing.assert_allclose(theirs / scale, ours / scale, atol=1e-4, err_msg=str(member))


def test_a_training_step_is_equal(torch_peer):
  net, mesh = Supernet(MODEL, SPACE, INPUT), make_mesh({"data": 1})
  drawn = sampler("sandwich", SPACE)
  rate = schedule("constant", OPTIM["learning_rate"], 0, 10)
  options = {k: v for k, v in OPTIM.items() if k not in ("name", "learning_rate")}
  step = Step(net, Recipe(drawn, objective("classification")), optimizer("adamw", rate, **options), mesh,
              execution="one_program")
  batch = put_batch(BATCH, mesh)
  peer = torch_peer.Peer(net, OPTIM, batch)
  state = step.init()
  # The peer begins as the supernet does from key 0.
  state = state.replace(trained=state.trained | {"model": net.init(jax.random.key(0))["params"]})
  # Adam makes much of rounding where gradients are zero but for it: biases of keys.
  for number, tolerance in enumerate((1e-4, 2e-3, 4e-3)):
    state, metrics = step(state, batch, number)
    assert peer.step(drawn.terms(number)) == pytest.approx(float(metrics["loss"]), abs=tolerance)


@pytest.mark.parametrize("model, space, optim, message", [
  (MODEL.clone(drop_path=0.1), SPACE, OPTIM, "drop_path=0.1"),
  (MODEL, SPACE, OPTIM | dict(name="sgd"), "config.optim.name: got sgd, allowed: adamw"),
  (MODEL, Space(mlp=(8, 24), groups={"mlp": 2}), OPTIM, "space.groups: got {'mlp': 2}, allowed: none")])
def test_what_the_peer_lacks_is_said(torch_peer, model, space, optim, message):
  with pytest.raises(errors.UserError, match=message):
    torch_peer.Peer(Supernet(model, space, INPUT), optim, put_batch(BATCH, make_mesh({"data": 1})))
