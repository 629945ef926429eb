"""Writes config.json from the metadata of a GGUF file.

Source: llama.cpp's converters (conversion/llama.py, qwen.py and glm.py), undone.
"""

import dataclasses
from typing import Any

from lsjax.checkpoint.gguf.file import GGUFFile
from lsjax.checkpoint.gguf.rope import rope_scaling
from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture's config.json differs from the others'.

    Attributes:
      name: name in config.json's `architectures`.
      model_type: config.json's `model_type`.
      permuted: whether llama.cpp reorders the rows of query and key projections, so that channels
        that are rotated together are adjacent.
      partial_rotary: whether only some channels of a head may be rotated.
      sliding: whether layers may have a sliding window.
      biases: field of config.json -> tensor of the first layer whose presence sets it.
    """

    name: str
    model_type: str
    permuted: bool = False
    partial_rotary: bool = False
    sliding: bool = False
    biases: tuple[tuple[str, str], ...] = (("attention_bias", "blk.0.attn_q.bias"),)


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "llama",
        permuted=True,
        biases=(("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", sliding=True, biases=()),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", sliding=True),
    "glm4": Architecture("Glm4ForCausalLM", "glm4", partial_rotary=True),
}
# Keys with the only value that is supported, which has no effect.
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "tensor_data_layout": "Meta AI original pth",
}


def architecture_of(file: GGUFFile) -> Architecture:
    """Returns the architecture of a file.

    Raises:
      UserError: it is not supported, or the file holds something other than a model.
    """
    name = file.metadata.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} holds the architecture {name!r}, which is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    file.metadata.expect("general.type", "model")
    return ARCHITECTURES[name]


def hf_config(file: GGUFFile, dtype: str) -> dict[str, Any]:
    """Returns the JSON object of a config.json.

    Args:
      file: GGUF file of a supported architecture.
      dtype: dtype of the weights that will be written.

    Raises:
      UserError: a key is missing, or says something that config.json cannot.
    """
    metadata, architecture = file.metadata, architecture_of(file)
    prefix = metadata.get("general.architecture", str) + "."
    hidden = metadata.size(prefix + "embedding_length")
    layers = metadata.size(prefix + "block_count")
    heads = metadata.size(prefix + "attention.head_count")
    head_dim = metadata.size(prefix + "attention.key_length", hidden // heads)
    rotary_dim = metadata.size(prefix + "rope.dimension_count", head_dim)
    length = metadata.size(prefix + "context_length")
    metadata.expect(prefix + "attention.value_length", head_dim)
    if not architecture.partial_rotary:
        metadata.expect(prefix + "rope.dimension_count", head_dim)
    for key, value in _NEUTRAL.items():
        metadata.expect(prefix + key, value)
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks the tensor 'token_embd.weight'; use a complete file.")
    vocab_size = int(file.tensors["token_embd.weight"].shape[-1])
    metadata.expect(prefix + "vocab_size", vocab_size)
    raw = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata.size(prefix + "feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size(prefix + "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": metadata.get(prefix + "attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.get(prefix + "rope.freq_base", float, 10000.0),
        "rope_scaling": rope_scaling(file, prefix, head_dim, length),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": dtype,
    }
    raw |= {field: tensor in file.tensors for field, tensor in architecture.biases}
    if architecture.partial_rotary:
        raw["partial_rotary_factor"] = rotary_dim / head_dim
    return raw | _sliding_window(file, architecture, prefix, layers, length)


def _sliding_window(
    file: GGUFFile, architecture: Architecture, prefix: str, layers: int, length: int
) -> dict[str, Any]:
    """Returns the fields for layers with a sliding window, {} if none has one.

    A window that no sequence exceeds has no effect.
    """
    metadata = file.metadata
    key, pattern_key = (
        prefix + "attention.sliding_window",
        prefix + "attention.sliding_window_pattern",
    )
    window = metadata.get(key, int, 0)
    slides = metadata.get(pattern_key, object, None)
    if not 0 < window < length:
        return {}
    if not (architecture.sliding and isinstance(slides, list) and len(slides) == layers):
        raise UserError(
            f"{file.path} sets {key} = {window}, but not which of its layers slide in a way that "
            f"{architecture.name} can express; use the model's Hugging Face release."
        )
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
