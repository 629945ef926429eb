"""Attention over a store, block by block: no [queries, keys] matrix is ever whole.

The slots that queries see bound the loop over key blocks; a mask does the rest.
Source: FlashAttention (arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial, from_sums
from lsjax.cache import Store
from lsjax.precision import einsum

# Tokens of a decode step at most.
_FEW = 16
# Keys from which on their scores are worth working out the other way round; see _turned.
_MANY_KEYS = 256


class Blocks(NamedTuple):
    """How much is worked on at a time.

    Attributes:
      rows: queries times the query heads of a group, at most.
      keys: at most.
      keys_for_few: keys at most that the tokens of a decode step attend to.
    """

    rows: int
    keys: int
    keys_for_few: int


# A CPU keeps the scores of a block, 1 MiB for each KV head, in a core's cache; in decode the keys
# and values, which are copied or widened.
CPU_BLOCKS = Blocks(rows=1024, keys=256, keys_for_few=512)


class Seen(NamedTuple):
    """The slots of a store that queries see, and where they stand themselves.

    Attributes:
      begin, end: [batch, length], not decreasing along the length; a query sees the slots
        begin .. end - 1 as far as there are such. `begin` is None where all see from the first on.
      at: [batch, length] the queries' own positions.
      positions: [slots] that the slots stand at, or [batch, slots], which only ALiBi asks for;
        None where they are the slots' numbers.
    """

    begin: jax.Array | None
    end: jax.Array
    at: jax.Array
    positions: jax.Array | None = None

    def queries(self, change: Callable[[jax.Array], jax.Array]) -> "Seen":
        """With what is there for each query changed."""
        begin = None if self.begin is None else change(self.begin)
        return self._replace(begin=begin, end=change(self.end), at=change(self.at))


def attend(
    q: jax.Array,
    k: Store,
    v: Store,
    seen: Seen,
    slopes: jax.Array | None = None,
    blocks: Blocks = CPU_BLOCKS,
) -> Partial:
    """Attention of some queries to the keys in a store.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      k, v: the keys and values.
      seen: which of them each query sees.
      slopes: [kv_heads, group] of ALiBi, or None.
      blocks: how much is worked on at a time.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    batch, _, group, length, _ = q.shape
    if length > _FEW:

        def some(q: jax.Array, seen: Seen) -> Partial:
            return _attend_block(q, k, v, None, seen, slopes, blocks.keys)

        return in_query_blocks(some, q, seen, max(1, 1 << (blocks.rows // group).bit_length() - 1))
    # A few are bound by reading the keys, and XLA multiplies narrow floats by them slowly on CPU.
    q = q.astype(jnp.float32)
    if batch == 1:
        return _attend_block(q, k, v, None, seen, slopes, blocks.keys_for_few)

    def one(row: jax.Array) -> Partial:
        # Rows of a batch hold different numbers of tokens: each reads its own only.
        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row, 1, 0)

        own = seen.queries(take)
        if own.positions is not None and own.positions.ndim > 1:
            own = own._replace(positions=take(own.positions))
        return _attend_block(take(q), k, v, row, own, slopes, blocks.keys_for_few)

    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, jnp.arange(batch)))


def in_query_blocks(
    attend: Callable[[jax.Array, Seen], Partial], q: jax.Array, seen: Seen, size: int
) -> Partial:
    """Attention of `size` queries at a time, one block of them after the other."""
    length = q.shape[3]
    if length <= size:
        return attend(q, seen)
    blocks = -(-length // size)
    pad = blocks * size - length
    if pad:  # repeat the last query: it bounds the loop as it did
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)))
        seen = seen.queries(lambda x: jnp.pad(x, ((0, 0), (0, pad)), mode="edge"))

    def one(i: jax.Array, done: Partial) -> Partial:
        def take(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        def put(x: jax.Array, block: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, block, i * size, axis=3)

        block = attend(take(q, 3), seen.queries(functools.partial(take, axis=1)))
        return jax.tree.map(put, done, block)

    # What it holds at first is of no account, but must come from q: zeros XLA would put down for
    # all layers when the program begins.
    anything = q[0, 0, 0, 0, 0].astype(jnp.float32)
    done = Partial(jnp.full(q.shape, anything), jnp.full(q.shape[:-1], anything))
    done = jax.lax.fori_loop(0, blocks, one, done)
    return jax.tree.map(lambda x: x[:, :, :, :length], done)


def _attend_block(
    q: jax.Array,
    k: Store,
    v: Store,
    row: jax.Array | None,
    seen: Seen,
    slopes: jax.Array | None,
    most_keys: int,
) -> Partial:
    """Of a few queries, all rows of the batch or one, to all keys that they see.

    The queries of a group are rows of one product: [group * length, head_dim] times the keys.
    """
    begin, end, at, positions = seen
    batch, kv_heads, group, length, head_dim = q.shape
    # Blocks of one size as far as the capacity allows: what the last one reaches back is lost.
    blocks = -(-k.capacity // most_keys)
    size = -(-k.capacity // blocks)
    rows = q.reshape(batch, kv_heads, group * length, head_dim)

    def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        weighted, total, highest = state
        # The last block may reach back into the one before, whose slots are masked then.
        start = jnp.minimum(i * size, k.capacity - size)
        scores = _scores(rows, k.block(row, start, size))
        by_query = scores.reshape(batch, kv_heads, group, length, size)
        slots = start + jnp.arange(size)
        if slopes is not None:
            where = slots
            if positions is not None:
                where = jax.lax.dynamic_slice_in_dim(positions, start, size, axis=-1)
            distance = (at[:, :, None] - where[..., None, :]).astype(jnp.float32)
            by_query -= slopes[:, :, None, None] * distance[:, None, None]
        if masked:
            visible = (slots >= i * size) & (slots < end[:, :, None])
            if begin is not None:
                visible &= slots >= begin[:, :, None]
            by_query = jnp.where(visible[:, None, None], by_query, -jnp.inf)
        scores = by_query.reshape(scores.shape)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        finite = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
        weights = jnp.exp(scores - finite[..., None])
        keep = jnp.exp(highest - finite)
        total = keep * total + jnp.sum(weights, axis=-1)
        weighed = _weigh(weights, v.block(row, start, size), q.dtype)
        return keep[..., None] * weighted + weighed, total, new_highest

    # The blocks that hold keys which some query sees.
    last = -(-jnp.clip(jnp.max(end), 0, k.capacity) // size)
    first = jnp.zeros_like(last)
    if begin is not None:
        first = jnp.clip(jnp.min(begin), 0, k.capacity) // size
    zeros = jnp.zeros(rows.shape, jnp.float32)
    state = (zeros, zeros[..., 0], jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32))
    masked = functools.partial(step, masked=True)
    if blocks == 1:  # a loop of one round would cost more than it does
        state = masked(jnp.int32(0), state)
    elif length <= _FEW:  # bound by reading the keys: the mask costs nothing
        state = jax.lax.fori_loop(first, last, masked, state)
    else:
        # Those that all queries see whole go without a mask, which costs two passes of six.
        full_first = first
        if begin is not None:
            full_first = jnp.clip(-(-jnp.max(begin) // size), first, last)
        full_last = jnp.clip(jnp.minimum(jnp.min(end), k.capacity) // size, full_first, last)
        unmasked = functools.partial(step, masked=False)
        state = jax.lax.fori_loop(full_first, full_last, unmasked, state)

        def edge(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            return masked(jnp.where(i < full_first, i, i + full_last - full_first), state)

        state = jax.lax.fori_loop(first, last - full_last + full_first, edge, state)
    partial = from_sums(*state)
    return jax.tree.map(lambda x: x.reshape(*q.shape[:4], *x.shape[3:]), partial)


def _scores(rows: jax.Array, k: Store) -> jax.Array:
    """[batch, kv_heads, rows, block] float32."""
    keys, factor = k.widened(rows.dtype)
    count, size = rows.shape[2], keys.shape[2]
    if factor is not None and count >= size:  # on what is smaller, the scores or the keys
        keys, factor = _times(keys, factor), None
    if 1 < count < size and size >= _MANY_KEYS:
        scores = _turned(rows, keys)
    else:
        scores = einsum("bkrd,bksd->bkrs", rows, keys)
    return scores if factor is None else scores * factor[:, :, None]


def _turned(rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores of few rows and many keys, by a product with the keys on the left.

    XLA on CPU repacks what stands on the right, here the rows rather than the keys, and takes
    less time for eight columns than for seven.
    """
    count = rows.shape[2]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -count % 8), (0, 0)))
    # XLA would have the rows on the left again, but for the barrier.
    scores = jax.lax.optimization_barrier(einsum("bksd,bkrd->bksr", keys, rows))
    return scores.swapaxes(2, 3)[:, :, :count]


def _weigh(weights: jax.Array, v: Store, dtype: jnp.dtype) -> jax.Array:
    """Sum of weighted values, [batch, kv_heads, rows, head_dim] float32."""
    values, factor = v.widened(dtype)
    if factor is not None:
        if weights.shape[2] < values.shape[3]:
            weights = weights * factor[:, :, None]
        else:
            values = _times(values, factor)
    return einsum("bkrs,bksd->bkrd", weights.astype(dtype), values)


def _times(entries: jax.Array, factor: jax.Array) -> jax.Array:
    return (entries.astype(jnp.float32) * factor[..., None]).astype(entries.dtype)
