"""GLM-4-9B in both of its checkpoint layouts, and GLM-4-0414.

Source: transformers' modeling_glm.py and modeling_glm4.py; THUDM's modeling_chatglm.py.
"""

from lsjax.config import LayerKind, ModelConfig
from lsjax.families.family import Family, Tensor, with_bias
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors
from lsjax.positions.scaling import parse_rope_scaling

_POST_NORMS = {
    "post_self_attn_layernorm": "post_attn_norm",
    "post_mlp_layernorm": "post_mlp_norm",
}


def _parse_glm(fields: Fields, architecture: str) -> ModelConfig:
    head_dim = fields.size("head_dim", 128)
    return parse_hf(
        fields.with_overrides(head_dim=head_dim),
        architecture,
        qkv_bias=fields.get("attention_bias", bool, True),
        rotary_factor=0.5,
        rope_interleaved=True,
        norm_eps=fields.get("rms_norm_eps", float, 1.5625e-7),
        post_norms=architecture == "Glm4ForCausalLM",
    )


def _parse_chatglm(fields: Fields, architecture: str) -> ModelConfig:
    for name, allowed in (
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("add_bias_linear", False),
        ("original_rope", True),
        ("apply_residual_connection_post_layernorm", False),
    ):
        fields.expect(name, allowed, allowed)
    # Without grouped KV heads, the fused tensor interleaves q, k and v head by head.
    fields.expect("multi_query_attention", True, False)
    heads, num_layers = fields.size("num_attention_heads"), fields.size("num_layers")
    fields.expect("num_hidden_layers", num_layers, num_layers)
    head_dim = fields.size("kv_channels")
    seq_length = fields.size("seq_length")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("padded_vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("ffn_hidden_size"),
        layers=(LayerKind(),) * num_layers,
        num_heads=heads,
        num_kv_heads=fields.size("multi_query_group_num"),
        head_dim=head_dim,
        max_position_embeddings=seq_length,
        norm_eps=fields.get("layernorm_epsilon", float),
        rope_theta=10000.0 * fields.get("rope_ratio", float, 1.0),
        rotary_dim=head_dim // 2,
        rope_interleaved=True,
        rope_scaling=parse_rope_scaling(fields.raw_value("rope_scaling"), seq_length),
        alibi=False,
        qkv_bias=fields.get("add_qkv_bias", bool, False),
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        post_norms=False,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        normalized_head=False,
        eos_token_ids=fields.eos_token_ids(),
        dtype=fields.dtype(),
    )


def _chatglm_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    tensors = [Tensor("transformer.embedding.word_embeddings.weight", ("embed/weight",))]
    for i in range(config.num_layers):
        layer, block = f"transformer.encoder.layers.{i}", f"layers_{i}"
        qkv = tuple(f"{block}/attn/{p}" for p in ("q", "k", "v"))
        tensors += with_bias(f"{layer}.self_attention.query_key_value", qkv, config.qkv_bias)
        tensors += with_bias(f"{layer}.self_attention.dense", (f"{block}/attn/o",), False)
        gate_up = (f"{block}/mlp/gate", f"{block}/mlp/up")
        tensors += with_bias(f"{layer}.mlp.dense_h_to_4h", gate_up, False)
        tensors += with_bias(f"{layer}.mlp.dense_4h_to_h", (f"{block}/mlp/down",), False)
        for name, norm in PRE_NORMS.items():
            tensors += with_bias(f"{layer}.{name}", (f"{block}/{norm}",), False)
    tensors += with_bias("transformer.encoder.final_layernorm", ("final_norm",), False)
    if not config.tie_embeddings:
        tensors += with_bias("transformer.output_layer", ("lm_head",), False)
    return tuple(tensors)


GLM = Family(
    ("GlmForCausalLM", "Glm4ForCausalLM"),
    _parse_glm,
    lambda config: hf_tensors(
        config, PRE_NORMS | (_POST_NORMS if config.post_norms else {}), fused_gate_up=True
    ),
)
CHATGLM = Family(
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    _parse_chatglm,
    _chatglm_tensors,
    ignored=("transformer.rotary_pos_emb.inv_freq",),
)
