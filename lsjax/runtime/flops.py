"""Counts of a model's floating-point operations."""

import math

from lsjax.config import LayerKind, ModelConfig


def prefill_cost(
    config: ModelConfig, start: int, length: int, most_keys: float = math.inf
) -> float:
    """Returns the floating-point operations of prefilling `length` tokens at position `start`.

    The cost of attention grows with the position, so the second half of a prompt costs more than
    the first. No query sees more than `most_keys` keys.
    """
    c = config
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = c.hidden_size * sum(heads + _mlp_channels(c, kind) for kind in c.layers)
    channels = c.num_heads * c.head_dim
    keys = 0.0
    for window in c.windows:
        seen = min(start + length / 2, most_keys)
        keys += seen if window is None else min(seen, window)
    return length * (2.0 * weights + 4.0 * channels * keys)


def _mlp_channels(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the number of vectors of the hidden size that a token's MLP multiplies by."""
    if kind.experts is None:
        return 3 * config.intermediate_size
    return 3 * kind.experts.width * kind.experts.per_token + kind.experts.count
