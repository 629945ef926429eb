"""Attention over a KVArray, block by block: the full [queries, keys] matrix never exists.

The key ranges of the queries bound the loop over key blocks; a mask handles the edges.
Source: FlashAttention (arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, from_sums, update_softmax
from lsjax.runtime.loops import to_overwrite
from lsjax.runtime.precision import einsum

MAX_DECODE_QUERIES = 16  # tokens of a decode step: the last one, and drafts of prompt lookup
# Query rows up to which reading the keys takes longest, and with more of which products do; and
# the number of keys from which on it pays for few rows to have the keys on a product's left.
_FEW_ROWS, _MANY_KEYS = 16, 256


class Blocks(NamedTuple):
    """Upper limits on block sizes.

    Attributes:
      rows: rows per query block, that is queries times query heads per group.
      keys: keys per block by the number of rows: (most rows, keys), from few rows to many. The last
        is for all others.
    """

    rows: int
    keys: tuple[tuple[int, int], ...]

    def keys_for(self, rows: int) -> int:
        """Returns the keys per block of so many rows."""
        return next((keys for most, keys in self.keys if rows <= most), self.keys[-1][1])


# On a CPU, a core's cache holds the scores of a block, 1 MiB per KV head. With few rows it holds
# the keys and values, which are copied or converted to float32. In between are the rows of a decode
# step over a document that many questions share: only products with that many keys use all cores.
CPU_BLOCKS = Blocks(rows=1024, keys=((_FEW_ROWS, 512), (256, 2048), (1024, 256)))


class KeyRange(NamedTuple):
    """Range of KVArray slots that each query sees, and the positions of queries and keys.

    Attributes:
      start, stop: [batch, length], not decreasing along length but in a decode step. A query sees
        the slots start .. stop - 1, as far as they exist. `start` is None if all queries see from
        slot 0.
      query_positions: [batch, length] position of each query.
      key_positions: [slots] or [batch, slots] position of each slot, needed only for ALiBi; None
        if slot s holds position s.
    """

    start: jax.Array | None
    stop: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array | None = None

    def queries(self, change: Callable[[jax.Array], jax.Array]) -> "KeyRange":
        """Applies `change` to every per-query array."""
        return self._replace(
            start=None if self.start is None else change(self.start),
            stop=change(self.stop),
            query_positions=change(self.query_positions),
        )


class QueryBlocks(NamedTuple):
    """What is known of a KeyRange when a program is compiled: its queries come in blocks.

    The slots before a block are those before `stop` that all of its queries see unless a window
    hides them. With `causal` each query also sees the slots of the block itself up to its own: the
    first query one slot more than those before the block, and each one more than the query before.

    Attributes:
      size: queries per block, a divisor of their number.
      causal: whether queries see slots of their block.
      before: number of slots before a block that it sees at most; `start` is the first of them, the
        same for all of its queries. None if all queries and rows see from one slot on, `start`, or
        from slot 0 (`start` is None); then the numbers of slots before two blocks of a row differ
        by at most the number of queries.
      window: sliding window, more than `size`, or None: query i of a block whose own slots are from
        s on sees slots from s + i + 1 - window on, but none before the `start` of the block's first
        query. `before` is None with it.
    """

    size: int
    causal: bool
    before: int | None = None
    window: int | None = None


def attend(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    key_range: KeyRange,
    slopes: jax.Array | None = None,
    blocks: Blocks = CPU_BLOCKS,
) -> Partial:
    """Computes attention of queries to the keys in a KVArray.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      k, v: keys and values.
      key_range: range of slots that each query sees.
      slopes: [kv_heads, group] ALiBi slopes, or None.
      blocks: block sizes of the computation.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    batch, _, group, length, _ = q.shape
    if length > MAX_DECODE_QUERIES:

        def block_fn(q: jax.Array, key_range: KeyRange) -> Partial:
            return _attend_block(q, k, v, None, key_range, slopes, blocks)

        return in_query_blocks(
            block_fn, q, key_range, max(1, 1 << (blocks.rows // group).bit_length() - 1)
        )
    # A few queries are bound by reading the keys, and XLA on CPU multiplies narrow floats slowly.
    q = q.astype(jnp.float32)
    if batch == 1:
        return _attend_block(q, k, v, None, key_range, slopes, blocks)

    def row_fn(row: jax.Array) -> Partial:
        # Rows of a batch hold different numbers of tokens: each row reads only its own.
        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, row, 1, 0)

        row_range = key_range.queries(take)
        if row_range.key_positions is not None and row_range.key_positions.ndim > 1:
            row_range = row_range._replace(key_positions=take(row_range.key_positions))
        return _attend_block(take(q), k, v, row, row_range, slopes, blocks)

    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(row_fn, jnp.arange(batch)))


def in_query_blocks(
    attend: Callable[[jax.Array, KeyRange], Partial], q: jax.Array, key_range: KeyRange, size: int
) -> Partial:
    """Calls `attend` on one block of `size` queries after the other."""
    length = q.shape[3]
    if length <= size:
        return attend(q, key_range)
    blocks = -(-length // size)
    pad = blocks * size - length
    if pad:  # repeat the last query, which leaves the loop bounds unchanged
        q = jnp.pad(q, ((0, 0),) * 3 + ((0, pad), (0, 0)))
        key_range = key_range.queries(lambda x: jnp.pad(x, ((0, 0), (0, pad)), mode="edge"))

    def row_fn(i: jax.Array, done: Partial) -> Partial:
        def take(x: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        def put(x: jax.Array, block: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, block, i * size, axis=3)

        block = attend(take(q, 3), key_range.queries(functools.partial(take, axis=1)))
        return jax.tree.map(put, done, block)

    shapes = Partial(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (q.shape, q.shape[:-1])))
    done = jax.lax.fori_loop(0, blocks, row_fn, to_overwrite(shapes, q))
    return jax.tree.map(lambda x: x[:, :, :, :length], done)


def _attend_block(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    row: jax.Array | None,
    key_range: KeyRange,
    slopes: jax.Array | None,
    block_sizes: Blocks,
) -> Partial:
    """Computes attention of one query block to all keys that it sees, for all batch rows or `row`.

    The queries of a group are rows of one matmul: [group * length, head_dim] times the keys.
    """
    begin, end, at, positions = key_range
    batch, kv_heads, group, length, head_dim = q.shape
    # Blocks are as even as the capacity allows: the overlap of the last block is wasted work.
    blocks = -(-k.capacity // block_sizes.keys_for(group * length))
    size = -(-k.capacity // blocks)
    rows = q.reshape(batch, kv_heads, group * length, head_dim)

    def step(i: jax.Array, state: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        acc, sum_exp, running_max = state
        # The last block may overlap the previous one; the mask hides the overlap.
        start = jnp.minimum(i * size, k.capacity - size)
        scores = key_scores(rows, k.block(row, start, size))
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
        weights, correction, *softmax = update_softmax(scores, sum_exp, running_max)
        weighed = weighted_values(weights, v.block(row, start, size), q.dtype)
        return correction[..., None] * acc + weighed, *softmax

    # Range of the blocks with keys that some query sees.
    last = -(-jnp.clip(jnp.max(end), 0, k.capacity) // size)
    first = jnp.zeros_like(last)
    if begin is not None:
        first = jnp.clip(jnp.min(begin), 0, k.capacity) // size
    zeros = jnp.zeros(rows.shape, jnp.float32)
    state = (zeros, zeros[..., 0], jnp.full(rows.shape[:-1], -jnp.inf, jnp.float32))
    masked = functools.partial(step, masked=True)
    if blocks == 1:  # a loop of one iteration would cost more than its body
        state = masked(jnp.int32(0), state)
    elif group * length <= _FEW_ROWS:  # bound by reading the keys: the mask costs nothing
        state = jax.lax.fori_loop(first, last, masked, state)
    else:
        # Blocks that all queries see completely skip the mask, which costs two of six passes.
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


def key_scores(rows: jax.Array, k: KVArray) -> jax.Array:
    """Returns [batch, kv_heads, rows, block] float32 scores."""
    keys, factor = k.dequantize_lazy(rows.dtype)
    count, size = rows.shape[2], keys.shape[2]
    if factor is not None and count >= keys.shape[3]:  # scale the smaller, scores or keys
        keys, factor = _times(keys, factor), None
    if 1 < count <= _FEW_ROWS and size >= _MANY_KEYS:
        scores = _scores_keys_as_rows(rows, keys)
    else:
        scores = einsum("bkrd,bksd->bkrs", rows, keys)
    return scores if factor is None else scores * factor[:, :, None]


def _scores_keys_as_rows(rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores of few rows and many keys, by a matmul with the keys on the left.

    XLA on CPU repacks the right operand, here the rows rather than the keys, and takes less time
    for eight columns than for seven.
    """
    count = rows.shape[2]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -count % 8), (0, 0)))
    # Without the barrier XLA would move the rows back to the left.
    scores = jax.lax.optimization_barrier(einsum("bksd,bkrd->bksr", keys, rows))
    return scores.swapaxes(2, 3)[:, :, :count]


def weighted_values(weights: jax.Array, v: KVArray, dtype: jnp.dtype) -> jax.Array:
    """Returns the weighted sum of the values, [batch, kv_heads, rows, head_dim] float32."""
    values, factor = v.dequantize_lazy(dtype)
    if factor is not None:
        if weights.shape[2] < values.shape[3]:
            weights = weights * factor[:, :, None]
        else:
            values = _times(values, factor)
    return einsum("bkrs,bksd->bkrd", weights.astype(dtype), values)


def _times(entries: jax.Array, factor: jax.Array) -> jax.Array:
    return (entries.astype(jnp.float32) * factor[..., None]).astype(entries.dtype)
