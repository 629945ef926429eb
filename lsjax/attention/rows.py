"""Queries of a whole row meeting the keys of one device after the other, some at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import Seen
from lsjax.cache import Zigzag


def even(count: int, most: int) -> int:
    """The size of the fewest blocks of one size, of at most `most`, that cover `count`."""
    return -(-count // -(-count // most))


def seen_of(zigzag: Zigzag, owner: jax.Array, first: jax.Array, size: int, seen: Seen) -> Seen:
    """What queries see of a device's slots first .. first + size - 1, counted from `first`.

    Args:
      zigzag: where indices of the row lie.
      owner: the device.
      first: the slot.
      size: how many.
      seen: in indices of the row.
    """

    def slot(index: jax.Array) -> jax.Array:
        return jnp.clip(zigzag.slots_before(owner, index) - first, 0, size)

    slots = zigzag.position(owner, first + jnp.arange(size))
    return Seen(slot(seen.begin), slot(seen.end), seen.at, slots)


def over_queries(
    visit: Callable[[Any, jax.Array, Seen], Any], state: Any, seen: Seen, slots: int, size: int
) -> Any:
    """Visits the queries that see some of the slots 0 .. slots - 1, `size` at a time.

    As what queries see does not decrease along the row, they follow one another.

    Args:
      visit: (state, the first query, what `size` of them from it on see) -> state. The last block
        reaches back into the one before; those of its queries see nothing then.
      state: before the first visit.
      seen: the slots that each query sees.
      slots: how many there are.
      size: at most the number of queries.
    """
    length = seen.end.shape[1]

    def some(i: jax.Array, state: Any) -> Any:
        start = jnp.minimum(i * size, length - size)
        own = seen.queries(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1))
        end = jnp.where(start + jnp.arange(size) >= i * size, own.end, 0)
        return visit(state, start, own._replace(end=end))

    first = jnp.min(jnp.sum(seen.end <= 0, axis=1)) // size
    last = -(-jnp.max(jnp.sum(seen.begin < slots, axis=1)) // size)
    return jax.lax.fori_loop(first, last, some, state)
