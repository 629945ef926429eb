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
    Store,
    WindowCache,
    Zigzag,
    floats_at,
    write_tokens,
)
from lsjax.precision import einsum
from lsjax.sharding import QUERIES, TOKENS, compressed_cache_spec


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    cache: CompressedCache,
) -> tuple[jax.Array, CompressedCache]:
    """Attention of one new token of each row to itself and to what is kept of those before.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, 1, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, 1, kv_heads, head_dim], keys rotated.
      positions: [batch, 1].
      cache: this layer's.

    Returns:
      [batch, 1, heads, head_dim] in q's dtype, and the cache with the token written and what had
      to go for it in the compensation token.
    """
    spec = compressed_cache_spec(cache)
    step = jax.shard_map(
        functools.partial(
            _step, context=mesh.shape["context"], platform=mesh.devices.flat[0].platform
        ),
        mesh=mesh,
        in_specs=(QUERIES, QUERIES, QUERIES, TOKENS, spec),
        out_specs=(QUERIES, spec),
        check_vma=False,
    )
    return step(q, k, v, positions, cache)


def _step(q, k, v, positions, cache, *, context, platform):
    whole, window = cache.whole, cache.window
    kept = 0 if whole is None else whole.k.data.shape[1]
    split = kept * (q.shape[2] // k.shape[2])
    outs = []
    if whole is not None:
        out, whole = cached.step(
            q[:, :, :split],
            k[:, :, :kept],
            v[:, :, :kept],
            positions,
            None,
            whole,
            None,
            window=None,
            zigzag=Zigzag(context, whole.stripe),
            decode=True,
            platform=platform,
        )
        outs.append(out)
    if window is not None:
        new = q[:, :, split:], k[:, :, kept:], v[:, :, kept:]
        out, window = _window_step(*new, positions, window, context, platform)
        outs.append(out)
    return jnp.concatenate(outs, axis=2), CompressedCache(whole, window)


def _window_step(q, k, v, positions, cache: WindowCache, context: int, platform: str):
    dtype = v.dtype
    q, k, v = cached.by_head(q, k, v, cache.k)
    spec, position = cache.spec, positions[:, 0]
    here = cache.k.capacity
    before = jax.lax.axis_index("context") * here
    slot = spec.slot(position)
    dropped = cache.dropped.with_one_more(*cache.oldest, position >= spec.slots)

    def put(store: Store, new: jax.Array) -> Store:
        encoded = store.encode(new)
        return write_tokens(store, encoded, slot, slot - before, lambda s: s + before, platform)

    k, v = put(cache.k, k), put(cache.v, v)
    oldest = [floats_at(store, spec.slot(position + 1) - before) for store in (k, v)]
    if context > 1:  # the others have zeros
        oldest = jax.lax.psum(oldest, "context")
    end = jnp.clip(jnp.minimum(positions + 1, spec.slots) - before, 0, here)
    partial = attend(platform, q, k, v, Seen(None, end, positions), None)
    if context > 1:
        partial = merge_over_axis(partial, "context")
    partial = merge(partial, compensation(q, dropped))
    out = cached.by_token(partial.values).astype(dtype)
    return out, cache.replace(k=k, v=v, oldest=tuple(oldest), dropped=dropped)


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
