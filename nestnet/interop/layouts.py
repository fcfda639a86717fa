"""What Hugging Face calls a decoder's sizes and tensors: Llama, Qwen3 and Mistral, both ways."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict

from nestnet.axes import Axes, abstract_variables
from nestnet.errors import UserError
from nestnet.models import rotary


@dataclasses.dataclass(frozen=True)
class Layout:
  """An architecture of `transformers` that a `Decoder` can be.

  Attributes:
    architecture: Its class.
    model_type: What `AutoConfig` knows it by.
    qk_norm: Whether it normalises queries and keys.
    bias: Whether its attention may have biases.
    divides: Whether `transformers` refuses a width that the number of heads does not divide, though
      `head_dim` is given.
    defaults: What `transformers` takes where `config.json` says nothing, in so far as it is not what
      `_DEFAULTS` says.
  """

  architecture: str
  model_type: str
  qk_norm: bool = False
  bias: bool = True
  divides: bool = False
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# A member without biases that Llama refuses for its width is a Mistral without a sliding window: the same
# function and the same names.
LAYOUTS = (
  Layout("LlamaForCausalLM", "llama", divides=True, defaults={"max_position_embeddings": 2048}),
  Layout("Qwen3ForCausalLM", "qwen3", qk_norm=True,
         defaults={"max_position_embeddings": 32768, "head_dim": 128, "num_key_value_heads": 32,
                   "sliding_window": 4096}),
  Layout("MistralForCausalLM", "mistral", bias=False,
         defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}))

# Fields of `Decoder`, and keys of `config.json`.
FIELDS = {
  "layers": "num_hidden_layers", "embed": "hidden_size", "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "vocab": "vocab_size",
  "head_dim": "head_dim", "tied": "tie_word_embeddings", "attention_bias": "attention_bias",
  "norm_eps": "rms_norm_eps", "context": "max_position_embeddings"}
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_DEFAULTS = {"tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-6}

# What values of `config.json` may be: in words, and how to tell.
_Kind = tuple[str, Callable[[Any], bool]]
_COUNT: _Kind = ("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
_WHOLE: _Kind = ("a whole number", lambda value: type(value) is int)
_NUMBER: _Kind = ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
_SMALL: _Kind = ("a number of at least 0",
                 lambda value: type(value) in (int, float) and 0 <= value < math.inf)
_FLAG: _Kind = ("true or false", lambda value: type(value) is bool)
_OBJECT: _Kind = ("an object, such as {}", lambda value: isinstance(value, Mapping))
_WORDS: _Kind = ("a list of strings", lambda value: isinstance(value, (list, tuple))
                 and all(isinstance(word, str) for word in value))
_KINDS = {
  "architectures": _WORDS, "num_hidden_layers": _COUNT, "hidden_size": _COUNT, "num_attention_heads": _COUNT,
  "num_key_value_heads": _COUNT, "intermediate_size": _COUNT, "vocab_size": _COUNT, "head_dim": _COUNT,
  "max_position_embeddings": _COUNT, "tie_word_embeddings": _FLAG, "attention_bias": _FLAG, "mlp_bias": _FLAG,
  "rms_norm_eps": _SMALL, "rope_theta": _NUMBER, "rope_scaling": _OBJECT, "rope_parameters": _OBJECT,
  "layer_types": _WORDS, "sliding_window": _WHOLE, "use_sliding_window": _FLAG, "max_window_layers": _WHOLE}
# Keys of each kind of rotary positions, beside `rope_type`.
ROPES = {"default": ()} | rotary.NEEDS

# Paths of our parameters, and Hugging Face's name with the axes of ours. Theirs have two dimensions,
# all that is produced and all that is contracted, or only the former.
_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_QUERIES, _KEYS = "kv_heads queries head_dim", "kv_heads head_dim"
TENSORS = {
  "embedding/embedding": ("model.embed_tokens.weight", "vocab <- embed"),
  "blocks/attention/norm/scale": ("model.layers.{}.input_layernorm.weight", "-> embed"),
  "blocks/attention/q/kernel": (_ATTENTION + "q_proj.weight", f"embed -> {_QUERIES}"),
  "blocks/attention/q/bias": (_ATTENTION + "q_proj.bias", f"-> {_QUERIES}"),
  "blocks/attention/k/kernel": (_ATTENTION + "k_proj.weight", f"embed -> {_KEYS}"),
  "blocks/attention/k/bias": (_ATTENTION + "k_proj.bias", f"-> {_KEYS}"),
  "blocks/attention/v/kernel": (_ATTENTION + "v_proj.weight", f"embed -> {_KEYS}"),
  "blocks/attention/v/bias": (_ATTENTION + "v_proj.bias", f"-> {_KEYS}"),
  "blocks/attention/q_norm/scale": (_ATTENTION + "q_norm.weight", "-> head_dim"),
  "blocks/attention/k_norm/scale": (_ATTENTION + "k_norm.weight", "-> head_dim"),
  "blocks/attention/out/kernel": (_ATTENTION + "o_proj.weight", f"{_QUERIES} -> embed"),
  "blocks/attention/out/bias": (_ATTENTION + "o_proj.bias", "-> embed"),
  "blocks/mlp/norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "-> embed"),
  "blocks/mlp/gate/kernel": (_MLP + "gate_proj.weight", "embed -> mlp"),
  "blocks/mlp/up/kernel": (_MLP + "up_proj.weight", "embed -> mlp"),
  "blocks/mlp/down/kernel": (_MLP + "down_proj.weight", "mlp -> embed"),
  "norm/scale": ("model.norm.weight", "-> embed"),
  "head/kernel": ("lm_head.weight", "embed -> vocab")}
# Beside `TENSORS` in a folder of tied weights, equal to the embedding; and what old folders hold of
# rotary positions.
HEAD, EMBEDDING = TENSORS["head/kernel"][0], TENSORS["embedding/embedding"][0]
_COMPUTED = re.compile(r".*\brotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of Hugging Face's stands in our parameters.

  Attributes:
    path: Of our leaf.
    layer: Its layer, where the leaf is a stack.
    names: Axes of ours, in the arrow form.
    shape: Of ours, of one layer.
  """

  path: tuple[str, ...]
  layer: int | None
  names: str
  shape: tuple[int, ...]

  @property
  def theirs(self) -> tuple[int, ...]:
    """The shape that Hugging Face's has."""
    return _joined(*self._orders[1:])

  @property
  def _orders(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Our dimensions, produced ones first; and the sizes of either kind."""
    axes = Axes.parse(self.names)
    produced = [i for i, name in enumerate(axes.names) if name not in axes.contracted]
    contracted = [i for i, name in enumerate(axes.names) if name in axes.contracted]
    sizes = (tuple(self.shape[i] for i in group) for group in (produced, contracted))
    return (*produced, *contracted), *sizes

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Hugging Face's layout of one of ours.

    Example:
      >>> Place(("w",), None, "embed -> kv_heads head_dim", (6, 2, 4)).to_theirs(np.zeros((6, 2, 4))).shape
      (8, 6)
    """
    order, *sizes = self._orders
    return np.ascontiguousarray(array.transpose(order).reshape(_joined(*sizes)))

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """Our layout of one of Hugging Face's; the inverse of `to_theirs`."""
    order, produced, contracted = self._orders
    return array.reshape(produced + contracted).transpose(np.argsort(order))


def _joined(produced: tuple[int, ...], contracted: tuple[int, ...]) -> tuple[int, ...]:
  return (math.prod(produced), *([math.prod(contracted)] if contracted else []))


def places(module: nn.Module) -> dict[str, Place]:
  """Every tensor of a decoder by Hugging Face's name; one for each layer."""
  shapes = shapes_of(module)
  found = {}
  for path, leaf in shapes.items():
    # Layers with sizes of their own are not stacked.
    own = re.fullmatch(r"layers_(\d+)", path[1]) if path[0] == "blocks" else None
    name, names = TENSORS["/".join(path[:1] + path[2:] if own else path)]
    if own or path[0] != "blocks":
      found[name.format(own and own[1])] = Place(path, None, names, leaf.shape)
      continue
    for layer in range(leaf.shape[0]):
      found[name.format(layer)] = Place(path, layer, names, leaf.shape[1:])
  return found


def shapes_of(module: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
  """A decoder's parameters by their paths, in the abstract."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return flatten_dict(meta.unbox(abstract_variables(module, tokens))["params"])


def computed(name: str) -> bool:
  """Whether a tensor of a folder follows from its config."""
  return _COMPUTED.fullmatch(name) is not None


def fields_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The fields of a `Decoder` that computes what a folder's `config.json` says.

  Args:
    config: What `config.json` holds, as any version of `transformers` writes it.
    where: The folder, for messages.

  Raises:
    ValueError: The architecture is none of `LAYOUTS`; or it has a part that `Decoder` has not, such as a
      sliding window in use, another activation or another kind of rotary positions; or keys are missing, or
      values are not of their kind.
  """
  _check_kinds(config, where)
  layout = _layout_of(config, where)
  missing = [key for key in _REQUIRED if config.get(key) is None]
  if missing:
    raise UserError(f"{where}/config.json lacks {', '.join(missing)}")
  # A key that is null says nothing.
  config = {**_DEFAULTS, **layout.defaults, **{k: v for k, v in config.items()
                                               if v is not None or k in ("sliding_window", *_DERIVED)}}
  for key, derive in _DERIVED.items():
    if config.get(key) is None:
      config[key] = derive(config)
  if problems := list(_unsupported(config, layout)):
    raise UserError(f"{where}/config.json: {'; '.join(problems)}")
  theta, scaling = _rope_of(config, where)
  fields = {field: config[key] for field, key in FIELDS.items()}
  if not layout.bias:
    fields["attention_bias"] = False
  return fields | {"qk_norm": layout.qk_norm, "rope_theta": theta, "rope_scaling": scaling}


_DERIVED = {
  "num_key_value_heads": lambda config: config["num_attention_heads"],
  "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"]}


def _check_kinds(config: Mapping[str, Any], where: str) -> None:
  """Raises `ValueError` where values are not of their kinds; a key that is null says nothing."""
  wrong = [f"{key}={config[key]!r}; allowed is {words}" for key, (words, fits) in _KINDS.items()
           if config.get(key) is not None and not fits(config[key])]
  if wrong:
    raise UserError(f"{where}/config.json: {'; '.join(wrong)}")


def _layout_of(config: Mapping[str, Any], where: str) -> Layout:
  named = config.get("architectures") or []
  known = ", ".join(layout.architecture for layout in LAYOUTS)
  if named:
    found = [layout for layout in LAYOUTS if list(named) == [layout.architecture]]
  else:
    found = [layout for layout in LAYOUTS if layout.model_type == config.get("model_type")]
  if not found:
    got = " and ".join(map(str, named)) if named else f"model_type={config.get('model_type')!r}"
    raise UserError(f"{where}/config.json: unsupported architecture {got}; supported are {known}")
  return found[0]


def _unsupported(config: Mapping[str, Any], layout: Layout) -> Iterator[str]:
  """What a config has and a `Decoder` has not."""
  if config.get("hidden_act", "silu") not in ("silu", "swish"):
    yield f"hidden_act={config['hidden_act']!r}; supported is silu"
  if config.get("mlp_bias"):
    yield "mlp_bias=true; supported is an MLP without biases"
  if config.get("quantization_config"):
    yield "quantization_config: the weights are quantised; supported are float32, float16 and bfloat16"
  if config.get("per_layer_config"):
    yield "per_layer_config: layers differ; supported is one size for all layers"
  if window := _window(config, layout):
    yield f"{window}; supported is attention to all that came before"


def _window(config: Mapping[str, Any], layout: Layout) -> str:
  """The sliding window that is in use, in the config's words; empty where there is none."""
  types, size = config.get("layer_types") or (), config.get("sliding_window")
  if other := [kind for kind in types if kind != "full_attention"]:
    return f"layer_types with {other[0]}"
  if size is None or size >= config["max_position_embeddings"]:
    return ""
  if layout.model_type == "mistral":
    return f"sliding_window={size}, less than max_position_embeddings={config['max_position_embeddings']}"
  # With layer_types these say it all.
  first = config.get("max_window_layers", 28)
  slides = config.get("use_sliding_window") and not types and first < config["num_hidden_layers"]
  return f"use_sliding_window=true with sliding_window={size} from layer {first}" if slides else ""


def _rope_of(config: Mapping[str, Any], where: str) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
  """Base and scaling of rotary positions: `rope_parameters`, or as written before transformers 5."""
  rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
  _check_kinds({"rope_theta": rope.get("rope_theta")}, where)
  theta = float(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if (unknown := kind not in tuple(ROPES)) or any(isinstance(value, Mapping) for value in rope.values()):
    raise UserError(f"{where}/config.json: "
                    + (f"rope_type={kind!r}" if unknown else "rope_parameters by kind of layer")
                    + f"; supported are {', '.join(ROPES)}, the same in all layers")
  if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) not in (1, None):
    raise UserError(f"{where}/config.json: partial_rotary_factor={part}; supported is 1")
  if kind == "default":
    return theta, None
  original = "original_max_position_embeddings"
  rope = {original: config["max_position_embeddings"]} | rope
  if original in config:
    rope[original] = config[original]
  try:
    return theta, rotary.scaling({"rope_type": kind} | {key: rope.get(key) for key in ROPES[kind]})
  except UserError as error:
    raise UserError(f"{where}/config.json: {error}") from error


def config_of(module: nn.Module, dtype: str) -> dict[str, Any]:
  """The `config.json` of a decoder, as every version of `transformers` reads it.

  Args:
    module: A `Decoder` with one size for all layers (`uniform`).
    dtype: Of the weights.

  Raises:
    ValueError: No architecture of `transformers` takes these sizes.
  """
  layout = _layout_for(module)
  sizes = {key: getattr(module, field) for field, key in FIELDS.items()}
  config = {"architectures": [layout.architecture], "model_type": layout.model_type, "torch_dtype": dtype,
            **{key: value[0] if isinstance(value, tuple) else value for key, value in sizes.items()},
            "hidden_act": "silu", "rope_theta": module.rope_theta,
            "rope_scaling": dict(module.rope_scaling) if module.rope_scaling else None,
            # Left out they would be tokens of Llama's own vocabulary.
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
  if not layout.bias:
    del config["attention_bias"]
  if "sliding_window" in layout.defaults:
    config["sliding_window"] = None
  return config


def _layout_for(module: nn.Module) -> Layout:
  embed, heads = module.embed, module.heads[0] if isinstance(module.heads, tuple) else module.heads
  for layout in LAYOUTS:
    if (layout.qk_norm == module.qk_norm and (layout.bias or not module.attention_bias)
        and not (layout.divides and embed % heads)):
      return layout
  raise UserError(f"embed={embed} does not divide into heads={heads}, which transformers wants of a "
                  "LlamaForCausalLM, the only one with attention_bias and without qk_norm; allowed is a "
                  "member whose embed is a multiple of its heads")


def uneven(module: nn.Module) -> list[str]:
  """The fields in which layers differ."""
  return [field for field in FIELDS if isinstance(getattr(module, field), tuple)
          and len(set(getattr(module, field))) > 1]


def mismatch(expected: Mapping[str, Sequence[int]], got: Mapping[str, Sequence[int]]
             ) -> dict[str, list[str]]:
  """What is wrong with tensors, by kind: names, and shapes where they differ."""
  return {
    "missing": [name for name in expected if name not in got],
    "not expected": [name for name in got if name not in expected],
    "of another shape": [f"{name}: got {list(got[name])}, expected {list(shape)}"
                         for name, shape in expected.items()
                         if name in got and tuple(got[name]) != tuple(shape)]}
