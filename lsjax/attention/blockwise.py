"""Attention over a store, block by block: no [queries, keys] matrix is ever whole.

The slots that queries see bound the loop over key blocks; a mask does the rest, in the blocks at
the edges only. Source: FlashAttention (arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial, from_sums
from lsjax.cache import Store
from lsjax.precision import einsum

# Rows of queries and keys whose scores stay in a core's cache.
_QUERY_BLOCK = 512
_KEY_BLOCK = 512
_KEY_BLOCK_FOR_ONE_TOKEN = 4096


class Seen(NamedTuple):
    """The slots of a store that queries see, and where they stand themselves.

    Attributes:
      begin, end: [batch, length], not decreasing along the length; a query sees the slots
        begin .. end - 1 as far as there are such. `begin` is None where all see from the first on.
      at: [batch, length] the queries' own positions, counted as the slots are.
    """

    begin: jax.Array | None
    end: jax.Array
    at: jax.Array


def attend(
    q: jax.Array, k: Store, v: Store, seen: Seen, slopes: jax.Array | None = None
) -> Partial:
    """Attention of some queries to the keys in a store.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      k, v: the keys and values.
      seen: which of them each query sees.
      slopes: [kv_heads, group] of ALiBi, or None.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    batch, length = q.shape[0], q.shape[3]
    if length > 1:

        def some(q: jax.Array, seen: Seen) -> Partial:
            return _attend_block(q, k, v, None, seen, slopes)

        return in_query_blocks(some, q, seen, _QUERY_BLOCK)
    if batch == 1:
        return _attend_block(q, k, v, None, seen, slopes)

    def one(row: jax.Array) -> Partial:
        # Rows of a batch hold different numbers of tokens: each reads its own only.
        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row, 1, 0)

        return _attend_block(take(q), k, v, row, jax.tree.map(take, seen), slopes)

    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, jnp.arange(batch)))


def in_query_blocks(
    attend: Callable[[jax.Array, Seen], Partial], q: jax.Array, seen: Seen, size: int
) -> Partial:
    """Attention of `size` queries at a time, one block of them after the other."""
    length = q.shape[3]
    if length <= size:
        return attend(q, seen)
    blocks = -(-length // size)
    pad = blocks * size - length
    if pad:  # repeat the last query: it bounds the loop as it did
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)))
        seen = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad)), mode="edge"), seen)

    def one(i: jax.Array) -> Partial:
        def take(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        return attend(take(q, 3), jax.tree.map(functools.partial(take, axis=1), seen))

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 3).reshape(*q.shape[:4], *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(join, jax.lax.map(one, jnp.arange(blocks)))


def _attend_block(
    q: jax.Array, k: Store, v: Store, row: jax.Array | None, seen: Seen, slopes: jax.Array | None
) -> Partial:
    """Of a few queries, all rows of the batch or one, to all keys that they see."""
    begin, end, at = seen
    size = key_block(k.capacity, _KEY_BLOCK_FOR_ONE_TOKEN if q.shape[3] == 1 else _KEY_BLOCK)

    def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        weighted, total, highest = state
        scores = _scores(q, k.block(row, i * size, size))
        slots = i * size + jnp.arange(size)
        if slopes is not None:
            distance = (at[:, :, None] - slots).astype(jnp.float32)
            scores -= slopes[:, :, None, None] * distance[:, None, None]
        if masked:
            visible = slots < end[:, :, None]
            if begin is not None:
                visible &= slots >= begin[:, :, None]
            scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        finite = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - finite[..., None])
        keep = jnp.exp(highest - finite)
        total = keep * total + jnp.sum(weights, axis=-1)
        weighed = _weigh(weights, v.block(row, i * size, size), q.dtype)
        return keep[..., None] * weighted + weighed, total, new_highest

    at_edge, inside = functools.partial(step, masked=True), functools.partial(step, masked=False)
    zeros = jnp.zeros(q.shape, jnp.float32)
    state = (zeros, zeros[..., 0], jnp.full(q.shape[:-1], -jnp.inf, jnp.float32))

    def clip(slot: jax.Array) -> jax.Array:
        return jnp.clip(slot, 0, k.capacity)

    # Blocks first .. last hold keys that some query sees; whole .. edge those that all queries see.
    last = -(-clip(jnp.max(end)) // size)
    first = jnp.zeros_like(last) if begin is None else clip(jnp.min(begin)) // size
    if q.shape[3] == 1:
        return from_sums(*jax.lax.fori_loop(first, last, at_edge, state))
    whole = first
    if begin is not None:
        whole = jnp.clip(-(-clip(jnp.max(begin)) // size), first, last)
        state = jax.lax.fori_loop(first, whole, at_edge, state)
    edge = jnp.clip(clip(jnp.min(end)) // size, whole, last)
    state = jax.lax.fori_loop(whole, edge, inside, state)
    return from_sums(*jax.lax.fori_loop(edge, last, at_edge, state))


def _scores(q: jax.Array, k: Store) -> jax.Array:
    """[batch, kv_heads, group, length, block] float32."""
    keys, factor = k.widened(q.dtype)
    scores = einsum("bkgld,bksd->bkgls", q, keys)
    return scores if factor is None else scores * factor[:, :, None, None]


def _weigh(weights: jax.Array, v: Store, dtype: jnp.dtype) -> jax.Array:
    """Sum of weighted values, [batch, kv_heads, group, length, head_dim] float32."""
    values, factor = v.widened(dtype)
    if factor is not None:
        weights = weights * factor[:, :, None, None]
    return einsum("bkgls,bksd->bkgld", weights.astype(dtype), values)


def key_block(capacity: int, largest: int) -> int:
    """The largest power of two, up to `largest`, that divides a cache's capacity."""
    return min(largest, capacity & -capacity)
