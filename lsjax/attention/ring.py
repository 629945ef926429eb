"""Ring attention: local queries attend to the keys of all devices, which rotate around a ring.

The next block of keys and values is in flight while the current one is attended to. Queries stay
on their device. Source: Ring Attention (arXiv 2310.01889).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge
from lsjax.distributed.sequence_layout import Zigzag

# Slots per device that are sent at once: enough to make the transfer worthwhile, few enough that
# the two blocks in flight are small compared to a layer's cache.
MAX_SLOTS = 4096

# (keys, values, begin, end, positions of the slots) -> attention to each query's visible slots
AttendTo = Callable[[KVArray, KVArray, jax.Array | None, jax.Array, jax.Array], Partial]


def block_size(capacity: int, max_size: int = MAX_SLOTS) -> int:
    """Returns how many of a device's `capacity` slots are sent at once, at most `max_size`."""
    return capacity if capacity <= max_size else math.gcd(capacity, max_size)


def attend(
    attend_to: AttendTo,
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    zigzag: Zigzag,
    first: jax.Array,
    count: jax.Array | int,
    begin: jax.Array | None,
    end: jax.Array,
) -> Partial:
    """Computes attention of local queries to the keys of all devices; called under shard_map.

    Args:
      attend_to: function that attends to a block of one device's slots.
      q: [batch, kv_heads, group, length, head_dim], local queries.
      k, v: local keys and values.
      zigzag: layout of positions along the context axis.
      first: local slot that `k` and `v` start with, the same on all devices.
      count: number of slots of `k` and `v` in use, the same on all devices.
      begin, end: [batch, length]; each query sees the positions begin .. end - 1. `begin` is None
        if all queries see from position 0.

    Returns:
      Partial with values shaped as q.
    """
    devices, device = zigzag.devices, jax.lax.axis_index("context")
    size = block_size(k.capacity)

    def attend_block(
        partial: Partial, block: tuple[KVArray, KVArray], owner: jax.Array, start: jax.Array
    ):
        def slot(position: jax.Array) -> jax.Array:
            return jnp.clip(zigzag.num_local_slots_before(owner, position) - start, 0, size)

        at = zigzag.position(owner, start + jnp.arange(size))
        seen_from = None if begin is None else slot(begin)
        return merge(partial, attend_to(*block, seen_from, slot(end), at))

    def slot_block_fn(i: jax.Array, partial: Partial) -> Partial:
        block = k.block(None, i * size, size), v.block(None, i * size, size)
        block_fn = functools.partial(attend_block, start=first + i * size)
        return scan(block_fn, partial, block, devices)

    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    # Without the barrier XLA allocates zeros for the rings of all layers at program start.
    nothing, _ = jax.lax.optimization_barrier((nothing, q))
    begin_block = jnp.int32(0)
    if begin is not None and k.capacity > size:  # keys before every query's window are not sent
        earliest = jax.lax.pmin(jnp.min(zigzag.num_local_slots_before(device, begin)), "context")
        begin_block = jnp.maximum(earliest - first - zigzag.block_length // devices, 0) // size
    return jax.lax.fori_loop(begin_block, -(-count // size), slot_block_fn, nothing)


def scan(
    block_fn: Callable[[Any, Any, jax.Array], Any], state: Any, block: Any, devices: int
) -> Any:
    """Passes every device's block around the ring, once past every device.

    Args:
      block_fn: (state, block, index of the device that the block is from) -> state. It runs while
        the next block is on its way.
      state: this device's state before the first block, which is its own.
      block: this device's block.
      devices: number of devices on the context axis.
    """
    device = jax.lax.axis_index("context")

    def ring_step(hop: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, block = carry
        incoming = ring_shift(block, devices)
        return block_fn(state, block, (device - hop) % devices), incoming

    state, block = jax.lax.fori_loop(0, devices - 1, ring_step, (state, block))
    return block_fn(state, block, (device + 1) % devices)


def ring_shift(block: Any, devices: int) -> Any:
    """Sends all arrays of `block` to the next device on the context axis."""
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", ring), block)
