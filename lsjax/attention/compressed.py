"""Attention over a compressed KV cache: some heads attend to all tokens, the rest to a window."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import cached
from lsjax.attention.blockwise import KeyRange
from lsjax.attention.dispatch import attend
from lsjax.attention.partial import merge, merge_over_axis
from lsjax.attention.streaming import attend_to_compensation_token, chunk_step, next_evicted
from lsjax.cache import CompressedCache, KVArray, LayerCache, WindowCache, write_tokens
from lsjax.cache.partition_specs import compressed_cache_spec
from lsjax.distributed.sharding import (
    CHUNK_QUERIES_SPEC,
    CHUNK_SPEC,
    HEADS_SPEC,
    QUERIES_SPEC,
    TOKENS_SPEC,
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
    """Writes new tokens to the cache, and attends to them and to what is kept of earlier ones.

    Args:
      mesh: mesh with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions, lengths: see cached.write_and_attend; a prefill chunk needs lengths.
      cache: this layer's cache.
      decode: whether this is the single token of a decode step, not a prefill chunk.
      slopes: [heads] ALiBi slopes, or None.

    Returns:
      [batch, length, heads, head_dim] in v's dtype, and the cache with the tokens written. Evicted
      tokens are added to the compensation token, if there is one.
    """
    context = mesh.shape["context"]
    in_zigzag_order = context > 1 and not decode
    queries, tokens = (
        (CHUNK_QUERIES_SPEC, CHUNK_SPEC) if in_zigzag_order else (QUERIES_SPEC, TOKENS_SPEC)
    )
    spec = compressed_cache_spec(cache)
    step = jax.shard_map(
        functools.partial(
            _step,
            zigzag=cache.zigzag,
            decode=decode,
            platform=mesh.devices.flat[0].platform,
        ),
        mesh=mesh,
        in_specs=(queries, queries, queries, tokens, TOKENS_SPEC, spec, HEADS_SPEC),
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
    local_capacity = cache.k.capacity
    before = jax.lax.axis_index("context") * local_capacity
    slot = spec.slot(position)

    def put(store: KVArray, new: jax.Array) -> KVArray:
        encoded = store.quantize(new)
        return write_tokens(store, encoded, slot, slot - before, lambda s: s + before, platform)

    k, v = put(cache.k, k), put(cache.v, v)
    end = jnp.clip(jnp.minimum(positions + 1, spec.slots) - before, 0, local_capacity)
    slots = None
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])
        slots = spec.positions(before + jnp.arange(local_capacity), position + 1)
    partial = attend(platform, q, k, v, KeyRange(None, end, positions, slots), slopes)
    if context > 1:
        partial = merge_over_axis(partial, "context")
    cache = cache.replace(k=k, v=v)
    if cache.compensation_token is not None:
        token = cache.compensation_token.add(*cache.next_evicted, position >= spec.slots)
        partial = merge(partial, attend_to_compensation_token(q, token))
        cache = cache.replace(
            compensation_token=token, next_evicted=next_evicted(cache, position + 1)
        )
    return cached.by_token(partial.values).astype(dtype), cache
