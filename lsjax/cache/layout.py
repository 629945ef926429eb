"""Keeping a store in the one memory layout that its readers want."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

_LANES = 128  # of a TPU's vectors


def pinned(x: jax.Array, platform: str) -> jax.Array:
    """A store's array, or what is written to it, [batch, kv_heads, slots, ...], where it lies.

    On a TPU the attention kernel reads rows of whole vectors: channels innermost where they are a
    multiple of the lanes, else slots. Left to itself XLA takes the layout that suits the writing
    of one token, and copies the cache between the two at every step. Elsewhere it needs no telling.
    """
    if platform != "tpu":
        return x
    order = list(range(x.ndim))
    if x.ndim == 4 and x.shape[3] % _LANES:
        order[2:] = [3, 2]
    return with_layout_constraint(x, Layout(major_to_minor=tuple(order)))
