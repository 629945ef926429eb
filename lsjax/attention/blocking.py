"""Loops over query blocks while key blocks rotate around the ring."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import KeyRange
from lsjax.distributed.sequence_layout import Zigzag


def even_block_size(count: int, max_size: int) -> int:
    """Smallest block size that covers `count` with the fewest blocks of at most `max_size`."""
    return -(-count // -(-count // max_size))


def local_key_range(
    zigzag: Zigzag, owner: jax.Array, first: jax.Array, size: int, key_range: KeyRange
) -> KeyRange:
    """Converts key ranges to slots first .. first + size - 1 of a device, counted from `first`.

    Args:
      zigzag: layout of the row along the context axis.
      owner: device that holds the slots.
      first: first slot.
      size: number of slots.
      key_range: key ranges as indices in the row.
    """

    def slot(index: jax.Array) -> jax.Array:
        return jnp.clip(zigzag.num_local_slots_before(owner, index) - first, 0, size)

    slots = zigzag.position(owner, first + jnp.arange(size))
    return KeyRange(slot(key_range.start), slot(key_range.stop), key_range.query_positions, slots)


def loop_over_query_blocks(
    visit_block: Callable[[Any, jax.Array, KeyRange], Any],
    state: Any,
    key_range: KeyRange,
    slots: int,
    size: int,
) -> Any:
    """Loops over the queries that see any of the slots 0 .. slots - 1, `size` at a time.

    Key ranges do not decrease along the row, so these queries are contiguous.

    Args:
      visit_block: (state, first query, key range of `size` queries from there on) -> state. The
        last block may overlap the previous one; the overlapping queries then see no keys.
      state: initial state.
      key_range: range of slots that each query sees.
      slots: number of slots.
      size: queries per block, at most the number of queries.

    Returns:
      The final state.
    """
    length = key_range.stop.shape[1]

    def block_fn(i: jax.Array, state: Any) -> Any:
        start = jnp.minimum(i * size, length - size)
        local_range = key_range.queries(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        )
        stop = jnp.where(start + jnp.arange(size) >= i * size, local_range.stop, 0)
        return visit_block(state, start, local_range._replace(stop=stop))

    first = jnp.min(jnp.sum(key_range.stop <= 0, axis=1)) // size
    last = -(-jnp.max(jnp.sum(key_range.start < slots, axis=1)) // size)
    return jax.lax.fori_loop(first, last, block_fn, state)
