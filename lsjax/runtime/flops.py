"""Counts of a model's floating-point operations."""

import math

from lsjax.config import DELTA_CHUNK, DeltaNet, LayerKind, ModelConfig


def prefill_cost(
    config: ModelConfig, start: int, length: int, most_keys: float = math.inf
) -> float:
    """Returns the floating-point operations of prefilling `length` tokens at position `start`.

    The cost of attention grows with the position, so the second half of a prompt costs more than
    the first. No query sees more than `most_keys` keys.
    """
    c, total = config, 0.0
    for kind in c.layers:
        total += 2.0 * c.hidden_size * (_mixing_channels(c, kind) + _mlp_channels(c, kind))
        if kind.delta_net:
            total += recurrence_cost(kind.delta_net)
        else:
            seen = min(start + length / 2, most_keys, kind.window or math.inf)
            total += 4.0 * c.num_heads * c.head_dim * seen
    return length * total


def recurrence_cost(net: DeltaNet) -> float:
    """Returns the floating-point operations of a token in a Gated DeltaNet, without its weights.

    They are about those of three products with the state, and of three halves within a chunk.
    """
    state = 3 * net.key_dim * net.value_dim
    within = 1.5 * DELTA_CHUNK * (net.key_dim + net.value_dim)
    return 2.0 * net.value_heads * (state + within)


def _mixing_channels(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the vectors of the hidden size that attention or a recurrence multiplies by."""
    net = kind.delta_net
    if net:
        keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
        return 2 * keys + 3 * values + 2 * net.value_heads
    queries = (2 + config.gated_attention) * config.num_heads
    return config.head_dim * (queries + 2 * config.num_kv_heads)


def _mlp_channels(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the number of vectors of the hidden size that a token's MLP multiplies by."""
    if kind.experts is None:
        return 3 * config.intermediate_size
    width = kind.experts.width * kind.experts.per_token + kind.experts.shared_width
    return 3 * width + kind.experts.count
