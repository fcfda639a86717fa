"""Decoders of `transformers` read here, and ours read there, compute the same."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from nestnet.axes import abstract_variables
from nestnet.execution import extract
from nestnet.interop import hugging_face
from nestnet.models.decoder import Decoder
from nestnet.subnet import Subnet

pytestmark = pytest.mark.interop

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)
TINY = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
MODEL = Decoder(layers=3, embed=24, heads=6, kv_heads=2, mlp=32, vocab=32, head_dim=4, context=32)
TIE = 1e-4


@pytest.fixture(scope="module")
def hub():
  pytest.importorskip("torch")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
  transformers.logging.set_verbosity_error()
  return transformers


def theirs(model, tokens=TOKENS):
  import torch
  with torch.no_grad():
    return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def ours(module, variables, tokens=TOKENS):
  return np.asarray(jax.jit(lambda v, x: module.apply(v, x)["logits"])(variables, tokens))


@pytest.mark.parametrize("family, options", [
  ("Llama", dict(tie_word_embeddings=False)),
  ("Llama", dict(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4)),
  ("Llama", dict(rope_parameters=LLAMA3, head_dim=8, num_key_value_heads=1)),
  ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0))),
  ("Qwen3", dict(head_dim=8, tie_word_embeddings=True,
                 rope_parameters=dict(rope_type="default", rope_theta=1e6))),
  ("Qwen3", dict(head_dim=4, tie_word_embeddings=False, attention_bias=True, rms_norm_eps=1e-3)),
  ("Mistral", dict(hidden_size=24, num_attention_heads=5, num_key_value_heads=5, head_dim=4,
                   sliding_window=None))])
@pytest.mark.parametrize("stored", ["float32", "bfloat16 in parts"])
def test_a_folder_of_transformers_is_read(hub, tmp_path, family, options, stored):
  import torch
  torch.manual_seed(0)
  config = getattr(hub, f"{family}Config")(**TINY | options)
  model = getattr(hub, f"{family}ForCausalLM")(config)
  for name, parameter in model.named_parameters():
    # A norm of ones hides one that is missing.
    parameter.data = torch.randn_like(parameter) * 0.3 + ("norm" in name)
  dtype = stored.split()[0]
  model.to(getattr(torch, dtype)).save_pretrained(
    tmp_path, **(dict(max_shard_size="4KB") if "parts" in stored else {}))
  assert (tmp_path / "model.safetensors").exists() != ("parts" in stored)
  module, variables = hugging_face.read_folder(tmp_path)
  assert module.dtype == module.param_dtype == jnp.dtype(dtype)
  # The same weights, in a type in which the order of sums matters less. Read anew, as `model.float()` would
  # keep the wave lengths that `model.to` rounded.
  found = ours(module.clone(dtype=jnp.float32), variables)
  expected = theirs(hub.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(found, expected, atol=1e-4)


MEMBERS = ["layers=3", "layers=0+2,embed=16", "embed=16,heads=4", "heads=2,mlp=8",
           "heads=1,kv_heads=1,embed=16", "layers=1,embed=16,heads=3,kv_heads=1,mlp=8"]


@pytest.mark.parametrize("spec", MEMBERS)
@pytest.mark.parametrize("options, families", [
  (dict(tied=True), ("Llama", "Mistral")),
  (dict(tied=False, rope_theta=1e5, rope_scaling=SCALING), ("Llama", "Mistral")),
  (dict(tied=False, qk_norm=True, attention_bias=True, norm_eps=1e-4), ("Qwen3",))])
def test_a_member_is_loaded_by_transformers(hub, tmp_path, record_property, options, families, spec):
  import torch
  model = MODEL.clone(**options)
  module, variables = extract(model, randomised(model), Subnet.parse(spec), TOKENS)
  hugging_face.write_folder(tmp_path / "out", module, variables)
  loaded = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
  divides = module.embed % module.heads == 0
  assert type(loaded).__name__ == (families[0] if divides else families[-1]) + "ForCausalLM"
  assert loaded.config.head_dim == 4 and loaded.dtype == torch.float32
  assert loaded.generation_config.eos_token_id is None
  expected = ours(module, variables)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(theirs(loaded), expected, atol=1e-4)
  prompts = TOKENS[:, :4]
  generated = loaded.generate(torch.from_numpy(prompts).long(), max_new_tokens=12, do_sample=False).numpy()
  ties = sum(same_but_for_ties(*pair) for pair in zip(generated, greedy(module, variables, prompts, 12)))
  record_property("differences at ties", ties)
  if ties:
    print(f"{ties} of {len(prompts)} continuations differ from a tie of the two best on")


def randomised(model):
  rng = np.random.default_rng(1)
  shapes = meta.unbox(abstract_variables(model, TOKENS))["params"]
  draw = lambda path, s: (rng.normal(size=s.shape) * 0.3 + (path[-1] == "scale")).astype(s.dtype)
  return {"params": unflatten_dict({p: draw(p, s) for p, s in flatten_dict(shapes).items()})}


def greedy(module, variables, prompts, count):
  """Greedy continuations, uncached, and the logits that chose each token."""
  length = prompts.shape[1] + count
  apply = jax.jit(lambda v, x, p: module.apply(v, x, positions=p)["logits"])
  tokens, seen = np.pad(prompts, ((0, 0), (0, count))), []
  for end in range(prompts.shape[1], length):
    positions = np.where(np.arange(length) < end, np.arange(length), -1)[None].repeat(len(prompts), 0)
    logits = np.asarray(apply(variables, tokens, positions.astype(np.int32)))[:, end - 1]
    tokens[:, end] = logits.argmax(-1)
    seen.append(logits)
  return list(zip(tokens, np.stack(seen, 1)))


def same_but_for_ties(reference, found):
  """Whether they part at a tie; they must not part anywhere else."""
  tokens, logits = found
  assert len(reference) == len(tokens)
  parting = np.flatnonzero(reference != tokens)
  if not len(parting):
    return False
  best, second = np.sort(logits[parting[0] - len(tokens) + len(logits)])[[-1, -2]]
  assert best - second < TIE
  return True


def test_folders_of_older_versions_mean_the_same(hub, tmp_path):
  """`rope_theta` and `rope_scaling` beside each other, as before transformers 5, and what it makes of it."""
  model = MODEL.clone(rope_scaling=SCALING, rope_theta=100.0)
  hugging_face.write_folder(tmp_path / "old", model, randomised(model))
  old = json.loads((tmp_path / "old" / "config.json").read_text())
  assert old["rope_theta"] == 100.0 and old["rope_scaling"]["factor"] == 4.0
  loaded = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype="auto")
  loaded.save_pretrained(tmp_path / "new")
  new = json.loads((tmp_path / "new" / "config.json").read_text())
  assert "rope_scaling" not in new and new["rope_parameters"]["rope_theta"] == 100.0
  (module, variables), (again, same) = map(hugging_face.read_folder, (tmp_path / "old", tmp_path / "new"))
  assert module == again == model
  jax.tree.map(np.testing.assert_array_equal, variables, same)
