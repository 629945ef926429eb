"""Qwen2, Qwen2.5 and Qwen3.

Source: transformers' modeling_qwen2.py and modeling_qwen3.py.
"""

from lsjax.config import LayerKind, ModelConfig
from lsjax.families.family import Family
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors
from lsjax.runtime.errors import UserError


def _parse_qwen2(fields: Fields, architecture: str) -> ModelConfig:
    # Qwen2 has query, key and value biases whatever config.json says.
    return parse_hf(fields, architecture, qkv_bias=True, layers=_layers(fields))


def _parse_qwen3(fields: Fields, architecture: str) -> ModelConfig:
    bias = fields.get("attention_bias", bool, False)
    head_dim = fields.size("head_dim", 128)
    return parse_hf(
        fields.with_overrides(head_dim=head_dim),
        architecture,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        layers=_layers(fields),
    )


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer.

    `layer_types` says which layers slide. Without it, layers from max_window_layers on slide.
    `sliding_window` alone has no effect: Qwen's files set it with use_sliding_window false.
    """
    num_layers = fields.size("num_hidden_layers")
    fields.mark_known("sliding_window", "max_window_layers", "layer_types")
    if not fields.get("use_sliding_window", bool, False):
        return (LayerKind(),) * num_layers
    window = fields.size("sliding_window")
    types = fields.get("layer_types", list, None)
    if types is None:
        first = fields.get("max_window_layers", int, 28)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    known = ("full_attention", "sliding_attention")
    if len(types) != num_layers or not all(t in known for t in types):
        raise UserError(
            f"config.json field 'layer_types' must hold 'full_attention' or 'sliding_attention' "
            f"for each of the {num_layers} layers."
        )
    return tuple(LayerKind(window if t == "sliding_attention" else None) for t in types)


def _tensors(config: ModelConfig):
    return hf_tensors(config, PRE_NORMS)


QWEN2 = Family(("Qwen2ForCausalLM",), _parse_qwen2, _tensors)
QWEN3 = Family(("Qwen3ForCausalLM",), _parse_qwen3, _tensors)
