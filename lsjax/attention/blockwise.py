"""Attention over a cache, block by block: no [queries, keys] matrix is ever whole.

Causality, the sliding window and the end of what has been written bound the loop over key
blocks; a mask does the rest, in the blocks at the edges only.
"""

import functools

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial, from_sums
from lsjax.cache import LayerCache, Store
from lsjax.precision import einsum

# Rows of queries and keys whose scores stay in a core's cache.
_QUERY_BLOCK = 512
_KEY_BLOCK = 512
_KEY_BLOCK_FOR_ONE_TOKEN = 4096


def attend(
    q: jax.Array,
    cache: LayerCache,
    positions: jax.Array,
    first: jax.Array,
    window: int | None,
    slopes: jax.Array | None = None,
) -> Partial:
    """Causal attention of some queries to the keys in (a shard of) a layer's cache.

    A query at position p sees the keys at positions <= p, and > p - window where there is one.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      cache: keys and values; slot s holds global position first + s.
      positions: [batch, length] global positions of the queries, increasing along the length.
      first: global position of the first slot.
      window: sliding window in tokens, or None.
      slopes: [kv_heads, group] of ALiBi, or None.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    length = q.shape[3]
    if length <= _QUERY_BLOCK:
        return _attend_block(q, cache, positions, first, window, slopes)
    blocks = -(-length // _QUERY_BLOCK)
    pad = blocks * _QUERY_BLOCK - length
    if pad:  # repeat the last query: it bounds the loop as it did
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, pad)), mode="edge")

    def one(i: jax.Array) -> Partial:
        def take(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * _QUERY_BLOCK, _QUERY_BLOCK, axis)

        return _attend_block(take(q, 3), cache, take(positions, 1), first, window, slopes)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 3).reshape(*q.shape[:4], *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(join, jax.lax.map(one, jnp.arange(blocks)))


def _attend_block(
    q: jax.Array,
    cache: LayerCache,
    positions: jax.Array,
    first: jax.Array,
    window: int | None,
    slopes: jax.Array | None,
) -> Partial:
    capacity = cache.k.capacity
    size = key_block(capacity, _KEY_BLOCK_FOR_ONE_TOKEN if q.shape[3] == 1 else _KEY_BLOCK)
    nearest, farthest = jnp.min(positions) - first, jnp.max(positions) - first

    def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        weighted, total, highest = state
        k, v = cache.k.block(i * size, size), cache.v.block(i * size, size)
        scores = _scores(q, k)
        slots = first + i * size + jnp.arange(size)
        if slopes is not None:
            distance = (positions[:, :, None] - slots).astype(jnp.float32)
            scores -= slopes[:, :, None, None] * distance[:, None, None]
        if masked:
            visible = slots <= positions[:, :, None]
            if window is not None:
                visible &= slots > positions[:, :, None] - window
            scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        finite = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - finite[..., None])
        keep = jnp.exp(highest - finite)
        total = keep * total + jnp.sum(weights, axis=-1)
        weighted = keep[..., None] * weighted + _weigh(weights, v, q.dtype)
        return weighted, total, new_highest

    at_edge, inside = functools.partial(step, masked=True), functools.partial(step, masked=False)
    zeros = jnp.zeros(q.shape, jnp.float32)
    state = (zeros, zeros[..., 0], jnp.full(q.shape[:-1], -jnp.inf, jnp.float32))
    # Blocks begin .. end hold keys that some query sees; whole .. edge those that all queries see.
    end = -(-jnp.clip(farthest + 1, 0, capacity) // size)
    begin = jnp.zeros_like(end)
    if window is not None:
        begin = jnp.clip(nearest + 1 - window, 0, capacity) // size
    if q.shape[3] == 1:
        return from_sums(*jax.lax.fori_loop(begin, end, at_edge, state))
    whole = begin
    if window is not None:
        whole = jnp.clip(-(-(farthest + 1 - window) // size), begin, end)
        state = jax.lax.fori_loop(begin, whole, at_edge, state)
    edge = jnp.clip((nearest + 1) // size, whole, end)
    state = jax.lax.fori_loop(whole, edge, inside, state)
    return from_sums(*jax.lax.fori_loop(edge, end, at_edge, state))


def _scores(q: jax.Array, k: Store) -> jax.Array:
    """[batch, kv_heads, group, length, block] float32; an int8 key's scale goes to its score."""
    scores = einsum("bkgld,bksd->bkgls", q, k.steps(q.dtype))
    return scores if k.scale is None else scores * _per_key(k.scale)


def _weigh(weights: jax.Array, v: Store, dtype: jnp.dtype) -> jax.Array:
    """Sum of weighted values; an int8 value's scale goes to its weight."""
    if v.scale is not None:
        weights = weights * _per_key(v.scale)
    return einsum("bkgls,bksd->bkgld", weights.astype(dtype), v.steps(dtype))


def _per_key(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float32)[:, :, None, None, :]


def key_block(capacity: int, largest: int) -> int:
    """The largest power of two, up to `largest`, that divides a cache's capacity."""
    return min(largest, capacity & -capacity)
