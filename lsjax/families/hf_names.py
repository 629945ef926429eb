"""Tensor names in the checkpoint layouts that transformers writes."""

from lsjax.config import ModelConfig
from lsjax.families.family import Tensor, with_bias


def hf_tensors(
    config: ModelConfig,
    norms: dict[str, str],
    fused_gate_up: bool = False,
) -> tuple[Tensor, ...]:
    """Returns the tensors of a checkpoint whose layers are named `model.layers.N`.

    Args:
      config: model config.
      norms: norm name in a checkpoint layer -> norm name in the parameter tree.
      fused_gate_up: whether one tensor holds gate and up, gate first.
    """
    tensors = [Tensor("model.embed_tokens.weight", ("embed/weight",))]
    for i in range(config.num_layers):
        layer, block = f"model.layers.{i}", f"layers_{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for p in ("q", "k", "v"):
            tensors += with_bias(f"{attn}.{p}_proj", (f"{block}/attn/{p}",), config.qkv_bias)
        tensors += with_bias(f"{attn}.o_proj", (f"{block}/attn/o",), config.out_bias)
        if config.qk_norm:
            for p in ("q", "k"):
                tensors += with_bias(f"{attn}.{p}_norm", (f"{block}/attn/{p}_norm",), False)
        if config.layers[i].experts:
            tensors += _experts(mlp, f"{block}/mlp", config.layers[i].experts.count)
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
    tensors += with_bias("model.norm", ("final_norm",), False)
    if not config.tie_embeddings:
        tensors += with_bias("lm_head", ("lm_head",), False)
    return tuple(tensors)


def _experts(mlp: str, path: str, count: int) -> list[Tensor]:
    """Returns the tensors of a router and its experts, which are stacked by projection."""
    tensors = with_bias(f"{mlp}.gate", (f"{path}/router",), False)
    for i in range(count):
        for p in ("gate", "up", "down"):
            name = f"{mlp}.experts.{i}.{p}_proj.weight"
            tensors.append(Tensor(name, (f"{path}/{p}/weight",), i))
    return tensors


PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
