"""Blockwise gradients of attention; weights are recomputed from each query's lse, never stored.

With p = exp(s - lse) of the scores s, and delta = sum(out * d_out) of a query:
d_v = p^T d_out, d_s = p * (d_out v^T - delta), d_q = d_s k, d_k = d_s^T q.
Source: FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention import ring
from lsjax.attention.blocking import even_block_size, local_key_range, loop_over_query_blocks
from lsjax.attention.blockwise import Blocks, KeyRange
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.runtime.precision import einsum


class Queries(NamedTuple):
    """Queries and what the backward pass needs to know about them.

    Attributes:
      q: [batch, kv_heads, group, length, head_dim], scaled.
      out: attention output, shaped as q.
      d_out: its gradient.
      lse: [batch, kv_heads, group, length] float32, log-sum-exp of the scores.
      delta: [batch, kv_heads, group, length] float32, sum of out * d_out.
    """

    q: jax.Array
    out: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array

    def slice(self, start: jax.Array, size: int) -> "Queries":
        """Returns `size` queries from `start` on."""
        return Queries(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=3) for x in self))

    def block(self, start: jax.Array, size: int) -> "Queries":
        """Returns `size` queries from `start` on, a group as rows: [batch, kv_heads, rows, ...]."""
        taken = self.slice(start, size)
        return Queries(*(x.reshape(*x.shape[:2], -1, *x.shape[4:]) for x in taken))


class Gradients(NamedTuple):
    """float32 gradients of queries, keys and values, each of the shape of its array."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


# (gradients so far, queries, keys, values, slots that the queries see) -> gradients with what these
# keys and values add
AddGradients = Callable[[Gradients, Queries, jax.Array, jax.Array, KeyRange], Gradients]


def gradients(
    add_gradients: AddGradients,
    zigzag: Zigzag,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    key_range: KeyRange,
    size: int,
) -> Gradients:
    """Returns gradients of the local queries, keys and values; called under shard_map.

    Keys and values rotate around the ring as in `ring.attend`. Their gradients follow one step
    behind: the sums of the previous devices are in flight while this device computes its own.

    Args:
      add_gradients: function that adds what a block of one device's slots contributes.
      zigzag: layout of a row's tokens along the context axis.
      queries: local queries.
      k, v: [batch, kv_heads, length, head_dim], local keys and values.
      key_range: key range of each local query, as indices in the row.
      size: number of slots sent at once, a divisor of length.
    """

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.float32)

    nothing = Gradients(*map(zeros, (queries.q, k, v)))
    if zigzag.devices == 1:
        return add_gradients(nothing, queries, k, v, key_range)

    def slot_block_fn(i: jax.Array, whole: Gradients) -> Gradients:
        first = i * size

        def block_fn(state, block, owner: jax.Array):
            d_q, added = state
            added = ring.ring_shift(added, zigzag.devices)
            local_range = local_key_range(zigzag, owner, first, size, key_range)
            # The sums of the previous devices arrive meanwhile.
            start = Gradients(d_q, *map(zeros, block))
            d_q, *block_gradients = add_gradients(start, queries, *block, local_range)
            return d_q, jax.tree.map(jnp.add, added, tuple(block_gradients))

        block = tuple(jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (k, v))
        state = whole.q, tuple(map(zeros, block))
        d_q, added = ring.scan(block_fn, state, block, zigzag.devices)
        added = ring.ring_shift(added, zigzag.devices)  # and home
        put = jax.lax.dynamic_update_slice_in_dim
        d_k, d_v = (put(x, a, first, axis=2) for x, a in zip(whole[1:], added, strict=True))
        return Gradients(d_q, d_k, d_v)

    return jax.lax.fori_loop(0, k.shape[2] // size, slot_block_fn, nothing)


def add_blockwise(
    gradients: Gradients,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    key_range: KeyRange,
    slopes: jax.Array | None,
    blocks: Blocks,
) -> Gradients:
    """Adds the contribution of some keys and values to the gradients, by loops over blocks.

    Args:
      gradients: gradients so far.
      queries: all local queries.
      k, v: [batch, kv_heads, slots, head_dim].
      key_range: range of slots that each query sees.
      slopes: [kv_heads, group] ALiBi slopes, or None.
      blocks: block sizes of the computation.
    """
    batch, kv_heads, group, length, head_dim = queries.q.shape
    slots = k.shape[2]
    size = even_block_size(length, max(1, blocks.rows // group))
    keys_size = even_block_size(slots, blocks.keys_for(blocks.rows))
    positions = jnp.arange(slots) if key_range.key_positions is None else key_range.key_positions

    def query_block_fn(state: Gradients, start: jax.Array, key_range: KeyRange) -> Gradients:
        d_q, *sums = state
        rows = queries.block(start, size)
        begin, end, at = key_range.start, key_range.stop, key_range.query_positions

        def key_block_fn(j: jax.Array, state):
            d_rows, sums = state
            # The last block may overlap the previous one; the mask hides the overlap.
            key_start = jnp.minimum(j * keys_size, slots - keys_size)

            def take(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, key_start, keys_size, axis=2)

            keys, values = take(k), take(v)
            scores = einsum("bkrd,bksd->bkrs", rows.q, keys) - rows.lse[..., None]
            shape = batch, kv_heads, group, size, keys_size
            scores = scores.reshape(shape)
            if slopes is not None:
                where = jax.lax.dynamic_slice_in_dim(positions, key_start, keys_size)
                distance = (at[:, :, None] - where).astype(jnp.float32)
                scores -= slopes[:, :, None, None] * distance[:, None, None]
            slot = key_start + jnp.arange(keys_size)
            visible = (slot >= j * keys_size) & (slot >= begin[:, :, None])
            visible &= slot < end[:, :, None]
            weights = jnp.where(visible[:, None, None], jnp.exp(scores), 0.0)
            weights = weights.reshape(batch, kv_heads, group * size, keys_size)
            d_weights = einsum("bkrd,bksd->bkrs", rows.d_out, values)
            d_scores = (weights * (d_weights - rows.delta[..., None])).astype(keys.dtype)
            block_gradients = (
                einsum("bkrs,bkrd->bksd", d_scores, rows.q),
                einsum("bkrs,bkrd->bksd", weights.astype(keys.dtype), rows.d_out),
            )
            sums = tuple(
                jax.lax.dynamic_update_slice_in_dim(x, take(x) + a, key_start, axis=2)
                for x, a in zip(sums, block_gradients, strict=True)
            )
            return d_rows + einsum("bkrs,bksd->bkrd", d_scores, keys), sums

        first, last = jnp.min(begin) // keys_size, -(-jnp.max(end) // keys_size)
        d_rows = jnp.zeros(rows.q.shape, jnp.float32)
        d_rows, sums = jax.lax.fori_loop(first, last, key_block_fn, (d_rows, tuple(sums)))
        d_rows = d_rows.reshape(batch, kv_heads, group, size, head_dim)
        d_rows += jax.lax.dynamic_slice_in_dim(d_q, start, size, axis=3)
        return Gradients(jax.lax.dynamic_update_slice_in_dim(d_q, d_rows, start, axis=3), *sums)

    return loop_over_query_blocks(query_block_fn, gradients, key_range, slots, size)
