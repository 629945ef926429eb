"""Prefill on a GPU: attention of many queries to the KV cache with cuDNN.

cuDNN multiplies bfloat16, and its mask only hides keys past a length. It therefore gets the slots
that every query sees, one piece of the cache at a time: int8 is dequantized for one piece only, and
pieces past the last visible slot cost nothing. Slots that only some queries see, at the edges of
the causal mask and of a sliding window, are left to other code, and the Partials are merged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from lsjax.attention.partial import Partial, merge

# Slots dequantized at a time: enough work to hide a kernel launch. Keys and values take 64 MiB for
# 4 KV heads with a head_dim of 128.
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
    """Computes attention of each query to its slots begin <= s < end.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16, already scaled by 1/sqrt(head_dim).
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float.
      k_scale, v_scale: [batch, kv_heads, capacity] scales of int8 keys and values, else None.
      begin, end: [batch, length] int32 slot range of each query; slots past the capacity are
        ignored.
      edges: (begin, end) -> the same attention of `q` to these keys, for other slot ranges.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    capacity = k.shape[2]
    size = min(_PIECE, capacity)
    first = jnp.clip(jnp.max(begin), 0, capacity)
    last = jnp.clip(jnp.min(end), first, capacity)
    # A slice of `size` slots from `first` on must fit into the capacity.
    last = jnp.where(first + size <= capacity, last, first)
    pieces = -(-(last - first) // size)

    def step(i: jax.Array, partial: Partial) -> Partial:
        stop = last - (pieces - 1 - i) * size  # only the first piece may be partial
        start = jnp.maximum(stop - size, first)
        keys, values = (
            _widened(x, scale, start, size) for x, scale in ((k, k_scale), (v, v_scale))
        )
        return merge(partial, _attend(q, keys, values, stop - start))

    partial = merge(edges(begin, jnp.minimum(end, first)), edges(jnp.maximum(begin, last), end))
    return jax.lax.fori_loop(0, pieces, step, partial)


def _widened(x: jax.Array, scale: jax.Array | None, start: jax.Array, size: int) -> jax.Array:
    """Dequantizes slots start .. start + size - 1.

    Returns:
      [batch, kv_heads, size, head_dim] bfloat16.
    """
    piece = jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)
    if scale is not None:
        scale = jax.lax.dynamic_slice_in_dim(scale, start, size, axis=2)
        piece = piece.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return piece.astype(jnp.bfloat16)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> Partial:
    """Computes attention of all queries to the first `length` keys; length is at least 1.

    Calls the function below jax.nn.dot_product_attention, which would round lse to bfloat16.
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
