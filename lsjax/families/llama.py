"""Llama 3, 3.1, 3.2 and other models in the LlamaForCausalLM layout.

Source: transformers' modeling_llama.py.
"""

from lsjax.config import ModelConfig
from lsjax.families.family import Family
from lsjax.families.fields import Fields
from lsjax.families.hf_fields import parse_hf
from lsjax.families.hf_names import PRE_NORMS, hf_tensors


def _parse(fields: Fields, architecture: str) -> ModelConfig:
    return parse_hf(
        fields,
        architecture,
        out_bias=fields.get("attention_bias", bool, False),
        mlp_bias=fields.get("mlp_bias", bool, False),
    )


LLAMA = Family(("LlamaForCausalLM",), _parse, lambda config: hf_tensors(config, PRE_NORMS))
