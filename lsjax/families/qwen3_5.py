"""Qwen3.5: three layers of Gated DeltaNet to one of gated attention; text alone.

Checkpoints hold a vision encoder and draft layers as well, which are not read.
Source: transformers' modeling_qwen3_5.py and modeling_qwen3_5_moe.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lsjax.config import LayerKind, ModelConfig, StateArray
from lsjax.families.family import Family, Tensor, with_bias
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors
from lsjax.families.qwen_moe import QWEN3_MOE, Experts, experts_tensors, parse_experts
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
# Tokens that the delta rule solves together in prefill, by matrix products.
DELTA_CHUNK = 64
# Vectors that prefill holds for a token, of the convolution's size, in float32; see
# lsjax/planning/arithmetic.py.
_HELD_VECTORS = 4.3


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet: a Recurrence whose state is one matrix per value head.

    Attributes:
      key_heads: number of heads of queries and keys.
      value_heads: number of heads of values; value_heads / key_heads of them share a key head.
      key_dim, value_dim: width of one head of queries and keys, and of values.
      conv_width: tokens that the causal convolution of queries, keys and values sees.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    name = "delta_net"
    # How much is forgotten and written: errors of them add up over the tokens.
    float_weights = ("a/weight", "b/weight")

    @property
    def group(self) -> int:
        """The number of value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Inputs of the convolution for a key head: its query, its key, and its group's values."""
        return 2 * self.key_dim + self.group * self.value_dim

    @property
    def state(self) -> Mapping[str, StateArray]:
        """The matrices of the value heads by key head, and the last inputs of the convolution."""
        matrix = self.key_heads, self.group, self.value_dim, self.key_dim
        recent = self.conv_width - 1, self.key_heads, self.channels
        return {"matrix": StateArray(matrix, 0, "float32"), "recent": StateArray(recent, 1)}

    @property
    def split(self) -> Mapping[str, int]:
        return {"key heads": self.key_heads}

    @property
    def matrix_rows(self) -> int:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return 2 * keys + 3 * values + 2 * self.value_heads

    @property
    def operations(self) -> float:
        """About those of three products with the state, and of three halves within a chunk."""
        state = 3 * self.key_dim * self.value_dim
        within = 1.5 * DELTA_CHUNK * (self.key_dim + self.value_dim)
        return 2.0 * self.value_heads * (state + within)

    @property
    def held_bytes(self) -> float:
        return _HELD_VECTORS * self.key_heads * self.channels * 4


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
    others = {"recurrence": _recurrence_tensors, "mlp": experts_tensors}
    return hf_tensors(config, PRE_NORMS, model=model, **others)


def _recurrence_tensors(layer: str, path: str, _: DeltaNet) -> list[Tensor]:
    """Returns the tensors of a Gated DeltaNet; those of queries, keys and values are fused."""
    net, fused = f"{layer}.linear_attn", ("q", "k", "v")
    tensors = with_bias(f"{net}.in_proj_qkv", tuple(f"{path}/{p}" for p in fused), False)
    for p in ("z", "b", "a"):
        tensors += with_bias(f"{net}.in_proj_{p}", (f"{path}/{p}",), False)
    tensors.append(Tensor(f"{net}.conv1d.weight", tuple(f"{path}/{p}_conv" for p in fused)))
    tensors += [Tensor(f"{net}.{name}", (f"{path}/{name}",)) for name in ("A_log", "dt_bias")]
    tensors += with_bias(f"{net}.norm", (f"{path}/norm",), False)
    return tensors + with_bias(f"{net}.out_proj", (f"{path}/o",), False)


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
