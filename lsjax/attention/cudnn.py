"""Prefill on a GPU: many queries against the cache, by cuDNN's attention.

cuDNN multiplies bfloat16 and masks no more than the keys past a length, so it is given the slots
that every query sees, a piece of the store at a time: int8 is widened for one piece only, and
pieces past the last slot seen cost nothing. What only some queries see, at the edges of causality
and of a sliding window, is left to other code, and the Partials are merged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from lsjax.attention.partial import Partial, merge

# Slots widened at a time: enough work to hide the start of a kernel, in 64 MiB for 4 heads of 128.
_PIECE = 32768


def prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    begin: jax.Array,
    end: jax.Array,
    edges: Callable[[jax.Array, jax.Array], Partial],
) -> Partial:
    """Attention of some queries to the slots begin <= s < end of each.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16, already scaled by 1/sqrt(head_dim).
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float.
      k_scale, v_scale: [batch, kv_heads, capacity] of int8 keys and values, else None.
      begin, end: [batch, length] int32; what they reach beyond the capacity is left out.
      edges: the same attention, of `q` to these keys, for another begin and end.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    capacity = k.shape[2]
    size = min(_PIECE, capacity)
    first = jnp.clip(jnp.max(begin), 0, capacity)
    last = jnp.clip(jnp.min(end), first, capacity)
    # A slice of `size` from `first` on must lie in the store.
    last = jnp.where(first + size <= capacity, last, first)
    pieces = -(-(last - first) // size)

    def step(i: jax.Array, partial: Partial) -> Partial:
        stop = last - (pieces - 1 - i) * size  # the first piece is the one that is not whole
        start = jnp.maximum(stop - size, first)
        keys, values = (
            _widened(x, scale, start, size) for x, scale in ((k, k_scale), (v, v_scale))
        )
        return merge(partial, _attend(q, keys, values, stop - start))

    partial = merge(edges(begin, jnp.minimum(end, first)), edges(jnp.maximum(begin, last), end))
    return jax.lax.fori_loop(0, pieces, step, partial)


def _widened(x: jax.Array, scale: jax.Array | None, start: jax.Array, size: int) -> jax.Array:
    """[batch, kv_heads, size, head_dim] bfloat16 of the slots start .. start + size - 1."""
    piece = jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
    if scale is not None:
        scale = jax.lax.dynamic_slice_in_dim(scale, start, size, axis=2)
        piece = piece.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return piece.astype(jnp.bfloat16)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> Partial:
    """Attention of all queries to the first `length` keys, of which there is at least one.

    Called below jax.nn.dot_product_attention, which would round the log-sum-exp to bfloat16.
    """
    batch, kv_heads, group, queries, head_dim = q.shape
    values, lse = dot_product_attention(
        q.reshape(batch, kv_heads * group, queries, head_dim),
        k,
        v,
        q_seqlen=jnp.full(batch, queries, jnp.int32),
        kv_seqlen=jnp.full(batch, length, jnp.int32),
        mask_type=MaskType.PADDING,
        qkv_layout="BNTH",
        return_residual=True,
    )
    return Partial(
        values=values.astype(jnp.float32).reshape(q.shape), lse=lse.reshape(q.shape[:-1])
    )
