"""The block of positions in progress: how new keys and values join it, and what a query sees of it.

A chunk of new tokens may begin in one block and end in another. Its keys are put behind those of
the block that it begins in, so that blocks begin at multiples of their size again; queries attend
to their own block there, and to all before it in the quantised store.
"""

import jax
import jax.numpy as jnp

from lsjax.cache import Recent, Store, write_tokens


def put(recent: Recent, k: jax.Array, v: jax.Array, at: jax.Array, platform: str) -> Recent:
    """The block in progress with a few tokens in it.

    Args:
      recent: holds each row's tokens before the new ones, as far as they are of the same block.
      k, v: [batch, kv_heads, length, head_dim] of the new tokens.
      at: [batch] slot of each row's first; those past the block's end are left out.
      platform: as of `write_tokens`.
    """

    def one(held: jax.Array, new: jax.Array) -> jax.Array:
        stores = Store(held, None), Store(new.astype(held.dtype), None)
        return write_tokens(*stores, at, at, lambda slots: slots, platform).data

    def both(_: int, held: Recent) -> Recent:
        return Recent(k=one(held.k, k), v=one(held.v, v))

    if platform != "cpu":
        return both(0, recent)
    # XLA on CPU would write one copy of the block for attention and another for the cache, but not
    # from within a loop; and it unrolls a loop that it can see to be of one round.
    return jax.lax.fori_loop(0, 1 + jnp.minimum(at[0], 0), both, recent)


def extend(recent: Recent, k: jax.Array, v: jax.Array, at: jax.Array) -> Recent:
    """The block in progress with a chunk behind it.

    Args:
      recent: holds the tokens before the chunk, as far as they are of the same block.
      k, v: [batch, kv_heads, length, head_dim] of the chunk.
      at: slot of its first token, in every row.

    Returns:
      The same slots and as many more as take the chunk and a block's end.
    """
    block, length = recent.block, k.shape[2]
    room = -(-(length - 1) // block) * block

    def one(held: jax.Array, new: jax.Array) -> jax.Array:
        held = jnp.pad(held, ((0, 0), (0, 0), (0, room), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), at, axis=2)

    return Recent(k=one(recent.k, k), v=one(recent.v, v))


def cut(run: Recent, first: jax.Array, before: Recent, next_position: jax.Array) -> Recent:
    """The block that each row's next position falls in.

    Args:
      run: what `extend` returned.
      first: [batch] position of its slot 0.
      before: the block before the new tokens came; rows whose next position is before `first`
        keep it (a prompt that has ended, while longer ones of the batch go on).
      next_position: [batch].
    """
    at = next_position // before.block * before.block - first

    def take(x: jax.Array, old: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, before.block), (0, 0)))
        found = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, before.block, axis=1))(
            padded, jnp.maximum(at, 0)
        )
        return jnp.where((at >= 0)[:, None, None, None], found, old)

    return Recent(k=take(run.k, before.k), v=take(run.v, before.v))


def gather(
    recent: Recent,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    chunk_start: jax.Array,
    next_position: jax.Array,
) -> Recent:
    """The block of positions in progress after a chunk that is dealt out; see Recent.

    Args:
      recent: before the chunk.
      k, v: [batch, kv_heads, length, head_dim] this device's of the chunk.
      positions: [length] where they stand.
      chunk_start: position of the chunk's first token.
      next_position: [batch]; rows whose next is not after `chunk_start` keep their block.
    """
    block = recent.block
    first = next_position // block * block  # [batch]
    at = positions[None] - first[:, None]
    at = jnp.where((at >= 0) & (at < block), at, block)
    before = (first[:, None] + jnp.arange(block) < chunk_start)[:, None, :, None]
    stay = (next_position <= chunk_start)[:, None, None, None]

    def join(held: jax.Array, new: jax.Array) -> jax.Array:
        def put(row: jax.Array, at: jax.Array) -> jax.Array:
            empty = jnp.zeros((row.shape[0], block, row.shape[2]), held.dtype)
            return empty.at[:, at].set(row.astype(held.dtype), mode="drop")

        # Each device has put its own; the others' places are zeros there.
        found = jax.lax.psum(jax.vmap(put)(new, at), "context")
        return jnp.where(stay | before, held, found)

    return Recent(k=join(recent.k, k), v=join(recent.v, v))
