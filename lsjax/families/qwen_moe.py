"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in the place of most gated MLPs.

Source: transformers' modeling_qwen3_moe.py.
"""

import dataclasses

from lsjax.config import Experts, ModelConfig
from lsjax.families.family import Family
from lsjax.families.fields import Fields
from lsjax.families.qwen import QWEN3
from lsjax.runtime.errors import UserError

# As transformers holds them in memory, and as files written in that layout do.
_STACKED = {
    "mlp.experts.gate_up_proj": (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
    ),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
}


def _parse(fields: Fields, architecture: str) -> ModelConfig:
    """Parses a config.json; every decoder_sparse_step-th layer has experts, unless it is named."""
    fields.mark_known("output_router_logits", "max_window_layers")
    config = QWEN3.parse(fields, architecture)
    step = fields.size("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", list, None) or []
    if not all(isinstance(i, int) and 0 <= i < config.num_layers for i in dense):
        raise UserError(
            "config.json field 'mlp_only_layers' must hold indices of layers, from 0 to "
            f"{config.num_layers - 1}."
        )
    experts = parse_experts(fields, 128, 768)
    layers = tuple(
        dataclasses.replace(kind, experts=None if i in dense or (i + 1) % step else experts)
        for i, kind in enumerate(config.layers)
    )
    return dataclasses.replace(config, layers=layers)


def parse_experts(
    fields: Fields, count: int, width: int, renormalized: bool = False, shared_width: int = 0
) -> Experts:
    """Reads what layers of experts are.

    Args:
      fields: fields of config.json.
      count, width, renormalized: what holds if config.json does not say.
      shared_width: see Experts.
    """
    no_balance = fields.raw_value("router_aux_loss_coef") == 0
    experts = Experts(
        count=fields.size("num_experts", fields.size("num_local_experts", count)),
        per_token=fields.size("num_experts_per_tok", 8),
        width=fields.size("moe_intermediate_size", width),
        renormalized=fields.get("norm_topk_prob", bool, renormalized),
        balance_weight=0.0 if no_balance else fields.get("router_aux_loss_coef", float, 0.001),
        shared_width=shared_width,
    )
    if experts.per_token > experts.count:
        raise UserError(
            f"config.json asks for {experts.per_token} experts per token out of {experts.count}; "
            "num_experts_per_tok is at most num_experts."
        )
    return experts


QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), _parse, QWEN3.tensors, stacked=_STACKED)
