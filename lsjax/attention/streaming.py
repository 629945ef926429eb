"""Streaming prefill over a rolling window: what a chunk evicts is dropped at once.

The queries of a chunk see the window as it was before the chunk, the compensation token, and the
chunk's tokens up to themselves. The full keys and values of these heads are never stored. Tokens
past the first windowful see less than with a cache that is compressed after the whole prompt.
"""

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import KeyRange
from lsjax.attention.cached import by_head, by_token
from lsjax.attention.dispatch import attend
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache import CompensationToken, KVArray, WindowCache, Zigzag, floats_at
from lsjax.runtime.precision import einsum


def chunk_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    cache: WindowCache,
    slopes: jax.Array | None,
    zigzag: Zigzag,
    platform: str,
) -> tuple[jax.Array, WindowCache]:
    """Attends with a chunk's tokens and rolls the window; called under shard_map.

    Args:
      q, k, v: [batch, length, heads, head_dim], this device's shard of the chunk.
      positions: [batch, length] positions of these tokens.
      lengths: [batch] total number of tokens in each row.
      cache: window before the chunk.
      slopes: [heads] ALiBi slopes, or None.
      zigzag: layout of the chunk along the context axis.
      platform: cpu, gpu (or cuda) or tpu.

    Returns:
      [batch, length, heads, head_dim], and the window after the chunk.
    """
    dtype = v.dtype
    q, k, v = by_head(q, k, v, cache.k)
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])
    start, everyone, at = positions[0, 0], q, positions
    if zigzag.devices > 1:
        # The window's shards stay where they are. All devices get all queries, and also the chunk's
        # keys and values, which each device needs for its own slots.
        everyone, k, v = (_in_order(x, zigzag) for x in (q, k, v))
        start = start // zigzag.block_length * zigzag.block_length
        at = jnp.broadcast_to(start + jnp.arange(k.shape[2]), (k.shape[0], k.shape[2]))
    before = jnp.minimum(start, lengths)  # tokens per row that the window has seen
    local_capacity = cache.k.capacity
    own_slots = jax.lax.axis_index("context") * local_capacity + jnp.arange(local_capacity)
    held = jnp.clip(jnp.minimum(before, cache.spec.slots) - own_slots[0], 0, local_capacity)
    key_range = KeyRange(
        None,
        jnp.broadcast_to(held[:, None], at.shape),
        at,
        cache.spec.positions(own_slots, before),
    )
    partial = attend(platform, everyone, cache.k, cache.v, key_range, slopes)
    if zigzag.devices > 1:
        partial = merge_over_axis(partial, "context")
        order = zigzag.permutation(k.shape[2]).reshape(zigzag.devices, -1)
        local_order = jnp.asarray(order)[jax.lax.axis_index("context")]
        partial = jax.tree.map(lambda x: jnp.take(x, local_order, axis=3), partial)
    among = KeyRange(None, positions + 1 - start, positions, start + jnp.arange(k.shape[2]))
    partial = merge(partial, attend(platform, q, KVArray(k, None), KVArray(v, None), among, slopes))
    if cache.compensation_token is not None:
        partial = merge(partial, attend_to_compensation_token(q, cache.compensation_token))
    after = jnp.minimum(start + k.shape[2], lengths)
    return by_token(partial.values).astype(dtype), _rolled(cache, k, v, start, before, after)


def _in_order(x: jax.Array, zigzag: Zigzag) -> jax.Array:
    """All-gathers shards [..., length, head_dim] in zigzag order into the order of positions."""
    axis = x.ndim - 2
    x = jax.lax.all_gather(x, "context", axis=axis, tiled=True)
    return jnp.take(x, jnp.argsort(jnp.asarray(zigzag.permutation(x.shape[axis]))), axis=axis)


def _rolled(
    cache: WindowCache,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    before: jax.Array,
    after: jax.Array,
) -> WindowCache:
    """Returns the window after a chunk.

    Args:
      cache: window before the chunk.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the whole chunk.
      start: first position of the chunk.
      before, after: [batch] number of tokens that the window has seen before and after the chunk.
    """
    spec, local_capacity = cache.spec, cache.k.capacity
    slots = jax.lax.axis_index("context") * local_capacity + jnp.arange(local_capacity)
    at = spec.positions(slots, after)
    comes = (at >= start) & (at < after[:, None])

    def put(store: KVArray, new: jax.Array) -> KVArray:
        def update_array(held: jax.Array, new: jax.Array) -> jax.Array:
            def by_slot(x: jax.Array) -> jax.Array:
                return x.reshape(x.shape[0], 1, local_capacity, *[1] * (held.ndim - 3))

            index = jnp.clip(at - start, 0, new.shape[2] - 1)
            return jnp.where(by_slot(comes), jnp.take_along_axis(new, by_slot(index), 2), held)

        return jax.tree.map(update_array, store, store.quantize(new))

    rolled = cache.replace(k=put(cache.k, k), v=put(cache.v, v))
    if cache.compensation_token is None:
        return rolled
    was, first = spec.positions(slots, before), (after - spec.last)[:, None]
    leave = (was >= spec.sinks) & (was < before[:, None]) & (was < first) & (slots < spec.slots)
    position = start + jnp.arange(k.shape[2])
    pass_by = (position >= spec.sinks) & (position < first)
    count = jnp.maximum(after - spec.last - spec.sinks, 0)
    more = count - cache.compensation_token.count

    def mean(old: jax.Array, store: KVArray, new: jax.Array) -> jax.Array:
        gone = jnp.sum(jnp.where(leave[:, None, :, None], store.dequantize(), 0), axis=2)
        gone = jax.lax.psum(gone, "context")
        new = jnp.where(pass_by[:, None, :, None], new.astype(jnp.float32), 0)
        total = gone + jnp.sum(new, axis=2)
        return old + (total - more[:, None, None] * old) / jnp.maximum(count, 1)[:, None, None]

    token = CompensationToken(
        mean(cache.compensation_token.k, cache.k, k),
        mean(cache.compensation_token.v, cache.v, v),
        count,
    )
    return rolled.replace(compensation_token=token, next_evicted=next_evicted(rolled, after))


def next_evicted(cache: WindowCache, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the key and value in the slot that the token at `position` [batch] will overwrite.

    Each is [batch, kv_heads, head_dim] float32; see WindowCache.
    """
    slot = cache.spec.slot(position) - jax.lax.axis_index("context") * cache.k.capacity
    # Only one device has the slot; the others give zeros.
    return jax.lax.psum(tuple(floats_at(store, slot) for store in (cache.k, cache.v)), "context")


def attend_to_compensation_token(q: jax.Array, token: CompensationToken) -> Partial:
    """Computes attention of queries to the compensation token.

    The log of the number of dropped tokens is added to the scaled score: with equal keys, the
    compensation token gets their combined weight. Source: RazorAttention (arXiv 2407.15891).

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      token: compensation token of these heads.
    """
    scores = einsum("bkgld,bkd->bkgl", q.astype(jnp.float32), token.k)
    lse = scores + jnp.log(token.count.astype(jnp.float32))[:, None, None, None]
    values = jnp.where(token.count > 0, 1.0, 0.0)[:, None, None] * token.v
    return Partial(jnp.broadcast_to(values[:, :, None, None], q.shape), lse)
