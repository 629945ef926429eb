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
    c, total = config, 0.0
    for kind in c.layers:
        total += 2.0 * c.hidden_size * (_mixing_rows(c, kind) + c.mlp_of(kind).matrix_rows)
        if kind.recurrence:
            total += kind.recurrence.operations
        else:
            seen = min(start + length / 2, most_keys, kind.window or math.inf)
            total += 4.0 * c.num_heads * c.head_dim * seen
    return length * total


def _mixing_rows(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the vectors of the hidden size that attention or a recurrence multiplies by."""
    if kind.recurrence:
        return kind.recurrence.matrix_rows
    queries = (2 + config.gated_attention) * config.num_heads
    return config.head_dim * (queries + 2 * config.num_kv_heads)
