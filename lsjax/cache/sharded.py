"""One step of attention with a KV cache, on a mesh: the only place where caches meet shard_map."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.attention import dispatch
from lsjax.attention.blockwise import QueryBlocks
from lsjax.attention.head_layout import by_head, by_token
from lsjax.attention.partial import merge
from lsjax.cache.protocol import LayerCache, Step
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import (
    CHUNK_QUERIES_SPEC,
    CHUNK_SPEC,
    HEADS_SPEC,
    QUERIES_SPEC,
    TOKENS_SPEC,
)
from lsjax.positions.rotary import RotaryTables

# Queries per block where there is a sliding window: enough for a kernel, while each block reads the
# slots that its window shows anew.
_WINDOW_QUERIES = 1024


def update_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lengths: jax.Array | None,
    cache: LayerCache,
    decode: bool,
    window: int | None = None,
    slopes: jax.Array | None = None,
    tables: RotaryTables | None = None,
    rope_interleaved: bool = False,
) -> tuple[jax.Array, LayerCache]:
    """Writes new tokens to the cache, and attends to them and to what is kept of earlier ones.

    Args:
      mesh: mesh with the axes data, context and model.
      q: [batch, length, heads, views * head_dim], rotated, not yet scaled. There is one view, or
        one for each range of keys that dual chunk attention rotates queries for.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions: [batch, length]. A prefill chunk has the same in every row, consecutive and in
        order; with several devices on the context axis they are whole zigzag blocks, in the order
        of Zigzag.permutation. In decode each row has its own consecutive positions.
      lengths: [batch] total number of tokens in each row; later ones are padding. Or None.
      cache: this layer's cache.
      decode: whether these are the few tokens of a decode step, not a prefill chunk. Outputs for
        tokens outside the first token's block are undefined; see LayerCache.block.
      window: sliding window in tokens, or None.
      slopes: [heads] ALiBi slopes, or None.
      tables: rotary tables that rotated q and k, if there are.
      rope_interleaved: whether rotation pairs adjacent channels; see ModelConfig.

    Returns:
      [batch, length, heads, head_dim] in v's dtype, and the cache with the tokens written.
    """
    in_zigzag_order = mesh.shape["context"] > 1 and not decode
    queries, tokens = (
        (CHUNK_QUERIES_SPEC, CHUNK_SPEC) if in_zigzag_order else (QUERIES_SPEC, TOKENS_SPEC)
    )
    of_rows = tables is not None and tables.low.shape[0] > 1
    specs = cache.partition_specs()
    step = functools.partial(
        _on_device,
        window=window,
        decode=decode,
        rope_interleaved=rope_interleaved,
        platform=mesh.devices.flat[0].platform,
    )
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(
            *(queries, queries, queries, tokens, TOKENS_SPEC, specs, HEADS_SPEC),
            TOKENS_SPEC if of_rows else PartitionSpec(),
        ),
        out_specs=(queries, specs),
        check_vma=False,
    )
    return sharded(q, k, v, positions, lengths, cache, slopes, tables)


def _on_device(q, k, v, positions, lengths, cache, slopes, tables, *, window, **static):
    dtype, length, views = v.dtype, k.shape[1], q.shape[3] // k.shape[3]
    q, k, v = by_head(jnp.concatenate(jnp.split(q, views, axis=3), axis=1), k, v)
    in_blocks = dispatch.takes_blocks(static["platform"]) and not static["decode"]
    if views > 1 and cache.zigzag.devices > 1:  # pieces of the ring's keys are of several views
        in_blocks = False
    begin = None if window is None else jnp.maximum(positions + 1 - window, 0)
    end = positions + 1
    if views > 1:
        ranges = zip(*tables.chunks.key_ranges(positions), strict=True)
        begin, end = (jnp.concatenate(x, axis=1) for x in ranges)
    step = Step(
        positions=positions,
        lengths=lengths,
        begin=begin,
        end=end,
        blocks=_blocks(length, cache.zigzag, window) if in_blocks else None,
        slopes=None if slopes is None else slopes.reshape(q.shape[1:3]),
        tables=tables,
        views=views,
        **static,
    )
    partial, cache = cache.update_and_attend(q, k, v, step)
    if views > 1:  # they see other keys
        of_views = (
            jax.tree.map(lambda x, at=at: x[:, :, :, at : at + length], partial)
            for at in range(0, views * length, length)
        )
        partial = functools.reduce(merge, of_views)
    return by_token(partial.values).astype(dtype), cache


def _blocks(length: int, zigzag: Zigzag, window: int | None) -> QueryBlocks | None:
    """Returns the blocks of a device's consecutive positions of a chunk; None if there are none.

    Without a window all of a lone device's queries are one block.
    """
    if window is None:
        return QueryBlocks(length if zigzag.devices == 1 else zigzag.piece_length, causal=True)
    size = math.gcd(length, _WINDOW_QUERIES)
    fits = zigzag.devices == 1 and window > size
    return QueryBlocks(size, causal=True, window=window) if fits else None
