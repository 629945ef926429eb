"""Gradients of attention, block by block, from each query's lse: no scores are kept.

With p = exp(s - lse) of the scores s, and delta = sum(out * d_out) of a query:
d_v = p^T d_out, d_s = p * (d_out v^T - delta), d_q = d_s k, d_k = d_s^T q.
Source: FlashAttention (arXiv 2205.14135).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention import ring
from lsjax.attention.blockwise import Blocks, Seen
from lsjax.attention.rows import even, over_queries, seen_of
from lsjax.cache import Zigzag
from lsjax.precision import einsum


class Queries(NamedTuple):
    """What is known of queries when gradients are asked for.

    Attributes:
      q: [batch, kv_heads, group, length, head_dim], scaled.
      d_out: like q, the gradient of what attention gave.
      lse: [batch, kv_heads, group, length] float32.
      delta: [batch, kv_heads, group, length] float32, the sum of out * d_out.
    """

    q: jax.Array
    d_out: jax.Array
    lse: jax.Array
    delta: jax.Array

    def block(self, start: jax.Array, size: int) -> "Queries":
        """Those from `start` on, a group's as rows of one product: [batch, kv_heads, rows, ...]."""

        def rows(x: jax.Array) -> jax.Array:
            taken = jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)
            return taken.reshape(*x.shape[:2], -1, *x.shape[4:])

        return Queries(*map(rows, self))


# Of keys and values, [batch, kv_heads, slots, head_dim] float32.
KeyGradients = tuple[jax.Array, jax.Array]


def gradients(
    zigzag: Zigzag,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    slopes: jax.Array | None,
    size: int,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of this device's queries, keys and values; to be called under shard_map.

    Keys and values travel round the ring as in `ring.attend`, and their gradients with them, one
    step behind: what the devices before have added is on its way while this one computes.

    Args:
      zigzag: where the tokens of a row lie.
      queries: this device's.
      k, v: [batch, kv_heads, length, head_dim], this device's.
      seen: indices in the row that its queries see.
      slopes: [kv_heads, group] of ALiBi, or None.
      size: slots that travel at once, a divisor of length.
      blocks: how much is worked on at a time.

    Returns:
      float32, shaped as q, k and v.
    """
    d_q = jnp.zeros(queries.q.shape, jnp.float32)
    if zigzag.devices == 1:
        d_q, (d_k, d_v) = meet(d_q, queries, k, v, seen, slopes, blocks)
        return d_q, d_k, d_v
    device, length = jax.lax.axis_index("context"), k.shape[2]

    def visit(i: jax.Array, state):
        d_q, whole = state
        first = i * size

        def step(step: jax.Array, state):
            d_q, block, added = state
            coming = ring.from_the_device_before(block, zigzag.devices)
            added = ring.from_the_device_before(added, zigzag.devices)
            here = seen_of(zigzag, (device - step) % zigzag.devices, first, size, seen)
            d_q, own = meet(d_q, queries, *block, here, slopes, blocks)
            return d_q, coming, jax.tree.map(jnp.add, added, own)

        block = tuple(jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in (k, v))
        added = tuple(jnp.zeros(x.shape, jnp.float32) for x in block)
        d_q, _, added = jax.lax.fori_loop(0, zigzag.devices, step, (d_q, block, added))
        added = ring.from_the_device_before(added, zigzag.devices)  # and home
        put = jax.lax.dynamic_update_slice_in_dim
        return d_q, tuple(put(x, a, first, axis=2) for x, a in zip(whole, added, strict=True))

    whole = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    d_q, (d_k, d_v) = jax.lax.fori_loop(0, length // size, visit, (d_q, whole))
    return d_q, d_k, d_v


def meet(
    d_q: jax.Array,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    seen: Seen,
    slopes: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, KeyGradients]:
    """Adds to d_q what some keys and values give, and returns theirs from all queries.

    Args:
      d_q: float32, shaped as the queries.
      queries: all.
      k, v: [batch, kv_heads, slots, head_dim].
      seen: the slots that each query sees.
      slopes: [kv_heads, group] of ALiBi, or None.
      blocks: how much is worked on at a time.
    """
    batch, kv_heads, group, length, head_dim = queries.q.shape
    slots = k.shape[2]
    size = even(length, max(1, blocks.rows // group))
    keys_size = even(slots, blocks.keys)
    positions = jnp.arange(slots) if seen.positions is None else seen.positions

    def some_queries(state, start: jax.Array, seen: Seen):
        d_q, sums = state
        rows = queries.block(start, size)
        begin, end, at = seen.begin, seen.end, seen.at

        def some_keys(j: jax.Array, state):
            d_rows, sums = state
            # The last block may reach back into the one before, which is masked then.
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
            own = (
                einsum("bkrs,bkrd->bksd", d_scores, rows.q),
                einsum("bkrs,bkrd->bksd", weights.astype(keys.dtype), rows.d_out),
            )
            sums = tuple(
                jax.lax.dynamic_update_slice_in_dim(x, take(x) + a, key_start, axis=2)
                for x, a in zip(sums, own, strict=True)
            )
            return d_rows + einsum("bkrs,bksd->bkrd", d_scores, keys), sums

        first, last = jnp.min(begin) // keys_size, -(-jnp.max(end) // keys_size)
        d_rows = jnp.zeros(rows.q.shape, jnp.float32)
        d_rows, sums = jax.lax.fori_loop(first, last, some_keys, (d_rows, sums))
        d_rows = d_rows.reshape(batch, kv_heads, group, size, head_dim)
        d_rows += jax.lax.dynamic_slice_in_dim(d_q, start, size, axis=3)
        return jax.lax.dynamic_update_slice_in_dim(d_q, d_rows, start, axis=3), sums

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    return over_queries(some_queries, (d_q, sums), seen, slots, size)
