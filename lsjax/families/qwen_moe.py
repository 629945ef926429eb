"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in the place of most gated MLPs.

Source: transformers' modeling_qwen3_moe.py.
"""

import dataclasses
from collections.abc import Mapping

from lsjax.config import HELD_MLP_VECTORS, ModelConfig
from lsjax.families.family import Family, Tensor, with_bias
from lsjax.families.fields import Fields
from lsjax.families.hf_names import PRE_NORMS, hf_tensors
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
_PROJECTIONS = ("gate", "up", "down")
_HELD_HIDDEN_VECTORS = 3  # of the hidden size, that prefill holds for each expert of a token


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: gated MLPs, of which a router chooses a few for each token.

    Attributes:
      count: number of experts.
      per_token: number of experts that are chosen for a token.
      width: width of one expert's gated MLP.
      renormalized: whether the chosen experts' probabilities are scaled to a sum of 1.
      balance_weight: weight of the router's load-balancing loss in training.
      shared_width: width of a gated MLP that runs on every token beside the chosen experts, times
        the sigmoid of a gate of its own; 0 for none.
    """

    count: int
    per_token: int
    width: int
    renormalized: bool
    balance_weight: float
    shared_width: int = 0

    float_weights = ("router/weight",)  # rounding would change which experts are chosen
    multiplies_at_once = True

    @property
    def split(self) -> Mapping[str, int]:
        shared = {"MLP channels": self.shared_width} if self.shared_width else {}
        return shared | {"experts": self.count}

    @property
    def matrix_rows(self) -> int:
        return 3 * (self.width * self.per_token + self.shared_width) + self.count

    def held_channels(self, hidden_size: int, model: int) -> float:
        """Returns those of a copy of the token for each of its experts, on every device."""
        of_expert = HELD_MLP_VECTORS * self.width + _HELD_HIDDEN_VECTORS * hidden_size
        return self.per_token * of_expert + HELD_MLP_VECTORS * self.shared_width / model

    def share_read(self, name: str, tokens: int) -> float:
        """Returns 1 but for the experts' own: those that the tokens choose, and all at most."""
        stacked = name.split("/")[0] in _PROJECTIONS
        return min(1.0, tokens * self.per_token / self.count) if stacked else 1.0


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
        dataclasses.replace(kind, mlp=None if i in dense or (i + 1) % step else experts)
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


def experts_tensors(mlp: str, path: str, experts: Experts) -> list[Tensor]:
    """Returns the tensors of a router and its experts, which are stacked by projection."""
    tensors = with_bias(f"{mlp}.gate", (f"{path}/router",), False)
    if experts.shared_width:
        for p in _PROJECTIONS:
            tensors += with_bias(f"{mlp}.shared_expert.{p}_proj", (f"{path}/shared/{p}",), False)
        tensors += with_bias(f"{mlp}.shared_expert_gate", (f"{path}/shared_gate",), False)
    for i in range(experts.count):
        for p in _PROJECTIONS:
            name = f"{mlp}.experts.{i}.{p}_proj.weight"
            tensors.append(Tensor(name, (f"{path}/{p}/weight",), i))
    return tensors


def _tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    return hf_tensors(config, PRE_NORMS, mlp=experts_tensors)


QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), _parse, _tensors, stacked=_STACKED)
