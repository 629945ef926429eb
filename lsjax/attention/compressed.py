"""A decode step over a compressed cache: some heads attend to everything, the rest to a window."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import cached
from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache import (
    CompressedCache,
    Dropped,
    LayerCache,
    Store,
    WindowCache,
    Zigzag,
    floats_at,
    write_tokens,
)
from lsjax.precision import einsum
from lsjax.sharding import HEADS, QUERIES, TOKENS, compressed_cache_spec


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    cache: CompressedCache,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, CompressedCache]:
    """Attention of one new token of each row to itself and to what is kept of those before.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, 1, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, 1, kv_heads, head_dim], keys rotated.
      positions: [batch, 1].
      cache: this layer's.
      slopes: [heads] of ALiBi, or None.

    Returns:
      [batch, 1, heads, head_dim] in q's dtype, and the cache with the token written and what had
      to go for it in the compensation token, where there is one.
    """
    spec = compressed_cache_spec(cache)
    step = jax.shard_map(
        functools.partial(
            _step, context=mesh.shape["context"], platform=mesh.devices.flat[0].platform
        ),
        mesh=mesh,
        in_specs=(QUERIES, QUERIES, QUERIES, TOKENS, spec, HEADS),
        out_specs=(QUERIES, spec),
        check_vma=False,
    )
    return step(q, k, v, positions, cache, slopes)


def _step(q, k, v, positions, cache, slopes, *, context, platform):
    outs, entries, first, group = [], [], 0, q.shape[2] // k.shape[2]
    for entry in (cache.whole, *cache.windows):
        if entry is None:
            entries.append(None)
            continue
        last = first + entry.k.data.shape[1]
        queries = slice(first * group, last * group)
        new = q[:, :, queries], k[:, :, first:last], v[:, :, first:last]
        own_slopes = None if slopes is None else slopes[queries]
        attention = _window_step if isinstance(entry, WindowCache) else _whole_step
        out, entry = attention(*new, positions, entry, own_slopes, context, platform)
        outs.append(out)
        entries.append(entry)
        first = last
    return jnp.concatenate(outs, axis=2), CompressedCache(entries[0], tuple(entries[1:]))


def _whole_step(q, k, v, positions, cache: LayerCache, slopes, context: int, platform: str):
    return cached.step(
        q,
        k,
        v,
        positions,
        None,
        cache,
        slopes,
        window=None,
        zigzag=Zigzag(context, cache.stripe),
        decode=True,
        platform=platform,
    )


def _window_step(q, k, v, positions, cache: WindowCache, slopes, context: int, platform: str):
    dtype = v.dtype
    q, k, v = cached.by_head(q, k, v, cache.k)
    spec, position = cache.spec, positions[:, 0]
    here = cache.k.capacity
    before = jax.lax.axis_index("context") * here
    slot = spec.slot(position)

    def put(store: Store, new: jax.Array) -> Store:
        encoded = store.encode(new)
        return write_tokens(store, encoded, slot, slot - before, lambda s: s + before, platform)

    k, v = put(cache.k, k), put(cache.v, v)
    end = jnp.clip(jnp.minimum(positions + 1, spec.slots) - before, 0, here)
    slots = None
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])
        slots = spec.positions(before + jnp.arange(here), position + 1)
    partial = attend(platform, q, k, v, Seen(None, end, positions, slots), slopes)
    if context > 1:
        partial = merge_over_axis(partial, "context")
    cache = cache.replace(k=k, v=v)
    if cache.dropped is not None:
        dropped = cache.dropped.with_one_more(*cache.oldest, position >= spec.slots)
        partial = merge(partial, compensation(q, dropped))
        cache = cache.replace(dropped=dropped, oldest=_oldest(cache, position + 1, context))
    return cached.by_token(partial.values).astype(dtype), cache


def _oldest(cache: WindowCache, position: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
    """Key and value in the slot that the token at `position` will take."""
    before = jax.lax.axis_index("context") * cache.k.capacity
    slot = cache.spec.slot(position) - before
    oldest = tuple(floats_at(store, slot) for store in (cache.k, cache.v))
    # The others have zeros.
    return jax.lax.psum(oldest, "context") if context > 1 else oldest


def compensation(q: jax.Array, dropped: Dropped) -> Partial:
    """Attention to the token that stands for those dropped.

    Its score is raised by the log of how many they are, after scaling: with equal keys it has the
    weight that all of them had. Source: RazorAttention (arXiv 2407.15891).

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      dropped: of these heads.
    """
    scores = einsum("bkgld,bkd->bkgl", q.astype(jnp.float32), dropped.k)
    lse = scores + jnp.log(dropped.count.astype(jnp.float32))[:, None, None, None]
    values = jnp.where(dropped.count > 0, 1.0, 0.0)[:, None, None] * dropped.v
    return Partial(jnp.broadcast_to(values[:, :, None, None], q.shape), lse)
