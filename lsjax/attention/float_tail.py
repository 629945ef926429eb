"""Updates the FloatTail, the current block of positions that a quantized cache keeps in floats.

A prefill chunk may start in one block and end in another. Its keys are appended to those of the
block that it starts in, so that blocks start at multiples of the block size again. Queries attend
to their own block there, and to all earlier blocks in the quantized cache.
"""

import jax
import jax.numpy as jnp

from lsjax.cache import FloatTail, KVArray, write_tokens


def append_decode(
    float_tail: FloatTail, k: jax.Array, v: jax.Array, at: jax.Array, platform: str
) -> FloatTail:
    """Writes the tokens of a decode step into the current block.

    Args:
      float_tail: current block, with each row's earlier tokens of the same block.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the new tokens.
      at: [batch] slot of each row's first new token; tokens past the block's end are dropped.
      platform: see `write_tokens`.
    """

    def write_array(held: jax.Array, new: jax.Array) -> jax.Array:
        stores = KVArray(held, None), KVArray(new.astype(held.dtype), None)
        return write_tokens(*stores, at, at, lambda slots: slots, platform).data

    def both(_: int, held: FloatTail) -> FloatTail:
        return FloatTail(k=write_array(held.k, k), v=write_array(held.v, v))

    if platform != "cpu":
        return both(0, float_tail)
    # XLA on CPU would write one copy of the block for attention and another for the cache, but not
    # from within a loop. It unrolls a loop known to have one iteration, hence the dynamic bound.
    return jax.lax.fori_loop(0, 1 + jnp.minimum(at[0], 0), both, float_tail)


def append_chunk(float_tail: FloatTail, k: jax.Array, v: jax.Array, at: jax.Array) -> FloatTail:
    """Appends a prefill chunk to the current block.

    Args:
      float_tail: current block, with the tokens before the chunk of the same block.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the chunk.
      at: slot of the chunk's first token, the same in every row.

    Returns:
      A FloatTail with as many more slots as the chunk needs, in whole blocks.
    """
    block, length = float_tail.block, k.shape[2]
    room = -(-(length - 1) // block) * block

    def write_array(held: jax.Array, new: jax.Array) -> jax.Array:
        held = jnp.pad(held, ((0, 0), (0, 0), (0, room), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), at, axis=2)

    return FloatTail(k=write_array(float_tail.k, k), v=write_array(float_tail.v, v))


def slice_current_block(
    run: FloatTail, first: jax.Array, before: FloatTail, next_position: jax.Array
) -> FloatTail:
    """Slices out the block that contains each row's next position.

    Args:
      run: result of `append_chunk`.
      first: [batch] position of slot 0 of `run`.
      before: current block before the new tokens. Rows whose next position is before `first` keep
        it: their prompt has ended, while longer prompts of the batch go on.
      next_position: [batch] next position of each row.
    """
    at = next_position // before.block * before.block - first

    def take(x: jax.Array, old: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, before.block), (0, 0)))
        found = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, before.block, axis=1))(
            padded, jnp.maximum(at, 0)
        )
        return jnp.where((at >= 0)[:, None, None, None], found, old)

    return FloatTail(k=take(run.k, before.k), v=take(run.v, before.v))


def gather_current_block(
    float_tail: FloatTail,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    chunk_start: jax.Array,
    next_position: jax.Array,
) -> FloatTail:
    """Gathers the current block after a chunk that is sharded over the context axis.

    Args:
      float_tail: current block before the chunk.
      k, v: [batch, kv_heads, length, head_dim] this device's keys and values of the chunk.
      positions: [length] positions of these keys and values.
      chunk_start: position of the chunk's first token.
      next_position: [batch] next position of each row; rows where it is not after `chunk_start`
        keep their block.
    """
    block = float_tail.block
    first = next_position // block * block  # [batch]
    at = positions[None] - first[:, None]
    at = jnp.where((at >= 0) & (at < block), at, block)
    before = (first[:, None] + jnp.arange(block) < chunk_start)[:, None, :, None]
    stay = (next_position <= chunk_start)[:, None, None, None]

    def join(held: jax.Array, new: jax.Array) -> jax.Array:
        def scatter(row: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((row.shape[0], block, row.shape[2]), held.dtype)
            return empty.at[:, at].set(row.astype(held.dtype), mode="drop")

        # Each device writes its own tokens and leaves zeros elsewhere; psum combines them.
        found = jax.lax.psum(jax.vmap(scatter)(new, at), "context")
        return jnp.where(stay | before, held, found)

    return FloatTail(k=join(float_tail.k, k), v=join(float_tail.v, v))
