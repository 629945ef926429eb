"""Prefill on a GPU: attention of many queries to the KV cache with cuDNN.

cuDNN multiplies bfloat16, and knows two masks: a causal one, and one that hides keys past a length.
Queries in blocks need no other, see QueryBlocks. A block sees its own slots causally, and of the
slots before it a number of its own: both are batches with a row per block. The far end of a sliding
window is causal in reverse order. (cuDNN's own sliding window counts from the first key as if it
were the first query's, so that queries would be wasted on all keys before a chunk.) What all blocks
see is one call for all queries, a piece of the cache at a time: int8 is dequantized for one piece
only, and pieces past the last visible slot cost nothing. The Partials are merged.

That loop over pieces is the only one whose number of iterations the compiler does not know, and a
GPU waits for its host before each of them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge

# Slots of all rows that are dequantized at a time: enough work to hide a kernel launch. Keys and
# values take 64 MiB for 4 KV heads with a head_dim of 128.
PIECE = 32768


def in_blocks(
    q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange, blocks: QueryBlocks
) -> Partial:
    """Computes attention of queries in blocks; no loop over edges is needed.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16, already scaled by 1/sqrt(head_dim).
      k, v: keys and values.
      key_range: range of slots that each query sees.
      blocks: what is known of the range.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    length = q.shape[3]
    count = length // blocks.size
    own = key_range.stop[:, :: blocks.size] - blocks.causal  # [batch, count]: first slot of its own
    partial = _own_slots(q, k, v, own, blocks.size) if blocks.causal else None
    if blocks.window is not None:
        return _window(q, k, v, key_range.start, own, blocks, partial)
    if blocks.before is not None:
        if not blocks.before:
            return partial
        start = key_range.start[:, :: blocks.size]
        return _by_block(q, k, v, start, own - start, blocks.before, partial)
    span = min(length, k.capacity) if count > 1 else 0
    first = jnp.clip(jnp.min(own, axis=1), 0, k.capacity - span)
    if span:
        start = jnp.broadcast_to(first[:, None], own.shape)
        partial = _by_block(q, k, v, start, own - start, span, partial)
    if partial is not None and k.capacity <= length:
        return partial  # no slot is before all blocks
    begin = 0 if key_range.start is None else key_range.start[0, 0]
    return _piece_by_piece(q, k, v, first, partial, begin)


def in_general(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    begin: jax.Array,
    end: jax.Array,
    edges: Callable[[jax.Array, jax.Array], Partial],
) -> Partial:
    """Computes attention of each query to its slots begin <= s < end, whatever they are.

    Slots that only some queries see are left to other code, whose loops take a GPU far longer.

    Args:
      q, k, v: see in_blocks.
      begin, end: [batch, length] int32 slot range of each query; slots past the capacity are
        ignored.
      edges: (begin, end) -> the same attention of `q` to these keys, for other slot ranges.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    first = jnp.clip(jnp.max(begin), 0, k.capacity)
    last = jnp.clip(jnp.min(end), first, k.capacity)
    partial = merge(edges(begin, jnp.minimum(end, first)), edges(jnp.maximum(begin, last), end))
    return _piece_by_piece(q, k, v, jnp.full(q.shape[0], last), partial, first)


def _merged(partial: Partial | None, other: Partial) -> Partial:
    return other if partial is None else merge(partial, other)


def _own_slots(q: jax.Array, k: KVArray, v: KVArray, first: jax.Array, size: int) -> Partial:
    """Attends causally to the block's own slots; `first` [batch, count] is the first of them."""
    keys, values = (_slots_of_blocks(x, first, size) for x in (k, v))
    return _unfold(_attend(_fold(q, size), keys, values, None, causal=True), q.shape)


def _window(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    start: jax.Array,
    own: jax.Array,
    blocks: QueryBlocks,
    partial: Partial | None,
) -> Partial:
    """Adds to `partial` the slots before each block that a sliding window shows.

    All queries of a block see the last `window - size - 1` of them. Of the `size` slots before
    those each query sees one fewer than the query before it. With queries and slots in reverse
    order that is a causal mask, and slots before the first one come last.

    Args:
      q, k, v: see in_blocks.
      start: [batch, length] first slot of each query.
      own: [batch, count] first of each block's own slots.
      blocks: see in_blocks.
    """
    size, lowest = blocks.size, start[:, :: blocks.size]
    oldest = own + 1 - blocks.window  # that the first query of a block would see
    slots = (oldest + size - 1)[..., None] - jnp.arange(size)

    def of_block(row: KVArray, slots: jax.Array) -> KVArray:
        return jax.tree.map(lambda x: jnp.take(x, slots, axis=1, mode="clip"), row)

    keys, values = (_rows(jax.vmap(jax.vmap(of_block, (None, 0)))(x, slots)) for x in (k, v))
    queries = jnp.flip(_fold(q, size), axis=2)
    length = jnp.clip(oldest + size - lowest, 0, size).reshape(-1)
    found = _attend(queries, keys, values, length, causal=True)
    found = _unfold(jax.tree.map(lambda x: jnp.flip(x, axis=2), found), q.shape)
    partial = _merged(partial, found)
    shared = min(blocks.window - size - 1, k.capacity)
    if shared < 1:
        return partial
    first = jnp.maximum(oldest + size, lowest)
    return _by_block(q, k, v, first, own - first, shared, partial)


def _by_block(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    first: jax.Array,
    lengths: jax.Array,
    size: int,
    partial: Partial | None,
) -> Partial:
    """Adds to `partial` slots that differ from block to block.

    A block sees `lengths` slots from `first` on, at most `size`; both are [batch, count]. As many
    blocks are run at once as see a piece of slots together.
    """
    batch, count = first.shape
    at_once = max(
        n for n in range(1, count + 1) if count % n == 0 and (n * batch * size <= PIECE or n == 1)
    )
    queries = at_once * (q.shape[3] // count)

    def some(i: jax.Array | int, partial: Partial | None) -> Partial:
        taken = jax.lax.dynamic_slice_in_dim(q, i * queries, queries, axis=3)
        start, length = (
            jax.lax.dynamic_slice_in_dim(x, i * at_once, at_once, axis=1) for x in (first, lengths)
        )
        keys, values = (_slots_of_blocks(x, start, size) for x in (k, v))
        length = jnp.clip(length, 0, size).reshape(-1)
        found = _attend(_fold(taken, queries // at_once), keys, values, length)
        return _merged(partial, _unfold(found, taken.shape))

    if at_once == count:
        return some(0, partial)

    def step(i: jax.Array, partial: Partial) -> Partial:
        def take(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i * queries, queries, axis=3)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, i * queries, axis=3)

        return jax.tree.map(put, partial, some(i, jax.tree.map(take, partial)))

    return jax.lax.fori_loop(0, count // at_once, step, _nothing(q) if partial is None else partial)


def _piece_by_piece(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    end: jax.Array,
    partial: Partial | None,
    begin: jax.Array | int = 0,
) -> Partial:
    """Adds to `partial` the slots from `begin` to before `end` [batch], which all queries see."""
    folded, size = _fold(q, q.shape[3]), _piece_size(k)

    def slots_from(start: jax.Array, x: KVArray) -> KVArray:
        if isinstance(begin, int):
            return x.block(None, start, size)
        # A slice would have to end within the capacity.
        return jax.tree.map(lambda x: jnp.take(x, start + jnp.arange(size), 2, mode="clip"), x)

    def piece(start: jax.Array, stop: jax.Array) -> Partial:
        keys, values = (_bfloat16(slots_from(start, x)) for x in (k, v))
        length = jnp.clip(jnp.minimum(end, stop) - start, 0, size)
        return _unfold(_attend(folded, keys, values, length), q.shape)

    last = jnp.max(end)
    if size == k.capacity:  # a loop would only make the host wait
        return _merged(partial, piece(jnp.int32(begin), last))
    pieces = -(-(last - begin) // size)

    def step(i: jax.Array, partial: Partial) -> Partial:
        stop = last - (pieces - 1 - i) * size  # only the first piece may be partial
        return merge(partial, piece(jnp.maximum(stop - size, begin), stop))

    return jax.lax.fori_loop(0, pieces, step, _nothing(q) if partial is None else partial)


def _nothing(q: jax.Array) -> Partial:
    """Returns the Partial of queries that see no slot, to add to."""
    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    # Without the barrier XLA allocates zeros for the loops of all layers at program start.
    return jax.lax.optimization_barrier((nothing, q))[0]


def _piece_size(k: KVArray) -> int:
    """Returns the slots per row that are dequantized at a time."""
    return min(max(PIECE // k.data.shape[0], 1), k.capacity)


def _slots_of_blocks(x: KVArray, first: jax.Array, size: int) -> jax.Array:
    """Dequantizes `size` slots from `first` [batch, count] on.

    Returns:
      [batch * count, kv_heads, size, head_dim] bfloat16.
    """

    def of_block(row: KVArray, first: jax.Array) -> KVArray:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), row)

    return _rows(jax.vmap(jax.vmap(of_block, (None, 0)))(x, first))


def _rows(x: KVArray) -> jax.Array:
    """Dequantizes [batch, count, ...] slots as [batch * count, ...] bfloat16."""
    return _bfloat16(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x))


def _bfloat16(x: KVArray) -> jax.Array:
    return x.dequantize().astype(jnp.bfloat16)


def _fold(q: jax.Array, size: int) -> jax.Array:
    """Makes a row of the batch of each block of queries.

    Returns:
      [batch * blocks, heads, size, head_dim].
    """
    batch, kv_heads, group, length, head_dim = q.shape
    blocks = q.reshape(batch, kv_heads * group, length // size, size, head_dim)
    return blocks.swapaxes(1, 2).reshape(-1, kv_heads * group, size, head_dim)


def _unfold(partial: Partial, shape: tuple[int, ...]) -> Partial:
    """Puts back what is of queries that `_fold` took from a q of this shape."""

    def back(x: jax.Array) -> jax.Array:
        x = x.reshape(shape[0], -1, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(*shape[:4], *x.shape[4:])

    return jax.tree.map(back, partial)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, causal: bool = False
) -> Partial:
    """Attends to the first `lengths` keys of each row; if causal, query i to the first i + 1.

    Calls the function below jax.nn.dot_product_attention, which would round lse to bfloat16.

    Args:
      q: [rows, heads, queries, head_dim].
      k, v: [rows, kv_heads, keys, head_dim]; as many keys as queries if causal.
      lengths: [rows]; None for all keys, if causal.
      causal: whether attention is causal.
    """
    attend = functools.partial(
        dot_product_attention, q, k, v, qkv_layout="BNTH", return_residual=True
    )
    if lengths is None:
        values, lse = attend(mask_type=MaskType.CAUSAL)
        return Partial(values.astype(jnp.float32), lse)
    values, lse = attend(
        q_seqlen=jnp.full(q.shape[0], q.shape[2], jnp.int32),
        kv_seqlen=jnp.maximum(lengths, 1),
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )
    some = (lengths > 0)[:, None, None]
    return Partial(
        values=jnp.where(some[..., None], values.astype(jnp.float32), 0.0),
        lse=jnp.where(some, lse, -jnp.inf),
    )
