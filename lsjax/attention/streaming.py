"""A prefill chunk over a window that rolls with it: what the chunk drives out is dropped at once.

Its queries see the window as it was before the chunk, the compensation token, and of the chunk what
stands before them. No layer is ever whole; tokens past the first windowful see less than they would
of a cache that is compressed when all of the prompt has been run.
"""

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.cached import by_head, by_token
from lsjax.attention.compensation import compensation
from lsjax.attention.partial import merge, merge_over_axis
from lsjax.cache import Dropped, Store, WindowCache, Zigzag, floats_at


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
    """Attention of a chunk's tokens, to be called under shard_map.

    Args:
      q, k, v: [batch, length, heads, head_dim] of this device's part of the chunk.
      positions: [batch, length].
      lengths: [batch] tokens of each row in all.
      cache: holding the tokens before the chunk.
      slopes: [heads] of ALiBi, or None.
      zigzag: how the chunk is dealt out.
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
        # The window stays where it is, dealt out; queries go to all, and so do the chunk's keys,
        # which each device needs for the slots that it has.
        everyone, k, v = (_in_order(x, zigzag) for x in (q, k, v))
        start = start // zigzag.stripe * zigzag.stripe
        at = jnp.broadcast_to(start + jnp.arange(k.shape[2]), (k.shape[0], k.shape[2]))
    before = jnp.minimum(start, lengths)  # tokens of each row that the window has seen
    here = cache.k.capacity
    own_slots = jax.lax.axis_index("context") * here + jnp.arange(here)
    held = jnp.clip(jnp.minimum(before, cache.spec.slots) - own_slots[0], 0, here)
    seen = Seen(
        None,
        jnp.broadcast_to(held[:, None], at.shape),
        at,
        cache.spec.positions(own_slots, before),
    )
    partial = attend(platform, everyone, cache.k, cache.v, seen, slopes)
    if zigzag.devices > 1:
        partial = merge_over_axis(partial, "context")
        order = zigzag.order(k.shape[2]).reshape(zigzag.devices, -1)
        own = jnp.asarray(order)[jax.lax.axis_index("context")]
        partial = jax.tree.map(lambda x: jnp.take(x, own, axis=3), partial)
    among = Seen(None, positions + 1 - start, positions, start + jnp.arange(k.shape[2]))
    partial = merge(partial, attend(platform, q, Store(k, None), Store(v, None), among, slopes))
    if cache.dropped is not None:
        partial = merge(partial, compensation(q, cache.dropped))
    after = jnp.minimum(start + k.shape[2], lengths)
    return by_token(partial.values).astype(dtype), _rolled(cache, k, v, start, before, after)


def _in_order(x: jax.Array, zigzag: Zigzag) -> jax.Array:
    """[..., length, head_dim] parts of all devices, one position after the other."""
    axis = x.ndim - 2
    x = jax.lax.all_gather(x, "context", axis=axis, tiled=True)
    return jnp.take(x, jnp.argsort(jnp.asarray(zigzag.order(x.shape[axis]))), axis=axis)


def _rolled(
    cache: WindowCache,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    before: jax.Array,
    after: jax.Array,
) -> WindowCache:
    """The window when the chunk has come.

    Args:
      cache: before it.
      k, v: [batch, kv_heads, length, head_dim] of the whole chunk.
      start: its first position.
      before, after: [batch] tokens that the window has seen then.
    """
    spec, here = cache.spec, cache.k.capacity
    slots = jax.lax.axis_index("context") * here + jnp.arange(here)
    at = spec.positions(slots, after)
    comes = (at >= start) & (at < after[:, None])

    def put(store: Store, new: jax.Array) -> Store:
        def one(held: jax.Array, new: jax.Array) -> jax.Array:
            def by_slot(x: jax.Array) -> jax.Array:
                return x.reshape(x.shape[0], 1, here, *[1] * (held.ndim - 3))

            index = jnp.clip(at - start, 0, new.shape[2] - 1)
            return jnp.where(by_slot(comes), jnp.take_along_axis(new, by_slot(index), 2), held)

        return jax.tree.map(one, store, store.encode(new))

    rolled = cache.replace(k=put(cache.k, k), v=put(cache.v, v))
    if cache.dropped is None:
        return rolled
    was, first = spec.positions(slots, before), (after - spec.last)[:, None]
    leave = (was >= spec.sinks) & (was < before[:, None]) & (was < first) & (slots < spec.slots)
    position = start + jnp.arange(k.shape[2])
    pass_by = (position >= spec.sinks) & (position < first)
    count = jnp.maximum(after - spec.last - spec.sinks, 0)
    more = count - cache.dropped.count

    def mean(old: jax.Array, store: Store, new: jax.Array) -> jax.Array:
        gone = jnp.sum(jnp.where(leave[:, None, :, None], store.floats(), 0), axis=2)
        gone = jax.lax.psum(gone, "context")
        new = jnp.where(pass_by[:, None, :, None], new.astype(jnp.float32), 0)
        total = gone + jnp.sum(new, axis=2)
        return old + (total - more[:, None, None] * old) / jnp.maximum(count, 1)[:, None, None]

    dropped = Dropped(mean(cache.dropped.k, cache.k, k), mean(cache.dropped.v, cache.v, v), count)
    return rolled.replace(dropped=dropped, oldest=oldest(rolled, after))


def oldest(cache: WindowCache, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Key and value in the slot that the token at `position` [batch] will take, see WindowCache."""
    slot = cache.spec.slot(position) - jax.lax.axis_index("context") * cache.k.capacity
    # All but one of the devices have zeros.
    return jax.lax.psum(tuple(floats_at(store, slot) for store in (cache.k, cache.v)), "context")
