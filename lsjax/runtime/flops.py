"""Counts of a model's floating-point operations."""

from lsjax.config import ModelConfig


def prefill_cost(config: ModelConfig, start: int, length: int) -> float:
    """Returns the floating-point operations of prefilling `length` tokens at position `start`.

    The cost of attention grows with the position, so the second half of a prompt costs more than
    the first.
    """
    c = config
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    channels = c.num_heads * c.head_dim
    keys = 0.0
    for window in c.windows:
        seen = start + length / 2
        keys += seen if window is None else min(seen, window)
    return length * (2.0 * weights + 4.0 * channels * keys)
