"""One step of attention with a cache: write the new keys and values, attend to all.

The cache is split over the mesh's context axis; each device attends to what it holds, and the
float32 partials are merged. Queries and partials travel, keys and values never do.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import recent
from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache import LayerCache, Store, write
from lsjax.cache.hadamard import spread
from lsjax.sharding import HEADS, QUERIES, TOKENS, layer_cache_spec


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lengths: jax.Array | None,
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
      lengths: [batch] tokens of each row in all, where later ones only fill a chunk up; or None.
      cache: this layer's.
      window: sliding window in tokens, or None.
      slopes: [heads] of ALiBi, or None.

    Returns:
      [batch, length, heads, head_dim] in q's dtype, and the cache with the tokens written.
    """
    cache_spec = layer_cache_spec(cache)
    step = jax.shard_map(
        functools.partial(
            _step,
            window=window,
            context=mesh.shape["context"],
            platform=mesh.devices.flat[0].platform,
        ),
        mesh=mesh,
        in_specs=(QUERIES, QUERIES, QUERIES, TOKENS, TOKENS, cache_spec, HEADS),
        out_specs=(QUERIES, cache_spec),
        check_vma=False,
    )
    return step(q, k, v, positions, lengths, cache, slopes)


def _step(q, k, v, positions, lengths, cache, slopes, *, window, context, platform):
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q * head_dim**-0.5
    if cache.recent is not None:
        q, k = spread(q), spread(k)
    q = q.astype(v.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])

    def attend_to(keys: Store, values: Store, begin, end, first) -> Partial:
        begin = None if begin is None else begin - first
        seen = Seen(begin, end - first, positions - first)
        return attend(platform, q, keys, values, seen, slopes)

    first = jax.lax.axis_index("context") * cache.k.capacity
    new_k, new_v = _encode(cache, k, v)
    new = LayerCache(
        k=write(cache.k, new_k, positions, first, platform),
        v=write(cache.v, new_v, positions, first, platform),
        recent=None,
    )
    begin = None if window is None else positions + 1 - window
    end = positions + 1
    if cache.recent is not None:
        run, run_first = recent.extend(cache.recent, k, v, positions)
        after = end[:, -1] if lengths is None else jnp.minimum(end[:, -1], lengths)
        new = new.replace(recent=recent.cut(run, run_first, cache.recent, after))
        own = positions // cache.recent.block * cache.recent.block
        near = attend_to(
            Store(run.k, None),
            Store(run.v, None),
            own if begin is None else jnp.maximum(begin, own),
            end,
            run_first[:, None],
        )
        end = own
    partial = attend_to(new.k, new.v, begin, end, first)
    if context > 1:
        partial = merge_over_axis(partial, "context")
    if cache.recent is not None:
        partial = merge(partial, near)
    out = partial.values.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
    return out.astype(v.dtype), new


def _encode(cache: LayerCache, k: jax.Array, v: jax.Array) -> tuple[Store, Store]:
    """[batch, kv_heads, length, head_dim] keys and values in the format of the cache."""
    if cache.recent is None:
        return cache.k.encode(k), cache.v.encode(v)
    # Both are quantised in one go: in decode it is the number of operations that costs.
    both = cache.k.encode(jnp.stack([k, v.astype(k.dtype)]))
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)
