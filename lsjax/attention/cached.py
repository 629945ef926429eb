"""One step of attention with a cache: write the new keys and values, attend to all.

The cache is dealt out over the mesh's context axis, and stays where it is written. In decode the
queries go to all devices, each attends to what it holds, and the float32 partials are merged. A
prefill chunk's tokens are dealt out as the cache is, and keys and values come round the ring.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import recent, ring
from lsjax.attention.blockwise import Seen
from lsjax.attention.by_platform import attend
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache import LayerCache, Store, Zigzag, write, write_tokens
from lsjax.cache.hadamard import spread
from lsjax.sharding import CHUNK, CHUNK_QUERIES, HEADS, QUERIES, TOKENS, layer_cache_spec


def write_and_attend(
    mesh: Mesh,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    lengths: jax.Array | None,
    cache: LayerCache,
    decode: bool,
    window: int | None,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens to themselves and to everything before them.

    Args:
      mesh: with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions: [batch, length]. Of a prefill chunk the same in every row, consecutive and in
        order, but for a context axis: there they are whole stripes in the order that Zigzag.order
        gives. In decode each row's own, consecutive.
      lengths: [batch] tokens of each row in all, where later ones only fill a chunk up; or None.
      cache: this layer's.
      decode: these are the few tokens of a decode step, not a prefill chunk. Over a quantised
        cache those of them that are not of the first one's block of positions get an answer of no
        meaning, see Recent.
      window: sliding window in tokens, or None.
      slopes: [heads] of ALiBi, or None.

    Returns:
      [batch, length, heads, head_dim] in q's dtype, and the cache with the tokens written.
    """
    context = mesh.shape["context"]
    dealt = context > 1 and not decode
    queries, tokens = (CHUNK_QUERIES, CHUNK) if dealt else (QUERIES, TOKENS)
    cache_spec = layer_cache_spec(cache)
    sharded = jax.shard_map(
        functools.partial(
            step,
            window=window,
            zigzag=Zigzag(context, cache.stripe),
            decode=decode,
            platform=mesh.devices.flat[0].platform,
        ),
        mesh=mesh,
        in_specs=(queries, queries, queries, tokens, TOKENS, cache_spec, HEADS),
        out_specs=(queries, cache_spec),
        check_vma=False,
    )
    return sharded(q, k, v, positions, lengths, cache, slopes)


def step(q, k, v, positions, lengths, cache, slopes, *, window, zigzag, decode, platform):
    """`write_and_attend` on one device of the mesh, with its parts of the arrays."""
    q, k, v = by_head(q, k, v, cache.k)
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])

    def attend_to(keys: Store, values: Store, begin, end, at, slots=None) -> Partial:
        slots = None if slopes is None else slots
        return attend(platform, q, keys, values, Seen(begin, end, at, slots), slopes)

    device, first = jax.lax.axis_index("context"), positions[:, 0]

    def put(store: Store, new: Store) -> Store:
        slot = zigzag.slots_before(device, first)
        if not decode:  # of a dealt chunk the device has its own part here
            return write(store, new, slot[0], platform)
        position_of = functools.partial(zigzag.position, device)
        return write_tokens(store, new, first, slot, position_of, platform)

    stores = [put(*pair) for pair in zip((cache.k, cache.v), _encode(cache, k, v), strict=True)]
    begin = None if window is None else positions + 1 - window
    if zigzag.devices > 1 and not decode:
        attention = _ring_attention
    else:
        attention = functools.partial(_local_attention, decode=decode, platform=platform)
    partial, block = attention(
        attend_to, q, k, v, positions, lengths, cache.recent, stores, begin, zigzag
    )
    out = by_token(partial.values).astype(v.dtype)
    return out, cache.replace(k=stores[0], v=stores[1], recent=block)


def by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, store: Store
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """New queries, keys and values as attention to a store takes them.

    Args:
      q: [batch, length, heads, head_dim], not yet scaled.
      k, v: [batch, length, kv_heads, head_dim].
      store: where they are going; over a quantised one queries and keys are spread.

    Returns:
      q [batch, kv_heads, group, length, head_dim], scaled; k and v [batch, kv_heads, length,
      head_dim].
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q * head_dim**-0.5
    if store.scale is not None:
        q, k = spread(q), spread(k)
    q = q.astype(v.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def by_token(values: jax.Array) -> jax.Array:
    """[batch, kv_heads, group, length, head_dim] -> [batch, length, heads, head_dim]."""
    batch, kv_heads, group, length, head_dim = values.shape
    return values.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _local_attention(
    attend_to, q, k, v, positions, lengths, before, stores, begin, zigzag, *, decode, platform
):
    """Every device attends to what it holds; the partials are merged."""
    end = positions + 1
    run = None
    if before is not None:
        run_first = positions[:, 0] // before.block * before.block
        if decode:
            run = block = recent.put(before, k, v, positions[:, 0] - run_first, platform)
        else:
            run = recent.extend(before, k, v, positions[0, 0] - run_first[0])
            after = end[:, -1] if lengths is None else jnp.minimum(end[:, -1], lengths)
            block = recent.cut(run, run_first, before, after)
        run_first = run_first[:, None]
        own = positions // before.block * before.block
        near = attend_to(
            Store(run.k, None),
            Store(run.v, None),
            (own if begin is None else jnp.maximum(begin, own)) - run_first,
            end - run_first,
            positions - run_first,
        )
        end = own
    device = jax.lax.axis_index("context")
    slots = jnp.arange(stores[0].capacity)
    partial = attend_to(
        *stores,
        None if begin is None else zigzag.slots_before(device, begin),
        zigzag.slots_before(device, end),
        positions,
        None if zigzag.devices == 1 else zigzag.position(device, slots),
    )
    if zigzag.devices > 1:
        partial = merge_over_axis(partial, "context")
    return (partial, None) if run is None else (merge(partial, near), block)


def _ring_attention(attend_to, q, k, v, positions, lengths, before, stores, begin, zigzag):
    """A chunk's queries stay where they are; keys and values come round."""
    length = positions.shape[1]
    end = positions + 1
    start = positions[0, 0] // zigzag.stripe * zigzag.stripe  # of the chunk
    slot = zigzag.slots_before(jax.lax.axis_index("context"), positions[0, 0])

    def meet(keys: Store, values: Store, begin, end, slots) -> Partial:
        return attend_to(keys, values, begin, end, positions, slots)

    own = end if before is None else positions // before.block * before.block
    partial = ring.attend(meet, q, *stores, zigzag, jnp.int32(0), slot + length, begin, own)
    if before is None:
        return partial, None
    near_begin = own if begin is None else jnp.maximum(begin, own)
    chunk = Store(k, None), Store(v, None)
    near = ring.attend(meet, q, *chunk, zigzag, slot, length, near_begin, end)
    if zigzag.stripe % before.block:  # the chunk may begin in the midst of a block
        first = start // before.block * before.block
        earlier = attend_to(
            Store(before.k, None),
            Store(before.v, None),
            near_begin - first,
            jnp.minimum(end, start) - first,
            positions - first,
        )
        near = merge(near, earlier)
    after = jnp.full(q.shape[:1], start + length * zigzag.devices)
    if lengths is not None:
        after = jnp.minimum(after, lengths)
    block = recent.gather(before, k, v, positions[0], start, after)
    return merge(partial, near), block


def _encode(cache: LayerCache, k: jax.Array, v: jax.Array) -> tuple[Store, Store]:
    """[batch, kv_heads, length, head_dim] keys and values in the format of the cache."""
    if cache.recent is None:
        return cache.k.encode(k), cache.v.encode(v)
    # Both are quantised in one go: in decode it is the number of operations that costs.
    both = cache.k.encode(jnp.stack([k, v.astype(k.dtype)]))
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)
