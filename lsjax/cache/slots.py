"""Reading and writing the slots of a cache that is sharded over the context axis in zigzag order.

In decode the shards stay where they are: every device gets all queries and attends to its own
shard, and the partials are merged. A prefill chunk is sharded as the cache is, and keys and values
rotate around the ring.
"""

import functools

import jax
import jax.numpy as jnp

from lsjax.attention import ring
from lsjax.attention.blockwise import QueryBlocks
from lsjax.attention.kv_array import KVArray, write, write_tokens
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache.protocol import Step
from lsjax.distributed.sequence_layout import Zigzag


def quantize_both(k: KVArray, new_k: jax.Array, new_v: jax.Array) -> tuple[KVArray, KVArray]:
    """Converts [batch, kv_heads, length, head_dim] keys and values to the format of `k`."""
    if k.scale is None:
        return k.quantize(new_k), k.quantize(new_v)
    # Both are quantized at once: the cost in decode is the number of operations.
    both = k.quantize(jnp.stack([new_k, new_v.astype(new_k.dtype)]))
    return jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)


def write_slots(
    store: KVArray,
    new: KVArray,
    first: jax.Array,
    step: Step,
    zigzag: Zigzag,
    valid: jax.Array | None = None,
) -> KVArray:
    """Writes a step's keys or values.

    Args:
      store: local shard.
      new: the step's keys or values, in the format of `store`.
      first: [batch] position of each row's first token, counted from that of slot 0.
      step: the step.
      zigzag: layout of positions.
      valid: [batch, length] which tokens of a prefill chunk are written; None for all.
    """
    device = jax.lax.axis_index("context")
    slot = zigzag.num_local_slots_before(device, first)
    if not step.decode:  # `new` is this device's shard of the chunk
        return write(store, new, slot[0], step.platform, valid)
    position_of = functools.partial(zigzag.position, device)
    return write_tokens(store, new, first, slot, position_of, step.platform)


def attend_to_slots(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    step: Step,
    zigzag: Zigzag,
    begin: jax.Array | None,
    end: jax.Array,
    count: jax.Array,
    offset: jax.Array | int = 0,
) -> Partial:
    """Attends to slots: those of all devices if the step goes around the ring, else local ones.

    Args:
      q: queries; see LayerCache.
      k, v: local shard.
      step: the step.
      zigzag: layout of positions.
      begin, end: [batch, length]; each query sees begin .. end - 1 of the positions that slots
        hold. `begin` is None for all before `end`.
      count: number of slots of `k` and `v` in use, the same on all devices; read around the ring.
      offset: what to add to the positions that slots hold in `zigzag`, for ALiBi.
    """
    if step.around_ring(zigzag):
        return attend_around_ring(q, k, v, step, zigzag, begin, end, 0, count, offset=offset)
    device = jax.lax.axis_index("context")
    positions = offset + zigzag.position(device, jnp.arange(k.capacity))
    if begin is not None:
        begin = zigzag.num_local_slots_before(device, begin)
    end = zigzag.num_local_slots_before(device, end)
    return step.attend(q, k, v, begin, end, positions, step.blocks)


def attend_by_chunk(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    new_k: KVArray,
    new_v: KVArray,
    step: Step,
    zigzag: Zigzag,
) -> Partial:
    """Attends around the ring to the earlier chunks, then to the step's own.

    So each call sees slots in blocks: all slots of earlier chunks, and of its own the pieces that
    come before a piece of queries. Queries see all positions before `step.end`.

    Args:
      q: queries; see LayerCache.
      k, v: local shard.
      new_k, new_v: this device's keys and values of the chunk.
      step: the step, with blocks.
      zigzag: layout of positions.
    """
    length, positions = new_k.capacity, step.positions
    start = positions[0, 0] // zigzag.block_length * zigzag.block_length  # of the chunk
    first = zigzag.num_local_slots_before(jax.lax.axis_index("context"), start)
    end = jnp.full_like(step.end, start)
    whole = QueryBlocks(length, causal=False)
    earlier = attend_around_ring(q, k, v, step, zigzag, None, end, 0, first, whole)
    size, end = zigzag.piece_length, step.end
    if step.blocks.causal:
        end = positions // size * size
        earlier = merge(earlier, attend_to_own_piece(q, new_k, new_v, step, zigzag))
    pieces = QueryBlocks(size, causal=False)
    own = attend_around_ring(q, new_k, new_v, step, zigzag, None, end, first, length, pieces)
    return merge(earlier, own)


def attend_around_ring(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    step: Step,
    zigzag: Zigzag,
    begin: jax.Array | None,
    end: jax.Array,
    first: jax.Array | int,
    count: jax.Array | int,
    blocks: QueryBlocks | None = None,
    offset: jax.Array | int = 0,
) -> Partial:
    """Attends to the slots of all devices; see `attend_to_slots`."""

    def attend_block(k: KVArray, v: KVArray, begin, end, positions) -> Partial:
        return step.attend(q, k, v, begin, end, offset + positions, blocks)

    return ring.attend(attend_block, q, k, v, zigzag, jnp.int32(first), count, begin, end)


def attend_to_own_piece(
    q: jax.Array, k: KVArray, v: KVArray, step: Step, zigzag: Zigzag
) -> Partial:
    """Attends to this device's keys and values of a chunk, each query to those of its own piece."""
    size, at = zigzag.piece_length, jnp.arange(k.capacity)
    start, stop = (jnp.broadcast_to(x, step.positions.shape) for x in (at // size * size, at + 1))
    return step.attend(q, k, v, start, stop, step.positions[0], QueryBlocks(size, True, before=0))


def merge_devices(partial: Partial, step: Step, zigzag: Zigzag) -> Partial:
    """Merges partials over local slots; those from around the ring are whole already."""
    if zigzag.devices == 1 or step.around_ring(zigzag):
        return partial
    return merge_over_axis(partial, "context")
