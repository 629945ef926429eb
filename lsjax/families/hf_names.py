"""Tensor names in the checkpoint layouts that transformers writes."""

from collections.abc import Callable

from lsjax.config import Experts, ModelConfig, Recurrence
from lsjax.families.family import Tensor, with_bias


def hf_tensors(
    config: ModelConfig,
    norms: dict[str, str],
    fused_gate_up: bool = False,
    model: str = "model",
    recurrence: Callable[[str, str, Recurrence], list[Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """Returns the tensors of a checkpoint whose layers are named `model.layers.N`.

    Args:
      config: model config.
      norms: norm name in a checkpoint layer -> norm name in the parameter tree.
      fused_gate_up: whether one tensor holds gate and up, gate first.
      model: what all names but that of the head begin with.
      recurrence: (name of a layer, path of its recurrence, the recurrence) -> its tensors.
    """
    tensors = [Tensor(f"{model}.embed_tokens.weight", ("embed/weight",))]
    for i in range(config.num_layers):
        layer, block, mlp = f"{model}.layers.{i}", f"layers_{i}", f"{model}.layers.{i}.mlp"
        if net := config.layers[i].recurrence:
            tensors += recurrence(layer, f"{block}/{net.name}", net)
        else:
            tensors += _attention(f"{layer}.self_attn", f"{block}/attn", config)
        if config.layers[i].experts:
            tensors += _experts(mlp, f"{block}/mlp", config.layers[i].experts)
        elif fused_gate_up:
            gate_up = (f"{block}/mlp/gate", f"{block}/mlp/up")
            tensors += with_bias(f"{mlp}.gate_up_proj", gate_up, config.mlp_bias)
        else:
            for p in ("gate", "up"):
                tensors += with_bias(f"{mlp}.{p}_proj", (f"{block}/mlp/{p}",), config.mlp_bias)
        if not config.layers[i].experts:
            tensors += with_bias(f"{mlp}.down_proj", (f"{block}/mlp/down",), config.mlp_bias)
        for name, norm in norms.items():
            tensors += with_bias(f"{layer}.{name}", (f"{block}/{norm}",), False)
    tensors += with_bias(f"{model}.norm", ("final_norm",), False)
    if not config.tie_embeddings:
        tensors += with_bias("lm_head", ("lm_head",), False)
    return tuple(tensors)


def _attention(attn: str, path: str, config: ModelConfig) -> list[Tensor]:
    tensors = []
    for p in ("q", "k", "v"):
        tensors += with_bias(f"{attn}.{p}_proj", (f"{path}/{p}",), config.qkv_bias)
    tensors += with_bias(f"{attn}.o_proj", (f"{path}/o",), config.out_bias)
    if config.qk_norm:
        for p in ("q", "k"):
            tensors += with_bias(f"{attn}.{p}_norm", (f"{path}/{p}_norm",), False)
    return tensors


def _experts(mlp: str, path: str, experts: Experts) -> list[Tensor]:
    """Returns the tensors of a router and its experts, which are stacked by projection."""
    tensors = with_bias(f"{mlp}.gate", (f"{path}/router",), False)
    if experts.shared_width:
        for p in ("gate", "up", "down"):
            tensors += with_bias(f"{mlp}.shared_expert.{p}_proj", (f"{path}/shared/{p}",), False)
        tensors += with_bias(f"{mlp}.shared_expert_gate", (f"{path}/shared_gate",), False)
    for i in range(experts.count):
        for p in ("gate", "up", "down"):
            name = f"{mlp}.experts.{i}.{p}_proj.weight"
            tensors.append(Tensor(name, (f"{path}/{p}/weight",), i))
    return tensors


PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
