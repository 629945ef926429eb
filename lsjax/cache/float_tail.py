"""The current block of positions in floats, beside a quantized cache of all blocks.

A query attends to the float keys of its own block, and to the quantized keys of earlier blocks. So
the nearest keys, which matter most, lose no accuracy. Blocks start at multiples of a fixed size, so
outputs do not depend on how the prompt is split into prefill chunks.
Source of a float window beside a quantized cache: KIVI (arXiv 2402.02750).
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention import dispatch
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.kv_array import KVArray, write_tokens
from lsjax.attention.partial import Partial, merge, with_blind_queries
from lsjax.attention.storage import to_storage
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import LayerCache, Step
from lsjax.cache.slots import attend_around_ring, attend_to_own_piece
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import FLOAT_TAIL_SPEC

# With blocks of half this size, an int8 cache changed twice as many of a small model's predictions
# over 2,048 tokens.
BLOCK = 1024


@flax.struct.dataclass
class FloatBlock:
    """A block of positions in floats; slot s holds the s-th position of the block.

    bfloat16 may be stored as its bits in uint16; see storage.narrow_dtype.

    Attributes:
      k, v: [batch, kv_heads, block, head_dim], keys Hadamard-transformed. Each row's block is the
        one that contains its next position; slots from that position on are stale.
    """

    k: jax.Array
    v: jax.Array

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def arrays(self) -> tuple[KVArray, KVArray]:
        return KVArray(self.k, None), KVArray(self.v, None)


@flax.struct.dataclass
class FloatTail:
    """A quantized cache, and its current block in floats.

    Queries and keys are Hadamard-transformed for both, which leaves their products as they are.

    Attributes:
      inner: quantized cache of all blocks.
      tail: current block.
    """

    inner: LayerCache
    tail: FloatBlock

    @property
    def zigzag(self) -> Zigzag:
        return self.inner.zigzag

    @property
    def block(self) -> int:
        return self.tail.size

    def partition_specs(self) -> "FloatTail":
        tail = jax.tree.map(lambda _: FLOAT_TAIL_SPEC, self.tail)
        return self.replace(inner=self.inner.partition_specs(), tail=tail)

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "FloatTail"]:
        if self._takes_token(q, step):
            return self._write_and_attend(q, k, v, step)
        q, k = hadamard_transform(q).astype(q.dtype), hadamard_transform(k)
        block_begin = step.query_positions // self.block * self.block
        far_blocks, near_blocks = self._blocks(k.shape[2], step)
        far_end = block_begin if step.views == 1 else jnp.minimum(step.end, block_begin)
        far, inner = self.inner.update_and_attend(
            q, k, v, step.replace(end=far_end, blocks=far_blocks)
        )
        near_step, others = step.replace(blocks=near_blocks), 0
        if step.views > 1 and step.tables.chunks.stride % self.block == 0:
            # The block is all in the query's own chunk of positions, of which the last view is.
            others = q.shape[3] - k.shape[2]
            q, block_begin = q[:, :, :, others:], block_begin[:, others:]
            near_step = near_step.replace(
                begin=step.begin[:, others:], end=step.end[:, others:], views=1
            )
        begin = near_step.begin
        begin = block_begin if begin is None else jnp.maximum(begin, block_begin)
        attend_tail = self._around_ring if step.around_ring(self.zigzag) else self._on_each_device
        partial, tail = attend_tail(q, k, v, near_step, begin)
        if others:
            partial = with_blind_queries(partial, others)
        return merge(far, partial), self.replace(inner=inner, tail=tail)

    def _takes_token(self, q: jax.Array, step: Step) -> bool:
        """Returns whether a step is one token per row, of which both are told at once."""
        alone = type(self.inner) is FullCache and self.zigzag.devices == 1
        return (
            step.decode
            and alone
            and dispatch.takes_token(
                step.platform, q, self.inner.k, self.tail.arrays()[0], step.slopes
            )
        )

    def _write_and_attend(self, q, k, v, step):
        """Runs a decode step over the cache and the tail at once; see update_and_attend."""
        block_begin = step.positions // self.block * self.block
        begin = block_begin if step.begin is None else jnp.maximum(step.begin, block_begin)
        partial, (far_k, far_v), (near_k, near_v) = dispatch.write_and_attend(
            *(q, k, v, (self.inner.k, self.inner.v), self.tail.arrays()),
            KeyRange(step.begin, block_begin, step.positions),
            KeyRange(begin - block_begin, step.end - block_begin, step.positions - block_begin),
        )
        inner = self.inner.replace(k=far_k, v=far_v)
        return partial, self.replace(inner=inner, tail=FloatBlock(near_k.data, near_v.data))

    def _blocks(
        self, length: int, step: Step
    ) -> tuple[QueryBlocks, QueryBlocks] | tuple[None, None]:
        """Returns what is known of the queries' view of earlier blocks, and of their own.

        Both are None where a block of positions might begin among the queries of a QueryBlocks.
        """
        block, chunk, zigzag = self.block, self.inner.chunk, self.zigzag
        starts_block = chunk > 0 and chunk % block == 0
        window = step.blocks and step.blocks.window
        if step.blocks is None or (window is not None and (window <= block or not starts_block)):
            return None, None
        if not step.within_chunks(chunk) or not step.within_chunks(block):
            return None, None
        if step.around_ring(zigzag):
            size, whole = zigzag.piece_length, starts_block and length * zigzag.devices % block == 0
            # A device has a piece of each of the blocks, or several whole zigzag blocks.
            if whole and block % zigzag.block_length == 0:
                near = block // zigzag.devices
            elif zigzag.block_length % (2 * block) == 0 and block % size == 0:
                near = size
            else:
                return None, None
        elif starts_block and (length % block == 0 or length < block):
            size, near = min(length, block), 0
        elif 0 < length <= chunk and block % chunk == 0:
            size, near = length, block
        else:
            return None, None
        far = QueryBlocks(size, causal=False, window=window)
        return far, QueryBlocks(size, causal=True, before=near)

    def _on_each_device(self, q, k, v, step, begin):
        """Attends to the current block, which every device has; see update_and_attend."""
        first = step.positions[:, 0] // self.block * self.block
        at = step.positions[:, 0] - first
        if step.decode:
            run = tail = append_decode(self.tail, k, v, at, step.platform)
        else:
            run = append_chunk(self.tail, k, v, at[0])
            after = step.end[:, -1]
            after = after if step.lengths is None else jnp.minimum(after, step.lengths)
            tail = slice_current_block(run, first, self.tail, after)
        first = first[:, None]
        shifted = step.replace(positions=step.positions - first)
        start, stop = begin - first, step.end - first
        return shifted.attend(q, *run.arrays(), start, stop, blocks=step.blocks), tail

    def _around_ring(self, q, k, v, step, begin):
        """Attends to the blocks of a chunk that is sharded; see update_and_attend."""
        zigzag, length = self.zigzag, k.shape[2]
        start = step.positions[0, 0] // zigzag.block_length * zigzag.block_length  # of the chunk
        slot = zigzag.num_local_slots_before(jax.lax.axis_index("context"), step.positions[0, 0])
        chunk = FloatBlock(k, v).arrays()
        end, blocks = step.end, step.blocks
        if blocks:  # around the ring only what is before the queries' pieces
            end = step.positions // blocks.size * blocks.size
            blocks = blocks._replace(causal=False)
        partial = attend_around_ring(q, *chunk, step, zigzag, begin, end, slot, length, blocks)
        if blocks:
            partial = merge(partial, attend_to_own_piece(q, *chunk, step, zigzag))
        chunk_begins = math.lcm(zigzag.block_length, self.inner.chunk or 1)
        if chunk_begins % self.block:  # maybe within a block
            first = start // self.block * self.block
            shifted = step.replace(positions=step.positions - first)
            end = jnp.minimum(step.end, start) - first
            earlier = shifted.attend(q, *self.tail.arrays(), begin - first, end)
            partial = merge(partial, earlier)
        after = jnp.full(q.shape[:1], start + length * zigzag.devices)
        if step.lengths is not None:
            after = jnp.minimum(after, step.lengths)
        return partial, gather_current_block(self.tail, k, v, step.positions[0], start, after)


def append_decode(
    tail: FloatBlock, k: jax.Array, v: jax.Array, at: jax.Array, platform: str
) -> FloatBlock:
    """Writes the tokens of a decode step into the current block.

    Args:
      tail: current block, with each row's earlier tokens of the same block.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the new tokens.
      at: [batch] slot of each row's first new token; tokens past the block's end are dropped.
      platform: see `write_tokens`.
    """

    def write_array(held: jax.Array, new: jax.Array) -> jax.Array:
        stores = KVArray(held, None), KVArray(to_storage(new, held.dtype), None)
        return write_tokens(*stores, at, at, lambda slots: slots, platform).data

    def both(_: int, held: FloatBlock) -> FloatBlock:
        return FloatBlock(k=write_array(held.k, k), v=write_array(held.v, v))

    if platform != "cpu":
        return both(0, tail)
    # XLA on CPU would write one copy of the block for attention and another for the cache, but not
    # from within a loop. It unrolls a loop known to have one iteration, hence the dynamic bound.
    return jax.lax.fori_loop(0, 1 + jnp.minimum(at[0], 0), both, tail)


def append_chunk(tail: FloatBlock, k: jax.Array, v: jax.Array, at: jax.Array) -> FloatBlock:
    """Appends a prefill chunk to the current block.

    Args:
      tail: current block, with the tokens before the chunk of the same block.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the chunk.
      at: slot of the chunk's first token, the same in every row.

    Returns:
      A FloatBlock with as many more slots as the chunk needs, in whole blocks.
    """
    block, length = tail.size, k.shape[2]
    room = -(-(length - 1) // block) * block

    def write_array(held: jax.Array, new: jax.Array) -> jax.Array:
        held = jnp.pad(held, ((0, 0), (0, 0), (0, room), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(held, to_storage(new, held.dtype), at, axis=2)

    return FloatBlock(k=write_array(tail.k, k), v=write_array(tail.v, v))


def slice_current_block(
    run: FloatBlock, first: jax.Array, before: FloatBlock, next_position: jax.Array
) -> FloatBlock:
    """Slices out the block that contains each row's next position.

    Args:
      run: result of `append_chunk`.
      first: [batch] position of slot 0 of `run`.
      before: current block before the new tokens. Rows whose next position is before `first` keep
        it: their prompt has ended, while longer prompts of the batch go on.
      next_position: [batch] next position of each row.
    """
    at = next_position // before.size * before.size - first

    def take(x: jax.Array, old: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, before.size), (0, 0)))
        found = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, before.size, axis=1))(
            padded, jnp.maximum(at, 0)
        )
        return jnp.where((at >= 0)[:, None, None, None], found, old)

    return FloatBlock(k=take(run.k, before.k), v=take(run.v, before.v))


def gather_current_block(
    tail: FloatBlock,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    chunk_start: jax.Array,
    next_position: jax.Array,
) -> FloatBlock:
    """Gathers the current block after a chunk that is sharded over the context axis.

    Args:
      tail: current block before the chunk.
      k, v: [batch, kv_heads, length, head_dim] this device's keys and values of the chunk.
      positions: [length] positions of these keys and values.
      chunk_start: position of the chunk's first token.
      next_position: [batch] next position of each row; rows where it is not after `chunk_start`
        keep their block.
    """
    block = tail.size
    first = next_position // block * block  # [batch]
    at = positions[None] - first[:, None]
    at = jnp.where((at >= 0) & (at < block), at, block)
    before = (first[:, None] + jnp.arange(block) < chunk_start)[:, None, :, None]
    stay = (next_position <= chunk_start)[:, None, None, None]

    def join(held: jax.Array, new: jax.Array) -> jax.Array:
        def scatter(row: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((row.shape[0], block, row.shape[2]), held.dtype)
            return empty.at[:, at].set(to_storage(row, held.dtype), mode="drop")

        # Each device writes its own tokens and leaves zeros elsewhere; psum combines them.
        found = jax.lax.psum(jax.vmap(scatter)(new, at), "context")
        return jnp.where(stay | before, held, found)

    return FloatBlock(k=join(tail.k, k), v=join(tail.v, v))
