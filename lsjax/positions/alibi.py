"""Attention with linear biases: a head's score falls by its slope for each token of distance.

Source: arXiv 2108.12409; transformers' build_alibi_tensor (Bloom), modeling_baichuan.py.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig


def alibi_slopes(heads: int) -> np.ndarray:
    """[heads] float32: 2^(-8 (h + 1) / heads) where heads is a power of two.

    Otherwise the slopes of the power of two below it, then every other one of twice that power.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = _powers(below)
    if below < heads:
        slopes = np.concatenate([slopes, _powers(2 * below)[0::2][: heads - below]])
    return slopes.astype(np.float32)


def layer_slopes(
    config: ModelConfig, heads: Sequence[Sequence[int]] | None = None
) -> list[jax.Array]:
    """Of each layer, [heads] slopes of its query heads, in the order that `heads` gives them."""
    slopes = alibi_slopes(config.num_heads)
    orders = heads or [range(config.num_heads)] * config.num_layers
    return [jnp.asarray(slopes[list(order)]) for order in orders]


def _powers(heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
