"""Ring attention: each device's queries meet the keys of all, which travel from device to device.

The next block of keys and values is on its way while the current one is attended to; queries
stay. Source: Ring Attention (arXiv 2310.01889).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial, merge
from lsjax.cache import Store, Zigzag

# Slots of each device that travel at once: enough to be worth the way, little enough that the two
# blocks on the way are small beside a layer's cache.
MOST_SLOTS = 4096

# (keys, values, begin, end, positions of the slots) -> attention to those that each query sees
AttendTo = Callable[[Store, Store, jax.Array | None, jax.Array, jax.Array], Partial]


def block_size(capacity: int, most: int = MOST_SLOTS) -> int:
    """Slots that travel at once, of a device that has `capacity`."""
    return capacity if capacity <= most else math.gcd(capacity, most)


def attend(
    attend_to: AttendTo,
    q: jax.Array,
    k: Store,
    v: Store,
    zigzag: Zigzag,
    first: jax.Array,
    count: jax.Array,
    begin: jax.Array | None,
    end: jax.Array,
) -> Partial:
    """Attention of this device's queries to the keys of all; to be called under shard_map.

    Args:
      attend_to: attends to a block, which is of one of the devices.
      q: this device's queries, [batch, kv_heads, group, length, head_dim].
      k, v: this device's keys and values.
      zigzag: where positions lie.
      first: the slot that `k` and `v` begin with, the same on all devices.
      count: how many of their slots hold something, the same on all devices.
      begin, end: [batch, length] positions that each query sees, begin .. end - 1; `begin` is
        None where all see from the first on.

    Returns:
      Partial with values shaped as q.
    """
    devices = zigzag.devices
    device = jax.lax.axis_index("context")
    size = block_size(k.capacity)

    def meet(partial: Partial, block: tuple[Store, Store], owner: jax.Array, start: jax.Array):
        def slot(position: jax.Array) -> jax.Array:
            return jnp.clip(zigzag.slots_before(owner, position) - start, 0, size)

        at = zigzag.position(owner, start + jnp.arange(size))
        seen_from = None if begin is None else slot(begin)
        return merge(partial, attend_to(*block, seen_from, slot(end), at))

    def visit(i: jax.Array, partial: Partial) -> Partial:
        def step(step: jax.Array, state):
            partial, block = state
            coming = from_the_device_before(block, devices)
            owner = (device - step) % devices
            return meet(partial, block, owner, first + i * size), coming

        block = k.block(None, i * size, size), v.block(None, i * size, size)
        partial, block = jax.lax.fori_loop(0, devices - 1, step, (partial, block))
        return meet(partial, block, (device + 1) % devices, first + i * size)

    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    # Else XLA puts zeros down for the rings of all layers when the program begins.
    nothing, _ = jax.lax.optimization_barrier((nothing, q))
    begin_block = jnp.int32(0)
    if begin is not None:  # keys before every window stay at home
        earliest = jax.lax.pmin(jnp.min(zigzag.slots_before(device, begin)), "context")
        begin_block = jnp.maximum(earliest - first - zigzag.stripe // devices, 0) // size
    return jax.lax.fori_loop(begin_block, -(-count // size), visit, nothing)


def from_the_device_before(block: Any, devices: int) -> Any:
    """Arrays of a device, all sent to the next one."""
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", ring), block)
