"""Attention of tiles of queries to the blocks of keys that each has chosen; see rule."""

import functools

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import key_scores, weighted_values
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, from_sums, update_softmax
from lsjax.attention.sparse.rule import TILE, KeptBlocks

# Blocks of keys that one matmul takes: as many keys as in the dense loop.
_BLOCKS = 2


def attend_tile(q: jax.Array, k: KVArray, v: KVArray, kept: KeptBlocks) -> Partial:
    """Computes attention of one tile of queries to the blocks that it keeps.

    The loop is over these blocks: the others are not read.

    Args:
      q: [batch, kv_heads, group * TILE, head_dim], scaled.
      k, v: keys and values; the capacity is a multiple of TILE.
      kept: blocks of the tile.

    Returns:
      Partial with values shaped as q.
    """
    batch, kv_heads, rows, _ = q.shape
    ids = jnp.pad(kept.ids, ((0, 0), (0, 0), (0, _BLOCKS)))

    def attend_head(i: jax.Array) -> Partial:
        row, head = i // kv_heads, i % kv_heads
        stop = jnp.tile(kept.stop[row], rows // TILE)[:, None]
        count, whole = kept.count[row, head], kept.whole[row, head] // _BLOCKS
        head_q = q[row, head][None, None]
        step = functools.partial(_attend_step, head_q, (k, v), ids[row, head], count, stop, i)
        zeros = jnp.zeros((1, 1, *q.shape[2:]), jnp.float32)
        state = zeros, zeros[..., 0], jnp.full((1, 1, rows), -jnp.inf, jnp.float32)
        # Steps whose blocks all rows see completely skip the mask.
        state = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), state)
        steps = -(-count // _BLOCKS)
        state = jax.lax.fori_loop(whole, steps, functools.partial(step, masked=True), state)
        return from_sums(*state)

    partial = jax.lax.map(attend_head, jnp.arange(batch * kv_heads))
    return jax.tree.map(lambda x: x.reshape(batch, kv_heads, *x.shape[3:]), partial)


def _attend_step(q, stores, ids, count, stop, i, step, state, *, masked):
    """Takes one step of a head's loop, over some of its blocks; see `attend_tile`."""
    acc, sum_exp, running_max = state
    first = step * _BLOCKS
    starts = TILE * jax.lax.dynamic_slice_in_dim(ids, first, _BLOCKS)
    k, v = (_side_by_side(store, i, starts) for store in stores)
    scores = key_scores(q, k)
    if masked:
        there = jnp.repeat(first + jnp.arange(_BLOCKS) < count, TILE)
        slots = (starts[:, None] + jnp.arange(TILE)).ravel()
        scores = jnp.where(there & (slots < stop), scores, -jnp.inf)
    weights, correction, *softmax = update_softmax(scores, sum_exp, running_max)
    added = weighted_values(weights, v, q.dtype)
    return correction[..., None] * acc + added, *softmax


def _side_by_side(store: KVArray, i: jax.Array, starts: jax.Array) -> KVArray:
    """Returns the blocks of a row's head that start at some slots, [1, 1, blocks * TILE, ...]."""

    def take(x: jax.Array) -> jax.Array:
        at, rest = (i // x.shape[1], i % x.shape[1]), x.shape[3:]
        parts = [
            jax.lax.dynamic_slice(x, (*at, start, *[0] * len(rest)), (1, 1, TILE, *rest))
            for start in starts
        ]
        return jnp.concatenate(parts, axis=2)

    return jax.tree.map(take, store)
