"""Gradients of attention on a GPU by cuDNN's backward pass.

The backward pass over some of the keys, given the output and the log-sum-exp over all of them,
gives those keys' share of the gradients. So slots that all queries of a block see are run piece by
piece, and other code adds the edges, as in cudnn.in_general.
Source: FlashAttention-2 (arXiv 2307.08691), Ring Attention (arXiv 2310.01889).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import (
    AttentionLayout,
    MaskType,
    _dot_product_attention_bwd_p_wrapper,
)

from lsjax.attention.backward import Gradients, Queries
from lsjax.attention.blocking import even_block_size, loop_over_query_blocks
from lsjax.attention.blockwise import KeyRange

# Queries per call: more leave more to the edges, fewer add to the gradients of keys more often.
QUERIES = 1024
# Slots of all rows per call.
PIECE = 8192


def add_gradients(
    gradients: Gradients,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    key_range: KeyRange,
    add_edges: Callable[[Gradients, Queries, KeyRange], Gradients],
) -> Gradients:
    """Adds the contribution of some keys and values to the gradients.

    Args:
      gradients: gradients so far.
      queries: all local queries, bfloat16.
      k, v: [batch, kv_heads, slots, head_dim] bfloat16.
      key_range: range of slots that each query sees.
      add_edges: the same function of these keys and of a block of queries, for other slot ranges.
    """
    slots = k.shape[2]
    size = even_block_size(queries.q.shape[3], QUERIES)
    piece = min(max(PIECE // k.shape[0], 1), slots)

    def query_block_fn(sums: Gradients, start: jax.Array, key_range: KeyRange) -> Gradients:
        block = queries.slice(start, size)
        begin, end = key_range.start, key_range.stop
        first = jnp.clip(jnp.max(begin), 0, slots)
        last = jnp.clip(jnp.min(end), first, slots)

        def piece_fn(i: jax.Array, sums: Gradients) -> Gradients:
            return _add_piece(sums, block, k, v, first + i * piece, last, piece)

        d_q = jax.lax.dynamic_slice_in_dim(sums.q, start, size, axis=3)
        state = Gradients(d_q, sums.k, sums.v)
        state = jax.lax.fori_loop(0, -(-(last - first) // piece), piece_fn, state)
        for edge in (begin, jnp.minimum(end, first)), (jnp.maximum(begin, last), end):
            edge = KeyRange(*edge, key_range.query_positions)
            state = add_edges(state, block, edge)
        d_q = jax.lax.dynamic_update_slice_in_dim(sums.q, state.q, start, axis=3)
        return Gradients(d_q, state.k, state.v)

    return loop_over_query_blocks(query_block_fn, gradients, key_range, slots, size)


def _add_piece(
    sums: Gradients,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    last: jax.Array,
    size: int,
) -> Gradients:
    """Adds the contribution of the slots from `first` to before `last`, at most `size`.

    All queries see them.
    """
    # Slots past the last one come first: cuDNN hides keys behind those that are seen.
    at = jnp.minimum(first, k.shape[2] - size)
    shift, length = first - at, jnp.minimum(last - first, size)

    def take(x: jax.Array) -> jax.Array:
        return jnp.roll(jax.lax.dynamic_slice_in_dim(x, at, size, axis=2), -shift, axis=2)

    def add(x: jax.Array, new: jax.Array) -> jax.Array:
        seen = (jnp.arange(size) < length)[:, None]
        new = jnp.roll(jnp.where(seen, new.astype(jnp.float32), 0.0), shift, axis=2)
        new += jax.lax.dynamic_slice_in_dim(x, at, size, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=2)

    d_q, d_k, d_v = attend_backward(*_by_query_head(queries), take(k), take(v), length)
    d_q = d_q.astype(jnp.float32).reshape(sums.q.shape)
    return Gradients(sums.q + d_q, add(sums.k, d_k), add(sums.v, d_v))


def _by_query_head(queries: Queries) -> tuple[jax.Array, ...]:
    """Returns q, out, d_out and lse with the axes of KV heads and groups as one."""
    arrays = queries.q, queries.out, queries.d_out, queries.lse
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in arrays)


def attend_backward(
    q: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs cuDNN's backward pass over the first `length` keys of each row.

    JAX has it only as the derivative of attention to these keys alone, which would give their own
    log-sum-exp; so the primitive is called.

    Args:
      q, out, d_out: [batch, heads, queries, head_dim] bfloat16.
      lse: [batch, heads, queries] float32.
      k, v: [batch, kv_heads, keys, head_dim] bfloat16.
      length: [] number of keys that are seen, at least 1.

    Returns:
      Gradients in bfloat16, shaped as q, k and v; those of other keys have no meaning.
    """
    batch, unused = q.shape[0], jnp.zeros(0, q.dtype)
    lengths = jnp.full(batch, q.shape[2], jnp.int32), jnp.full(batch, length, jnp.int32)
    return _dot_product_attention_bwd_p_wrapper.bind(
        *(q, k, v, unused, *lengths, *(unused,) * 4, lse, out, d_out),
        scale=1.0,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=MaskType.PADDING,
        layout=AttentionLayout.BNTH.value,
        sliding_window_length=None,
    )
