"""Attention over a compressed cache: some heads attend to everything, the rest to a window."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import cached
from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.compensation import compensation
from lsjax.attention.partial import merge, merge_over_axis
from lsjax.attention.streaming import chunk_step, oldest
from lsjax.cache import CompressedCache, LayerCache, Store, WindowCache, Zigzag, write_tokens
from lsjax.sharding import (
    CHUNK,
    CHUNK_QUERIES,
    HEADS,
    QUERIES,
    TOKENS,
    compressed_cache_spec,
)


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lengths: jax.Array | None,
    cache: CompressedCache,
    decode: bool,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, CompressedCache]:
    """Attention of new tokens to themselves and to what is kept of those before.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions, lengths: as of cached.write_and_attend.
      cache: this layer's.
      decode: this is the one token of a decode step, not a prefill chunk.
      slopes: [heads] of ALiBi, or None.

    Returns:
      [batch, length, heads, head_dim] in q's dtype, and the cache with the tokens written and what
      had to go for them in the compensation token, where there is one.
    """
    context = mesh.shape["context"]
    dealt = context > 1 and not decode
    queries, tokens = (CHUNK_QUERIES, CHUNK) if dealt else (QUERIES, TOKENS)
    spec = compressed_cache_spec(cache)
    step = jax.shard_map(
        functools.partial(
            _step,
            zigzag=Zigzag(context, cache.stripe),
            decode=decode,
            platform=mesh.devices.flat[0].platform,
        ),
        mesh=mesh,
        in_specs=(queries, queries, queries, tokens, TOKENS, spec, HEADS),
        out_specs=(queries, spec),
        check_vma=False,
    )
    return step(q, k, v, positions, lengths, cache, slopes)


def _step(q, k, v, positions, lengths, cache, slopes, *, zigzag, decode, platform):
    def attention(q, k, v, entry: LayerCache | WindowCache, slopes):
        if isinstance(entry, LayerCache):
            return cached.step(
                q,
                k,
                v,
                positions,
                lengths,
                entry,
                slopes,
                window=None,
                zigzag=zigzag,
                decode=decode,
                platform=platform,
            )
        if decode:
            return _window_step(q, k, v, positions, entry, slopes, zigzag.devices, platform)
        return chunk_step(q, k, v, positions, lengths, entry, slopes, zigzag, platform)

    outs, entries, first, group = [], [], 0, q.shape[2] // k.shape[2]
    for entry in cache.entries:
        last = first + entry.k.data.shape[1]
        queries = slice(first * group, last * group)
        own_slopes = None if slopes is None else slopes[queries]
        new = q[:, :, queries], k[:, :, first:last], v[:, :, first:last]
        out, entry = attention(*new, entry, own_slopes)
        outs.append(out)
        entries.append(entry)
        first = last
    return jnp.concatenate(outs, axis=2), cache.with_entries(entries)


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
        cache = cache.replace(dropped=dropped, oldest=oldest(cache, position + 1))
    return cached.by_token(partial.values).astype(dtype), cache
