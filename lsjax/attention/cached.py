"""One step of attention with a KV cache: writes the new keys and values, then attends to all.

The cache is sharded over the mesh's context axis in zigzag order. In decode the shards stay where
they are: every device gets all queries and attends to its own shard, and the float32 partials are
merged. A prefill chunk is sharded as the cache is, and keys and values rotate around the ring.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention import float_tail, ring
from lsjax.attention.blockwise import KeyRange
from lsjax.attention.dispatch import attend
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache import KVArray, LayerCache, write, write_tokens
from lsjax.cache.hadamard import hadamard_transform
from lsjax.cache.partition_specs import layer_cache_spec
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
    cache: LayerCache,
    decode: bool,
    window: int | None,
    slopes: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Writes new tokens to the cache, and attends to them and to everything before them.

    Args:
      mesh: mesh with the axes data, context and model.
      q: [batch, length, heads, head_dim], rotated, not yet scaled.
      k, v: [batch, length, kv_heads, head_dim], keys rotated.
      positions: [batch, length]. A prefill chunk has the same in every row, consecutive and in
        order; with several devices on the context axis they are whole zigzag blocks, in the order
        of Zigzag.permutation. In decode each row has its own consecutive positions.
      lengths: [batch] total number of tokens in each row; later ones are padding. Or None.
      cache: this layer's cache.
      decode: whether these are the few tokens of a decode step, not a prefill chunk. With a
        quantized cache, outputs for tokens outside the first token's block are undefined; see
        FloatTail.
      window: sliding window in tokens, or None.
      slopes: [heads] ALiBi slopes, or None.

    Returns:
      [batch, length, heads, head_dim] in v's dtype, and the cache with the tokens written.
    """
    context = mesh.shape["context"]
    in_zigzag_order = context > 1 and not decode
    queries, tokens = (
        (CHUNK_QUERIES_SPEC, CHUNK_SPEC) if in_zigzag_order else (QUERIES_SPEC, TOKENS_SPEC)
    )
    cache_spec = layer_cache_spec(cache)
    sharded = jax.shard_map(
        functools.partial(
            step,
            window=window,
            decode=decode,
            platform=mesh.devices.flat[0].platform,
        ),
        mesh=mesh,
        in_specs=(queries, queries, queries, tokens, TOKENS_SPEC, cache_spec, HEADS_SPEC),
        out_specs=(queries, cache_spec),
        check_vma=False,
    )
    return sharded(q, k, v, positions, lengths, cache, slopes)


def step(q, k, v, positions, lengths, cache, slopes, *, window, decode, platform):
    """Runs `write_and_attend` on one device of the mesh, on its shards of the arrays."""
    zigzag = cache.zigzag
    q, k, v = by_head(q, k, v, cache.k)
    if slopes is not None:
        slopes = slopes.reshape(q.shape[1:3])

    def attend_to(keys: KVArray, values: KVArray, begin, end, at, slots=None) -> Partial:
        slots = None if slopes is None else slots
        return attend(platform, q, keys, values, KeyRange(begin, end, at, slots), slopes)

    # In a layer with a sliding window the cache rolls: slots hold the positions of this lap so far,
    # and the rest of the lap before.
    capacity = cache.k.capacity * zigzag.devices
    lap = None if window is None else positions // capacity * capacity
    device = jax.lax.axis_index("context")

    def put(store: KVArray, new: KVArray) -> KVArray:
        first = positions[:, 0] if lap is None else positions[:, 0] - lap[:, 0]
        slot = zigzag.num_local_slots_before(device, first)
        if not decode:  # `new` is this device's shard of the chunk
            # Padding behind a row's end would overwrite what its window still holds.
            valid = None if lap is None or lengths is None else positions < lengths[:, None]
            return write(store, new, slot[0], platform, valid)
        position_of = functools.partial(zigzag.position, device)
        store = write_tokens(store, new, first, slot, position_of, platform)
        if lap is None or positions.shape[1] == 1:
            return store
        first -= capacity  # drafts past the lap's end
        slot = zigzag.num_local_slots_before(device, first)
        return write_tokens(store, new, first, slot, position_of, platform)

    stores = [
        put(*pair) for pair in zip((cache.k, cache.v), _quantize_both(cache, k, v), strict=True)
    ]
    begin = None if window is None else jnp.maximum(positions + 1 - window, 0)
    if zigzag.devices > 1 and not decode:
        attention = _ring_attention
    else:
        attention = functools.partial(_local_attention, decode=decode, platform=platform)
    partial, block = attention(
        attend_to, q, k, v, positions, lengths, cache.float_tail, stores, begin, lap, zigzag
    )
    out = by_token(partial.values).astype(v.dtype)
    return out, cache.replace(k=stores[0], v=stores[1], float_tail=block)


def by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, store: KVArray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales queries, and moves the head axis of queries, keys and values forward.

    Args:
      q: [batch, length, heads, head_dim], not yet scaled.
      k, v: [batch, length, kv_heads, head_dim].
      store: the cache's keys. If they are quantized, q and k are Hadamard-transformed.

    Returns:
      q [batch, kv_heads, group, length, head_dim], scaled; k and v [batch, kv_heads, length,
      head_dim].
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q * head_dim**-0.5
    if store.scale is not None:
        q, k = hadamard_transform(q), hadamard_transform(k)
    q = q.astype(v.dtype).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def by_token(values: jax.Array) -> jax.Array:
    """Transposes [batch, kv_heads, group, length, head_dim] to [batch, length, heads, head_dim]."""
    batch, kv_heads, group, length, head_dim = values.shape
    return values.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)


def _local_attention(
    attend_to, q, k, v, positions, lengths, before, stores, begin, lap, zigzag, *, decode, platform
):
    """Attends to the local shard of the cache on every device, and merges the partials."""
    end = positions + 1
    run = None
    if before is not None:
        run_first = positions[:, 0] // before.block * before.block
        if decode:
            run = block = float_tail.append_decode(
                before, k, v, positions[:, 0] - run_first, platform
            )
        else:
            run = float_tail.append_chunk(before, k, v, positions[0, 0] - run_first[0])
            after = end[:, -1] if lengths is None else jnp.minimum(end[:, -1], lengths)
            block = float_tail.slice_current_block(run, run_first, before, after)
        run_first = run_first[:, None]
        block_begin = positions // before.block * before.block
        near_partial = attend_to(
            KVArray(run.k, None),
            KVArray(run.v, None),
            (block_begin if begin is None else jnp.maximum(begin, block_begin)) - run_first,
            end - run_first,
            positions - run_first,
        )
        end = block_begin
    device = jax.lax.axis_index("context")
    slots = zigzag.position(device, jnp.arange(stores[0].capacity))

    def far(begin, end, slots):
        if begin is not None:
            begin = zigzag.num_local_slots_before(device, begin)
        end = zigzag.num_local_slots_before(device, end)
        return attend_to(*stores, begin, end, positions, slots)

    if lap is None:
        partial = far(begin, end, None if zigzag.devices == 1 else slots)
    else:
        laps = _laps(lap, begin, end, stores[0].capacity * zigzag.devices)
        partial = merge(*(far(*window, lap[:, :1] + slots) for lap, *window in laps))
    if zigzag.devices > 1:
        partial = merge_over_axis(partial, "context")
    return (partial, None) if run is None else (merge(partial, near_partial), block)


def _laps(lap, begin, end, capacity):
    """Yields this lap of a rolling cache and the one before.

    Yields:
      The first position of the lap, and the begin and end of what each query sees of it, counted
      from there.
    """
    yield lap, begin - lap, end - lap
    lap = lap - capacity
    yield lap, begin - lap, jnp.minimum(end - lap, capacity)


def _ring_attention(attend_to, q, k, v, positions, lengths, before, stores, begin, lap, zigzag):
    """Attends with a chunk's local queries while keys and values rotate around the ring."""
    length = positions.shape[1]
    end = positions + 1
    start = positions[0, 0] // zigzag.block_length * zigzag.block_length  # start of the chunk
    device = jax.lax.axis_index("context")
    slot = zigzag.num_local_slots_before(device, positions[0, 0])
    block_begin = end if before is None else positions // before.block * before.block

    def around_the_ring(arrays, first, count, begin, end, lap=0):
        def attend_block(keys: KVArray, values: KVArray, begin, end, slots) -> Partial:
            return attend_to(keys, values, begin, end, positions, lap + slots)

        return ring.attend(attend_block, q, *arrays, zigzag, first, count, begin, end)

    far = functools.partial(around_the_ring, stores, jnp.int32(0))
    if lap is None:
        partial = far(slot + length, begin, block_begin)
    else:
        local = stores[0].capacity
        this, previous = _laps(lap, begin, block_begin, local * zigzag.devices)
        start_of_lap = lap[0, 0]
        held = zigzag.num_local_slots_before(device, positions[0, 0] - start_of_lap)
        partial = merge(
            far(held + length, *this[1:], start_of_lap),
            far(jnp.where(start_of_lap > 0, local, 0), *previous[1:], previous[0][0, 0]),
        )
    if before is None:
        return partial, None
    near_begin = block_begin if begin is None else jnp.maximum(begin, block_begin)
    chunk = KVArray(k, None), KVArray(v, None)
    near_partial = around_the_ring(chunk, slot, length, near_begin, end)
    if zigzag.block_length % before.block:  # the chunk may begin within a FloatTail block
        first = start // before.block * before.block
        earlier = attend_to(
            KVArray(before.k, None),
            KVArray(before.v, None),
            near_begin - first,
            jnp.minimum(end, start) - first,
            positions - first,
        )
        near_partial = merge(near_partial, earlier)
    after = jnp.full(q.shape[:1], start + length * zigzag.devices)
    if lengths is not None:
        after = jnp.minimum(after, lengths)
    block = float_tail.gather_current_block(before, k, v, positions[0], start, after)
    return merge(partial, near_partial), block


def _quantize_both(cache: LayerCache, k: jax.Array, v: jax.Array) -> tuple[KVArray, KVArray]:
    """Converts [batch, kv_heads, length, head_dim] keys and values to the format of the cache."""
    if cache.float_tail is None:
        return cache.k.quantize(k), cache.v.quantize(v)
    # Both are quantized at once: the cost in decode is the number of operations.
    both = cache.k.quantize(jnp.stack([k, v.astype(k.dtype)]))
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)
