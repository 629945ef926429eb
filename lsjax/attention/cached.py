"""One step of attention with a cache: write the new keys and values, attend to all.

The cache is split over the mesh's context axis; each device attends to what it holds, and the
float32 partials are merged. Queries and partials travel, keys and values never do.
"""

import functools

import jax
from jax.sharding import Mesh

from lsjax.attention.blockwise import attend
from lsjax.attention.partial import merge_over_axis
from lsjax.cache import LayerCache, write
from lsjax.sharding import HEADS, QUERIES, TOKENS, layer_cache_spec


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    cache: LayerCache,
    window: int | None,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens to themselves and to everything before them.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions: [batch, length]; see lsjax.cache.write for what they may be.
      cache: this layer's.
      window: sliding window in tokens, or None.
      slopes: [heads] of ALiBi, or None.

    Returns:
      [batch, length, heads, head_dim] in q's dtype, and the cache with the tokens written.
    """
    cache_spec = layer_cache_spec(cache.k.scale is not None)
    step = jax.shard_map(
        functools.partial(_step, window=window, context=mesh.shape["context"]),
        mesh=mesh,
        in_specs=(QUERIES, QUERIES, QUERIES, TOKENS, cache_spec, HEADS),
        out_specs=(QUERIES, cache_spec),
        check_vma=False,
    )
    return step(q, k, v, positions, cache, slopes)


def _step(q, k, v, positions, cache, slopes, *, window, context):
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    first = jax.lax.axis_index("context") * cache.k.capacity
    cache = LayerCache(
        k=write(cache.k, k.swapaxes(1, 2), positions, first),
        v=write(cache.v, v.swapaxes(1, 2), positions, first),
    )
    scaled = (q * head_dim**-0.5).astype(q.dtype)
    grouped = scaled.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    if slopes is not None:
        slopes = slopes.reshape(grouped.shape[2:4])
    partial = attend(grouped.transpose(0, 2, 3, 1, 4), cache, positions, first, window, slopes)
    if context > 1:
        partial = merge_over_axis(partial, "context")
    out = partial.values.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out.astype(q.dtype), cache
