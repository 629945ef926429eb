"""Qwen3.5: three layers of Gated DeltaNet to one of gated attention; text alone.

Checkpoints hold a vision encoder and draft layers as well, which are not read.
Source: transformers' modeling_qwen3_5.py and modeling_qwen3_5_moe.py.
"""

from typing import Any

from lsjax.config import DeltaNet, Experts, LayerKind, ModelConfig
from lsjax.families.family import Family, Tensor
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors
from lsjax.families.qwen_moe import QWEN3_MOE, parse_experts
from lsjax.runtime.errors import UserError

# What config.json says beside `text_config`: of images, videos and other models.
_BESIDE_TEXT = (
    *("vision_config", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "language_model_only"),
)
# What it says of both, the text's own value being the default.
_OF_BOTH = ("tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype")
_DRAFTS = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
_OF_OTHERS = ("model.visual.", "mtp.")  # tensors of the encoder of images, and of draft layers
_MROPE = ("mrope_section", "mrope_interleaved")  # all three positions of a token of text are one


def _parse(fields: Fields, architecture: str) -> ModelConfig:
    block = fields.get("text_config", dict, None)
    if block is None:
        return _parse_text(fields, architecture)
    fields.mark_known(*_BESIDE_TEXT)
    both = {name: fields.raw_value(name) for name in _OF_BOTH if name in fields.raw}
    text = Fields(block | both)
    config = _parse_text(text, architecture)
    text.warn_unused()
    return config


def _parse_text(fields: Fields, architecture: str) -> ModelConfig:
    fields.expect("attn_output_gate", True, True)
    fields.expect("output_gate_type", "swish", "swish")
    fields.expect("mamba_ssm_dtype", "float32", "float32")
    fields.expect("mlp_only_layers", [], [])
    fields.mark_known(*_DRAFTS)
    bias = fields.get("attention_bias", bool, False)
    defaults = {"head_dim": fields.size("head_dim", 256)} | _without_mrope(fields)
    experts = None
    if architecture.startswith("Qwen3_5Moe"):
        experts = _experts(fields)
        defaults["intermediate_size"] = experts.shared_width
    return parse_hf(
        fields.with_overrides(**defaults),
        architecture,
        rotary_factor=0.25,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        gated_attention=True,
        zero_centered_norms=True,
        layers=_layers(fields, experts),
    )


def _without_mrope(fields: Fields) -> dict[str, Any]:
    """Returns the blocks of rope settings without those that images and videos need."""
    blocks = {name: fields.raw.get(name) for name in ("rope_parameters", "rope_scaling")}
    return {
        name: {key: value for key, value in block.items() if key not in _MROPE}
        for name, block in blocks.items()
        if isinstance(block, dict)
    }


def _experts(fields: Fields) -> Experts:
    """Returns the experts, of which every layer has its own, one of them shared by all tokens."""
    fields.expect("norm_topk_prob", True, True)
    fields.mark_known("output_router_logits")
    shared_width = fields.size("shared_expert_intermediate_size", 512)
    return parse_experts(fields, 256, 512, renormalized=True, shared_width=shared_width)


def _layers(fields: Fields, experts: Experts | None) -> tuple[LayerKind, ...]:
    """Returns the kind of each layer: every full_attention_interval-th is attention."""
    num_layers, interval = (
        fields.size("num_hidden_layers"),
        fields.size("full_attention_interval", 4),
    )
    known = ("linear_attention", "full_attention")
    types = fields.get("layer_types", list, None)
    if types is None:
        types = [known[(i + 1) % interval == 0] for i in range(num_layers)]
    if len(types) != num_layers or not all(t in known for t in types):
        raise UserError(
            f"config.json field 'layer_types' must hold 'linear_attention' or 'full_attention' "
            f"for each of the {num_layers} layers."
        )
    net = DeltaNet(
        key_heads=fields.size("linear_num_key_heads", 16),
        value_heads=fields.size("linear_num_value_heads", 32),
        key_dim=fields.size("linear_key_head_dim", 128),
        value_dim=fields.size("linear_value_head_dim", 128),
        conv_width=fields.size("linear_conv_kernel_dim", 4),
    )
    if net.value_heads % net.key_heads:
        raise UserError(
            f"config.json asks for {net.value_heads} value heads over {net.key_heads} key heads in "
            "recurrent layers; the first must be a multiple of the second."
        )
    return tuple(LayerKind(None, experts, net if t == "linear_attention" else None) for t in types)


def _tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    with_images = config.architecture.endswith("ForConditionalGeneration")
    model = "model.language_model" if with_images else "model"
    return hf_tensors(config, PRE_NORMS, model=model)


QWEN3_5 = Family(
    ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    _parse,
    _tensors,
    ignored=_OF_OTHERS,
)
QWEN3_5_MOE = Family(
    ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    _parse,
    _tensors,
    ignored=_OF_OTHERS,
    stacked=QWEN3_MOE.stacked,
)
