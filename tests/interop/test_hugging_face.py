"""Hugging Face folders: what is written there is read back bit for bit; what does not fit is said."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import nestnet
from nestnet.errors import UserError
from nestnet.interop import hugging_face
from nestnet.interop.layouts import fields_of, shapes_of
from nestnet.models.decoder import Decoder
from nestnet.models.vit import ViT

MODULE = Decoder(layers=2, embed=16, heads=4, kv_heads=2, mlp=24, vocab=32, head_dim=6, context=64)
QWEN = MODULE.clone(qk_norm=True, attention_bias=True, tied=False)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# As `transformers` 4 writes it.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
         "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
         "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}


def randomised(module, dtype=np.float32):
  rng = np.random.default_rng(0)
  return {"params": unflatten_dict({
    path: rng.normal(size=leaf.shape).astype(dtype) for path, leaf in shapes_of(module).items()})}


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def tensors_of(folder):
  return {name: array for path in folder.glob("*.safetensors")
          for name, array in safetensors.numpy.load_file(path).items()}


@pytest.fixture
def folder(tmp_path):
  hugging_face.write_folder(tmp_path / "out", MODULE, randomised(MODULE))
  return tmp_path / "out"


def rewrite(folder, change):
  """Writes the tensors anew: `change` is given them by name."""
  tensors = tensors_of(folder)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("module, dtype", [
  (MODULE, jnp.float32), (QWEN, jnp.bfloat16),
  (MODULE.clone(rope_scaling=LLAMA3, rope_theta=5e5, norm_eps=1e-5, embed=18, tied=False), jnp.float16)])
@pytest.mark.parametrize("shard_bytes", [10**9, 3000])
def test_a_round_trip_is_bit_for_bit(tmp_path, module, dtype, shard_bytes):
  variables = randomised(module, dtype)
  hugging_face.write_folder(tmp_path / "out", module, variables, shard_bytes=shard_bytes)
  read, back = hugging_face.read_folder(tmp_path / "out")
  assert read == module.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
  same(back, variables)
  loaded = nestnet.load(tmp_path / "out")
  assert loaded[0] == read and hugging_face.peek(tmp_path / "out") == read
  parts = list((tmp_path / "out").glob("model-*.safetensors"))
  assert bool(parts) == (shard_bytes < 10**6) != (tmp_path / "out" / "model.safetensors").exists()
  if parts:
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {path.name: safetensors.numpy.load_file(path) for path in parts}
    assert index["weight_map"] == {name: file for file in held for name in held[file]}
    assert all(len(part) == 1 or sum(x.nbytes for x in part.values()) <= 3000 for part in held.values())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(variables))


def test_every_tensor_is_in_hugging_face_s_layout(tmp_path):
  """Against the formula, number by number: heads of a group side by side, outputs before inputs."""
  hugging_face.write_folder(tmp_path / "out", QWEN, randomised(QWEN))
  theirs, params = tensors_of(tmp_path / "out"), randomised(QWEN)["params"]
  attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
  for layer in range(2):
    name = f"model.layers.{layer}."
    q, k, v, o = (theirs[f"{name}self_attn.{x}_proj.weight"] for x in "qkvo")
    for head in range(4):
      group, of_group = divmod(head, 2)
      rows = slice(6 * head, 6 * head + 6)
      np.testing.assert_array_equal(q[rows], attention["q"]["kernel"][layer, :, group, of_group].T)
      np.testing.assert_array_equal(o[:, rows], attention["out"]["kernel"][layer, group, of_group].T)
      np.testing.assert_array_equal(theirs[f"{name}self_attn.q_proj.bias"][rows],
                                    attention["q"]["bias"][layer, group, of_group])
    for group in range(2):
      rows = slice(6 * group, 6 * group + 6)
      np.testing.assert_array_equal(k[rows], attention["k"]["kernel"][layer, :, group].T)
      np.testing.assert_array_equal(v[rows], attention["v"]["kernel"][layer, :, group].T)
    for part in ("gate", "up", "down"):
      np.testing.assert_array_equal(theirs[f"{name}mlp.{part}_proj.weight"], mlp[part]["kernel"][layer].T)
    for part, leaf in (("input_layernorm", attention["norm"]), ("post_attention_layernorm", mlp["norm"]),
                       ("self_attn.q_norm", attention["q_norm"]), ("self_attn.k_norm", attention["k_norm"])):
      np.testing.assert_array_equal(theirs[f"{name}{part}.weight"], leaf["scale"][layer])
    np.testing.assert_array_equal(theirs[f"{name}self_attn.o_proj.bias"], attention["out"]["bias"][layer])
  np.testing.assert_array_equal(theirs["model.embed_tokens.weight"], params["embedding"]["embedding"])
  np.testing.assert_array_equal(theirs["lm_head.weight"], params["head"]["kernel"].T)
  np.testing.assert_array_equal(theirs["model.norm.weight"], params["norm"]["scale"])
  assert len(theirs) == 2 * 15 + 3


_PAIRS = tuple(sorted(LLAMA3.items()))


@pytest.mark.parametrize("changes, fields", [
  ({}, {"head_dim": 4, "rope_theta": 5e5, "rope_scaling": None, "tied": True, "attention_bias": False,
        "qk_norm": False, "context": 64, "norm_eps": 1e-5, "kv_heads": 2}),
  # Before transformers 5, in it, and with the older word for the type.
  ({"rope_scaling": LLAMA3}, {"rope_theta": 5e5, "rope_scaling": _PAIRS}),
  ({"rope_parameters": LLAMA3 | {"rope_theta": 7.0}}, {"rope_theta": 7.0, "rope_scaling": _PAIRS}),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
   {"rope_theta": 3.0, "rope_scaling": None}),
  ({"rope_scaling": {"type": "linear", "factor": 2.0}},
   {"rope_scaling": (("factor", 2.0), ("rope_type", "linear"))}),
  ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"}, "max_position_embeddings": 32},
   {"rope_scaling": _PAIRS}),
  # What transformers takes where nothing is said.
  ({"num_key_value_heads": None, "tie_word_embeddings": None, "rope_theta": None, "rms_norm_eps": None,
    "max_position_embeddings": None},
   {"kv_heads": 4, "tied": False, "rope_theta": 1e4, "norm_eps": 1e-6, "context": 2048}),
  ({"architectures": None, "head_dim": 10}, {"head_dim": 10}),
  ({"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 4, "attention_bias": True},
   {"head_dim": 128, "qk_norm": True, "attention_bias": True}),
  ({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "use_sliding_window": False},
   {"qk_norm": True}),
  ({"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "use_sliding_window": True,
    "max_window_layers": 2}, {"qk_norm": True}),
  ({"architectures": ["MistralForCausalLM"]}, {"attention_bias": False, "context": 64}),
  ({"architectures": ["MistralForCausalLM"], "sliding_window": None, "max_position_embeddings": 10**6},
   {"context": 10**6})])
def test_configs_of_any_version_are_understood(changes, fields):
  config = {key: value for key, value in (LLAMA | changes).items()
            if value is not None or key == "sliding_window"}
  found = fields_of(config, "here")
  assert {field: found[field] for field in fields} == fields
  Decoder(**found)


@pytest.mark.parametrize("changes, message", [
  ({"architectures": ["GemmaForCausalLM"]},
   "unsupported architecture GemmaForCausalLM; supported are LlamaForCausalLM, Qwen3ForCausalLM, Mistral"),
  ({"architectures": [], "model_type": "gpt2"}, "unsupported architecture model_type='gpt2'"),
  ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
  ({"num_hidden_layers": "two"}, "num_hidden_layers='two'; allowed is a whole number"),
  ({"mlp_bias": True}, "mlp_bias=true; supported is an MLP without"),
  ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported is silu"),
  ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
  ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "layers differ; supported is one size"),
  ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
   "rope_type='yarn'; supported are default, linear, llama3"),
  ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by kind of layer; supported are"),
  ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor=None; allowed is a number"),
  ({"rope_theta": "big"}, "rope_theta='big'; allowed is a number"),
  ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; supported is 1"),
  ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention"),
  ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 8,
    "max_window_layers": 1}, "sliding_window=8 from layer 1; supported is attention to all"),
  ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192},
   "sliding_window=4096, less than")])
def test_what_a_decoder_has_not_is_refused(tmp_path, changes, message):
  config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=f"config.json.* {message}"):
    hugging_face.read_folder(tmp_path)


@pytest.mark.parametrize("changes, message", [
  ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'; allowed is a list of strings"),
  ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0; allowed is a whole number"),
  ({"vocab_size": True}, "vocab_size=True; allowed is a whole number"),
  ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'; allowed is a number"),
  ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; allowed is a number"),
  ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; allowed is true or false"),
  ({"mlp_bias": "false"}, "mlp_bias='false'; allowed is true or false"),
  ({"layer_types": 3}, "layer_types=3; allowed is a list of strings"),
  ({"sliding_window": "3"}, "sliding_window='3'; allowed is a whole number"),
  ({"rope_scaling": [1]}, r"rope_scaling=\[1\]; allowed is an object"),
  ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type=\['linear'\]; supported are"),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta='big'; allowed is"),
  ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
   "high_freq_factor=1.0; allowed is a number above low_freq_factor=1.0"),
  ({"hidden_size": "16", "vocab_size": 3.5}, "hidden_size='16'; .*; vocab_size=3.5; allowed is")])
def test_values_of_another_kind_are_said_by_their_keys(changes, message):
  with pytest.raises(UserError, match=f"^here/config.json: (rope_scaling of type llama3: )?{message}"):
    fields_of(LLAMA | changes, "here")


def test_sizes_that_no_network_has_are_said_of_the_config(folder):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
  with pytest.raises(UserError, match="config.json: Decoder: heads=4 does not divide into kv_heads=3"):
    nestnet.load(folder)


@pytest.mark.parametrize("change, messages", [
  (lambda t: t.pop("model.norm.weight"), ["1 missing", "missing: model.norm.weight"]),
  (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(2, np.float32)}),
   ["1 not expected", "not expected: model.layers.2.mlp.up_proj.weight"]),
  (lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.ones((16, 12), np.float32)}),
   [r"of another shape: model.layers.1.self_attn.k_proj.weight: got \[16, 12\], expected \[12, 16\]"]),
  (lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}),
   ["of a type that is not supported: model.norm.weight: got I8, supported are F32, F16, BF16"])])
def test_tensors_that_do_not_fit_are_listed(folder, change, messages):
  rewrite(folder, change)
  for read in (hugging_face.read_folder, hugging_face.peek):
    with pytest.raises(UserError) as raised:
      read(folder)
    for message in ["the weights in .*out are not those of its config.json: 1 ", *messages]:
      assert raised.match(message)


def test_a_head_beside_tied_weights_must_be_the_embedding(folder):
  rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
  same(hugging_face.read_folder(folder)[1], randomised(MODULE))
  rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
  with pytest.raises(UserError, match="tie_word_embeddings=true, and lm_head.weight is not"):
    hugging_face.read_folder(folder)


def test_what_follows_from_the_config_is_not_read(folder):
  frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
  rewrite(folder, lambda t: t.update(frequencies))
  same(hugging_face.read_folder(folder)[1], randomised(MODULE))


def test_of_several_types_the_one_that_holds_all(folder):
  half = tensors_of(folder)["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
  rewrite(folder, lambda t: t.update({"model.embed_tokens.weight": half}))
  module, variables = hugging_face.read_folder(folder)
  assert module.param_dtype == jnp.float32
  np.testing.assert_array_equal(variables["params"]["embedding"]["embedding"], half.astype(np.float32))


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_weights(folder, keep):
  content = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(content[:keep])
  with pytest.raises(UserError, match="model.safetensors is damaged: "):
    hugging_face.read_folder(folder)


def test_folders_without_safetensors(folder, tmp_path):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="of weights there are: pytorch_model.bin. Pickles are not"):
    hugging_face.read_folder(folder)
  (folder / "pytorch_model.bin").unlink()
  with pytest.raises(FileNotFoundError, match="of weights there are: none$"):
    hugging_face.read_folder(folder)
  with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder. This makes one"):
    hugging_face.read_folder(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    hugging_face.read_folder(tmp_path)
  (folder / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json is damaged"):
    hugging_face.read_folder(folder)


@pytest.mark.parametrize("index, message", [
  ("{", "index.json is damaged"), ('{"weight_map": [1]}', "index.json is damaged"),
  ('{"weight_map": {"a": "../out/model-1.safetensors"}}', "allowed are files beside it"),
  ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors, which model.safetensors.index")])
def test_a_wrong_index(folder, index, message):
  (folder / "model.safetensors").rename(folder / "model-1.safetensors")
  (folder / "model.safetensors.index.json").write_text(index)
  with pytest.raises(UserError, match=message):
    hugging_face.read_folder(folder)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
  space = nestnet.Space(layers=(2,), embed=(16,), mlp=(8, 16, 24, 32), per_layer=("mlp",))
  out = tmp_path / "out"
  member = nestnet.Subnet(layers=2, embed=16, mlp=(8, 24))
  uneven = MODULE.clone(mlp=(8, 24))
  with pytest.raises(UserError, match="mlp=8:24: layers differ, and LlamaForCausalLM.* one size for all "
                     "layers. The nearest uniform members: not larger: layers=2,embed=16,mlp=16; larger: "
                     ".*mlp=24; --f"):
    hugging_face.write_folder(out, uneven, {}, member=member, space=space)
  with pytest.raises(UserError, match="one size for all layers; --format=safetensors"):
    hugging_face.write_folder(out, uneven, {})
  with pytest.raises(UserError, match="written of a Decoder, got a ViT"):
    hugging_face.write_folder(out, ViT(layers=1, embed=8, heads=2, mlp=8, classes=3), {})
  with pytest.raises(UserError, match="embed=18 does not divide into heads=4.*allowed is a member whose"):
    hugging_face.write_folder(out, MODULE.clone(embed=18, attention_bias=True), {})
  with pytest.raises(UserError, match="not those of the module: 1 of another shape\n .*mlp/up/kernel: got"):
    hugging_face.write_folder(out, MODULE, jax.tree_util.tree_map_with_path(
      lambda path, x: x[..., :-1] if "'up'" in jax.tree_util.keystr(path) else x, randomised(MODULE)))
  with pytest.raises(FileNotFoundError, match="no tokenizer in .*; looked for tokenizer.json"):
    hugging_face.write_folder(out, MODULE, randomised(MODULE), tokenizer_from=tmp_path)
  assert not list(tmp_path.iterdir())


def test_equal_sizes_listed_for_each_layer_are_one_size(tmp_path):
  listed = MODULE.clone(mlp=(24, 24))
  variables = randomised(MODULE)
  stacked = variables["params"]["blocks"]
  blocks = {f"layers_{i}": jax.tree.map(lambda x: x[i], stacked) for i in range(2)}
  hugging_face.write_folder(tmp_path / "out", listed, {"params": variables["params"] | {"blocks": blocks}})
  module, back = hugging_face.read_folder(tmp_path / "out")
  assert module == MODULE
  same(back, variables)


def test_a_folder_is_replaced_whole_or_stays(folder):
  other = MODULE.clone(layers=1)

  def check(written):
    assert hugging_face.peek(written) == other
    raise RuntimeError("differs")

  with pytest.raises(RuntimeError, match="differs"):
    hugging_face.write_folder(folder, other, randomised(other), check=check)
  assert nestnet.load(folder)[0] == MODULE
  hugging_face.write_folder(folder, other, randomised(other))
  assert nestnet.load(folder)[0] == other
  nestnet.save(folder, MODULE, randomised(MODULE))
  assert nestnet.load(folder)[0] == MODULE and not (folder / "nestnet.json").exists()
  assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_never_touched(folder):
  (folder / "nestnet.json").unlink()
  with pytest.raises(UserError, match="out exists and is no extracted network"):
    hugging_face.write_folder(folder, MODULE, randomised(MODULE))
  with pytest.raises(UserError, match="out exists and is no extracted network"):
    nestnet.save(folder, MODULE, randomised(MODULE))
  same(nestnet.load(folder)[1], randomised(MODULE))


def test_what_a_folder_says_of_itself(tmp_path):
  parent = tmp_path / "parent"
  parent.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_own.py"):
    (parent / name).write_text(f"of {name}")
  (parent / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": [3, 4], "bos_token_id": 1}))
  card = {"subnet": "layers=2", "parent": {"run": "runs/a|b", "step": 1200},
          "costs_and_metrics": {"flops": 123456, "bits_per_byte": 1.25}}
  hugging_face.write_folder(tmp_path / "out", MODULE, randomised(MODULE), tokenizer_from=parent, card=card)
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert names == {"config.json", "model.safetensors", "README.md", "nestnet.json", "tokenizer.json",
                   "tokenizer_config.json", "generation_config.json"}
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "of tokenizer.json"
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([3, 4], 1, None)
  assert config["head_dim"] == 6 and config["torch_dtype"] == "float32"
  assert json.loads((tmp_path / "out" / "nestnet.json").read_text()) == {"format": "hugging_face", **card}
  page = (tmp_path / "out" / "README.md").read_text()
  count = sum(x.size for x in jax.tree.leaves(randomised(MODULE)))
  for line in (f"# LlamaForCausalLM, {count:,} parameters", "| parent: run | runs/a\\|b |",
               "| parent: step | 1,200 |", "| costs and metrics: bits per byte | 1.25 |",
               "| width of a head | 6 |"):
    assert line in page.splitlines()
  assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_folder_of_bytes_says_so_and_ends_texts(tmp_path):
  module = MODULE.clone(vocab=256)
  hugging_face.write_folder(tmp_path / "out", module, randomised(module))
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
  assert "| tokens | bytes; 0 ends a text |" in (tmp_path / "out" / "README.md").read_text().splitlines()
  assert hugging_face.end_tokens(tmp_path / "out") == [0]
  hugging_face.write_folder(tmp_path / "out", MODULE, randomised(MODULE))
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None
  assert "| tokens |" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.interop
@pytest.mark.parametrize("config, end", [
  (None, 3), ({"eos_token_id": None}, 3), ({"eos_token_id": [4, 5]}, [4, 5])])
def test_the_end_of_a_tokenizer_is_written_where_no_config_names_one(tmp_path, config, end):
  import tokenizers

  parent = tmp_path / "parent"
  parent.mkdir()
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "stop": 3, "far": 32}))
  made.save(str(parent / "tokenizer.json"))
  (parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "stop"}))
  (parent / "generation_config.json").write_text(json.dumps({"top_k": 2}))
  if config is not None:
    (parent / "config.json").write_text(json.dumps(LLAMA | config))
  write = lambda: hugging_face.write_folder(
    tmp_path / "out", MODULE, randomised(MODULE), tokenizer_from=parent)
  write()
  read = lambda name: json.loads((tmp_path / "out" / name).read_text())
  assert read("config.json")["eos_token_id"] == end
  assert read("generation_config.json") == {"top_k": 2, "eos_token_id": end}
  (parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": "far"}))
  if end == 3:
    with pytest.raises(UserError, match="ends a text with token 32; allowed is one of .* 0 to 31"):
      write()


def test_load_asks_for_the_class_where_one_is_given(folder):
  assert nestnet.load(folder, Decoder)[0] == MODULE
  with pytest.raises(UserError, match="out holds a Decoder, got the class ViT"):
    nestnet.load(folder, ViT)


def test_fields_for_a_config(folder):
  fields = hugging_face.model_fields(folder)
  assert fields.pop("name") == "Decoder" and Decoder(**fields) == MODULE
