"""Attention with linear biases: a head's score falls by its slope per token of distance.

Source: arXiv 2108.12409; transformers' build_alibi_tensor (Bloom), modeling_baichuan.py.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns [heads] float32 slopes, 2^(-8 (h + 1) / heads) if `heads` is a power of two.

    Otherwise they are the slopes for the power of two below `heads`, followed by every other slope
    for twice that power.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = _powers(below)
    if below < heads:
        slopes = np.concatenate([slopes, _powers(2 * below)[0::2][: heads - below]])
    return slopes.astype(np.float32)


def layer_slopes(
    config: ModelConfig, heads: Sequence[Sequence[int]] | None = None
) -> list[jax.Array]:
    """Returns the [heads] slopes of each layer's query heads, in the order given by `heads`."""
    slopes = alibi_slopes(config.num_heads)
    orders = heads or [range(config.num_heads)] * config.num_layers
    return [jnp.asarray(slopes[list(order)]) for order in orders]


def _powers(heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
