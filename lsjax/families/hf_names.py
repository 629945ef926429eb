"""Tensor names in the checkpoint layouts that transformers writes."""

from collections.abc import Callable

from lsjax.config import MLP, ModelConfig, Recurrence
from lsjax.families.family import Tensor, with_bias


def hf_tensors(
    config: ModelConfig,
    norms: dict[str, str],
    fused_gate_up: bool = False,
    model: str = "model",
    recurrence: Callable[[str, str, Recurrence], list[Tensor]] | None = None,
    mlp: Callable[[str, str, MLP], list[Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """Returns the tensors of a checkpoint whose layers are named `model.layers.N`.

    Args:
      config: model config.
      norms: norm name in a checkpoint layer -> norm name in the parameter tree.
      fused_gate_up: whether one tensor holds gate and up, gate first.
      model: what all names but that of the head begin with.
      recurrence: (name of a layer, path of its recurrence, the recurrence) -> its tensors.
      mlp: (name of an MLP, its path, the MLP) -> its tensors, for kinds that name an MLP.
    """
    tensors = [Tensor(f"{model}.embed_tokens.weight", ("embed/weight",))]
    for i in range(config.num_layers):
        layer, block, kind = f"{model}.layers.{i}", f"layers_{i}", config.layers[i]
        if net := kind.recurrence:
            tensors += recurrence(layer, f"{block}/{net.name}", net)
        else:
            tensors += _attention(f"{layer}.self_attn", f"{block}/attn", config)
        if kind.mlp:
            tensors += mlp(f"{layer}.mlp", f"{block}/mlp", kind.mlp)
        else:
            tensors += _dense_mlp(f"{layer}.mlp", f"{block}/mlp", config.mlp_bias, fused_gate_up)
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


def _dense_mlp(mlp: str, path: str, bias: bool, fused_gate_up: bool) -> list[Tensor]:
    if fused_gate_up:
        tensors = with_bias(f"{mlp}.gate_up_proj", (f"{path}/gate", f"{path}/up"), bias)
    else:
        tensors = with_bias(f"{mlp}.gate_proj", (f"{path}/gate",), bias)
        tensors += with_bias(f"{mlp}.up_proj", (f"{path}/up",), bias)
    return tensors + with_bias(f"{mlp}.down_proj", (f"{path}/down",), bias)


PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
