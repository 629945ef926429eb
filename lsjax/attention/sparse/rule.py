"""Sparse prefill: which blocks of keys a tile of queries attends to, and what stands for the rest.

Means of blocks choose, and the means of those that are not chosen are attended to instead of their
tokens. Nothing is trained. Source: FlashPrefill (arXiv 2603.06199, 2608.19758).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial, from_sums, update_softmax
from lsjax.runtime.loops import map_in_turn
from lsjax.runtime.precision import einsum

# Positions of a tile of queries, and of a block of keys. Both begin at multiples of it, so that an
# answer does not depend on where the prompt was cut into chunks.
TILE = 128


@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """Settings of sparse prefill.

    Attributes:
      alpha: a tile attends to a block whose estimated weight is at least this share of the largest
        one; 0 for all blocks.
      first_layers: number of layers of attention, from the first, that attend to everything.
      last_tokens: queries among so many last tokens of a prompt attend to everything.
      dense_length: queries before this position attend to everything.
      sink_blocks: number of first blocks that every tile attends to; many heads rest there.
      near_blocks: number of blocks before its own that every tile attends to.
    """

    alpha: float
    first_layers: int = 1
    last_tokens: int = 4 * TILE
    dense_length: int = 4096
    sink_blocks: int = 2
    near_blocks: int = 4


class KeptBlocks(NamedTuple):
    """The blocks of slots that a tile of queries attends to, or each of some tiles.

    Those of several tiles have an axis of tiles before all others.

    Attributes:
      ids: [batch, kv_heads, blocks] int32 numbers of the blocks, in order; the first `count` count.
      count: [batch, kv_heads] int32.
      whole: [batch, kv_heads] int32 how many of them, from the first, all queries see completely.
      stop: [batch, TILE] int32; each query sees the slots before it.
    """

    ids: jax.Array
    count: jax.Array
    whole: jax.Array
    stop: jax.Array


def kept_blocks(keep: jax.Array, stop: jax.Array) -> KeptBlocks:
    """Lists the blocks of each tile.

    Args:
      keep: [batch, kv_heads, tiles, blocks] whether a tile attends to a block of slots.
      stop: [batch, tiles * TILE], not decreasing within a tile; each query sees the slots before
        it.
    """
    keep = jnp.moveaxis(keep, 2, 0)
    stop = jnp.moveaxis(stop.reshape(stop.shape[0], -1, TILE), 1, 0)
    block = jnp.arange(keep.shape[-1], dtype=jnp.int32)
    begin = block * TILE
    keep &= begin < stop[:, :, None, -1:]
    whole = keep & (begin + TILE <= stop[:, :, None, :1])
    ids = jnp.sort(jnp.where(keep, block, block[-1]), axis=-1)
    count, whole = (jnp.sum(x, axis=-1, dtype=jnp.int32) for x in (keep, whole))
    return KeptBlocks(ids, count, whole, stop)


def attend_in_tiles(
    attend_tile: Callable[[jax.Array, KeptBlocks], Partial], q: jax.Array, kept: KeptBlocks
) -> Partial:
    """Calls `attend_tile` on one tile of queries after the other.

    Args:
      attend_tile: (q [batch, kv_heads, group * TILE, head_dim], its blocks) -> Partial.
      q: [batch, kv_heads, group, tiles * TILE, head_dim], scaled.
      kept: blocks of each tile.

    Returns:
      Partial with values shaped as q.
    """
    partial = map_in_turn(lambda tile: attend_tile(*tile), (rows_of_tiles(q), kept), q)
    return queries_of_tiles(partial, q.shape[2])


def choose(
    rule: SparsePrefill,
    q: jax.Array,
    estimating: jax.Array | None,
    mean_k: jax.Array,
    mean_v: jax.Array,
    tiles: jax.Array,
    stop: jax.Array,
    lengths: jax.Array | None,
    stride: int | None = None,
) -> tuple[jax.Array, Partial]:
    """Chooses the blocks that each tile of queries attends to.

    Args:
      rule: settings.
      q: [batch, kv_heads, group, views * tiles * TILE, head_dim], scaled. There are several views
        of each query with dual chunk attention; see Step.
      estimating: the same queries as they are rotated to choose by, or None for `q`.
      mean_k, mean_v: [batch, kv_heads, blocks, head_dim] means of each block's keys and values, in
        the order of positions. Those after a tile's own block are not read.
      tiles: [tiles] index of each tile among all of the prompt.
      stop: [tiles] number of leading blocks that may be replaced by their means; all rows of a tile
        see them whole.
      lengths: [batch] tokens of each prompt, or None.
      stride: number of positions in a chunk of dual chunk attention, a multiple of TILE; None if
        one view sees all keys.

    Returns:
      [batch, kv_heads, tiles, blocks] whether a tile attends to a block, and the Partial over the
      means of the blocks that it does not attend to, with values
      [batch, kv_heads, group, tiles * TILE, head_dim].
    """
    block = jnp.arange(mean_k.shape[2])
    per_chunk = block.size if stride is None else stride // TILE
    mean_k = mean_k.astype(q.dtype)

    def scores_of(views: jax.Array, own: jax.Array) -> jax.Array:
        """Scores [views, batch, kv_heads, rows, head_dim] with the means of the view's chunks."""
        by_chunk = jnp.pad(mean_k, ((0, 0), (0, 0), (0, -block.size % per_chunk), (0, 0)))
        by_chunk = by_chunk.reshape(*mean_k.shape[:2], -1, per_chunk, mean_k.shape[3])
        # The last view is of the tile's own chunk, the first of all that no other is of.
        ago = own // per_chunk - jnp.arange(by_chunk.shape[2])
        view = jnp.clip(len(views) - 1 - ago, 0, len(views) - 1)
        scores = einsum("nbkrd,bknsd->bkrns", views[view], by_chunk)
        return scores.reshape(*scores.shape[:3], -1)[..., : block.size]

    def choose_for_tile(tile: tuple[Any, ...]) -> tuple[jax.Array, Partial]:
        rows, estimating, own, stop = tile
        scores = scores_of(rows, own)
        estimates = scores if estimating is None else scores_of(estimating, own)
        seen = jnp.where(block <= own, estimates, -jnp.inf)
        weight = jnp.sum(jnp.exp(seen - jnp.max(seen, axis=(2, 3), keepdims=True)), axis=2)
        keep = weight >= rule.alpha * jnp.max(weight, axis=-1, keepdims=True)
        near = (block < rule.sink_blocks) | (block >= own - rule.near_blocks) | (block >= stop)
        end = (own + 1) * TILE
        keep |= near | (end <= rule.dense_length)
        if lengths is not None:
            keep |= (end > lengths - rule.last_tokens)[:, None, None]
            keep &= near | (own * TILE < lengths)[:, None, None]  # padding
        replaced = jnp.where(keep[:, :, None], -jnp.inf, scores + math.log(TILE))
        zeros = jnp.zeros(rows.shape[1:4], jnp.float32)
        weights, _, *softmax = update_softmax(replaced, zeros, zeros - jnp.inf)
        acc = einsum("bkrs,bksd->bkrd", weights.astype(rows.dtype), mean_v.astype(rows.dtype))
        return keep & (block <= own), from_sums(acc, *softmax)

    def views_of_tiles(q: jax.Array) -> jax.Array:
        rows = rows_of_tiles(q)
        return rows.reshape(-1, len(tiles), *rows.shape[1:]).swapaxes(0, 1)

    rows = jax.tree.map(views_of_tiles, (q, estimating))
    keep, partial = map_in_turn(choose_for_tile, (*rows, tiles, stop), q)
    return jnp.moveaxis(keep, 0, 2), queries_of_tiles(partial, q.shape[2])


def rows_of_tiles(q: jax.Array) -> jax.Array:
    """[batch, kv_heads, group, tiles * TILE, d] -> [tiles, batch, kv_heads, group * TILE, d]."""
    batch, kv_heads, group, _, head_dim = q.shape
    tiles = jnp.moveaxis(q.reshape(batch, kv_heads, group, -1, TILE, head_dim), 3, 0)
    return tiles.reshape(-1, batch, kv_heads, group * TILE, head_dim)


def queries_of_tiles(partial: Partial, group: int) -> Partial:
    """The inverse of `rows_of_tiles`, for the arrays of a Partial."""

    def by_query(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(*x.shape[:3], group, TILE, *x.shape[4:]), 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    return jax.tree.map(by_query, partial)
