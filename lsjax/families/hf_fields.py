"""Parses the config fields that the families in transformers share."""

from typing import Any

from lsjax.config import LayerKind, ModelConfig
from lsjax.families.fields import Fields
from lsjax.positions.scaling import parse_rope_scaling


def parse_hf(fields: Fields, architecture: str, **differences: Any) -> ModelConfig:
    """Builds a ModelConfig from the common field names.

    Args:
      fields: fields of config.json.
      architecture: name in config.json's `architectures`.
      **differences: fields of ModelConfig that the family sets differently, and `rotary_factor`,
        the fraction of head_dim that is rotated if config.json does not say (default 1).
    """
    fields.expect("hidden_act", "silu", "silu")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", hidden // heads)
    max_position_embeddings = fields.size("max_position_embeddings")
    rotary_factor = fields.rope("partial_rotary_factor", differences.pop("rotary_factor", 1.0))
    values = {
        "architecture": architecture,
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.size("intermediate_size"),
        "layers": (LayerKind(),) * fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "norm_eps": fields.get("rms_norm_eps", float, 1e-6),
        "rope_theta": fields.rope("rope_theta", 10000.0),
        "rotary_dim": int(head_dim * rotary_factor),
        "rope_interleaved": False,
        "rope_scaling": parse_rope_scaling(fields.rope_block(), max_position_embeddings),
        "alibi": False,
        "qkv_bias": fields.get("attention_bias", bool, False),
        "out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "post_norms": False,
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "normalized_head": False,
        "eos_token_ids": fields.eos_token_ids(),
        "dtype": fields.dtype(),
    }
    return ModelConfig(**values | differences)
