"""Baichuan2: 13B uses ALiBi, 7B rotary positions; both have the same tensor names.

Source: baichuan-inc's modeling_baichuan.py. The output head's rows are normalized before the
matrix product.
"""

from lsjax.config import ModelConfig
from lsjax.families.family import Family, Tensor, with_bias
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors


def _parse(fields: Fields, architecture: str) -> ModelConfig:
    # Only 7B, which has rotary positions, sets max_position_embeddings.
    alibi = fields.raw_value("max_position_embeddings") is None
    fields.mark_known("model_max_length")
    length = fields.size("model_max_length") if alibi else fields.size("max_position_embeddings")
    return parse_hf(
        fields.with_overrides(max_position_embeddings=length),
        architecture,
        qkv_bias=False,
        alibi=alibi,
        # Baichuan1 has a vocabulary of 64,000 and an output head that is not normalized.
        normalized_head=fields.size("vocab_size") != 64000,
    )


def _tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    separate = {f"self_attn.{p}_proj" for p in ("q", "k", "v")}
    tensors = [
        t
        for t in hf_tensors(config, PRE_NORMS)
        if not any(f".{name}." in t.name for name in separate)
    ]
    for i in range(config.num_layers):
        qkv = tuple(f"layers_{i}/attn/{p}" for p in ("q", "k", "v"))
        tensors += with_bias(f"model.layers.{i}.self_attn.W_pack", qkv, False)
    return tuple(tensors)


BAICHUAN = Family(
    ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    _parse,
    _tensors,
)
