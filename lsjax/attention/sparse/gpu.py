"""Attention of tiles of queries to the blocks of keys that each has chosen, on a GPU.

A Pallas kernel, compiled by Triton. A program takes some rows of a tile, all of one query head, and
loops over the numbers of the blocks that the tile keeps: the others are not read. All tiles of a
chunk are one call, so that one of few heads keeps every multiprocessor busy. int8 is widened in
registers, as in `attention.gpu`.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lsjax.attention.gpu import (
    by_part,
    check_addressable,
    dot,
    num_parts,
    read_parts,
    stored_parts,
)
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, from_sums, update_softmax
from lsjax.attention.sparse.rule import TILE, KeptBlocks

# Query rows of a program. Wider heads have half as many, whose sums fit into registers.
_ROWS, _MOST_CHANNELS = TILE, 128
# Keys that a program reads at a time. With more of them it would spill int8 while it widens it, and
# wide heads would not fit into the shared memory of an L40S.
_KEYS, _FEWER_KEYS = 64, 32


@functools.partial(jax.jit, static_argnames="interpret")
def attend_tiles(
    q: jax.Array, k: KVArray, v: KVArray, kept: KeptBlocks, interpret: bool = False
) -> Partial:
    """Computes attention of tiles of queries to the blocks that each keeps.

    Args:
      q: [batch, kv_heads, group, tiles * TILE, head_dim], scaled.
      k, v: keys and values, int8 or floats; the capacity is a multiple of TILE.
      kept: blocks of each tile, with an axis of tiles before all others.
      interpret: whether to interpret the kernel, slowly, on any device.

    Returns:
      Partial with values shaped as q.

    Raises:
      ValueError: int8 keys take more than 2 GiB and at most 4 GiB on one device.
    """
    check_addressable(k.data)
    batch, kv_heads, group, length, head_dim = q.shape
    parts, is_wide = num_parts(k.data), head_dim > _MOST_CHANNELS
    rows = _ROWS // 2 if is_wide else _ROWS
    keys = _FEWER_KEYS if is_wide or parts > 1 else _KEYS

    def of_head(x: jax.Array | None) -> pl.BlockSpec | None:
        if x is None:
            return None
        zeros = (0,) * (x.ndim - 2)
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda r, t, i: (i // kv_heads, i % kv_heads, *zeros)
        )

    def of_rows(*shape: int) -> pl.BlockSpec:
        zeros, per_tile = (0,) * len(shape), TILE // rows

        def index(r, t, i):
            at = t * per_tile + r % per_tile
            return i // kv_heads, i % kv_heads, r // per_tile, at, *zeros

        return pl.BlockSpec((None, None, None, rows, *shape), index)

    def of_tile(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec(
            (None, None, None, *shape),
            lambda r, t, i: (t, i // kv_heads, i % kv_heads, *zeros),
        )

    stop = pl.BlockSpec((None, None, rows), lambda r, t, i: (t, i // kv_heads, r % (TILE // rows)))
    q_parts = by_part(q, parts)
    stores = [stored_parts(x.data, parts) for x in (k, v)]
    scales = [k.scale, v.scale]
    values, lse = pl.pallas_call(
        functools.partial(_kernel, keys=keys, interpret=interpret),
        grid=(group * (TILE // rows), length // TILE, batch * kv_heads),
        in_specs=[
            *(of_tile(kept.ids.shape[3]), of_tile(), of_tile(), stop),
            of_rows(*q_parts.shape[4:]),
            [of_head(x) for x in stores],
            [of_head(x) for x in scales],
        ],
        out_specs=[of_rows(*q_parts.shape[4:]), of_rows()],
        out_shape=[
            jax.ShapeDtypeStruct(q_parts.shape, jnp.float32),
            jax.ShapeDtypeStruct(q.shape[:4], jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="attend_to_kept_blocks",
    )(*kept, q_parts, stores, scales)
    return Partial(values=values.reshape(q.shape), lse=lse)


def _kernel(
    ids_ref,
    count_ref,
    whole_ref,
    stop_ref,
    q_ref,
    stores,
    scales,
    values_ref,
    lse_ref,
    *,
    keys: int,
    interpret: bool,
) -> None:
    """Computes the Partial of some rows of a tile, of one query head.

    Args:
      ids_ref, count_ref, whole_ref: [blocks], [] and []; see KeptBlocks.
      stop_ref: [rows] slots that each row sees.
      q_ref, values_ref: [rows, channels, parts]; see by_part.
      stores: keys and values, [capacity, channels, ...]; see stored_parts.
      scales: [capacity] scales of each, or None.
      lse_ref: [rows].
      keys: keys that are read at a time.
      interpret: see attend_tiles.
    """
    rows, channels, parts = q_ref.shape
    columns = pl.next_power_of_2(channels)
    in_head = None
    if columns != channels:
        in_head = jnp.broadcast_to(jnp.arange(columns) < channels, (rows, columns))
    at = [(pl.ds(0, rows), pl.ds(0, columns), jnp.int32(i)) for i in range(parts)]
    other = None if in_head is None else 0
    q = [plgpu.load(q_ref.at[x], mask=in_head, other=other) for x in at]
    dtype, stop, per_block = q[0].dtype, stop_ref[...], jnp.int32(TILE // keys)

    def step(i, state, masked):
        *acc, sum_exp, running_max = state
        block, place = (f(i, per_block) for f in (jax.lax.div, jax.lax.rem))
        first = ids_ref[block] * TILE + place * keys
        slots = pl.ds(first, keys)
        read = functools.partial(
            read_parts, at=slots, parts=parts, dtype=dtype, interpret=interpret
        )
        scores = sum(dot(x, y.T) for x, y in zip(q, read(stores[0]), strict=True))
        if scales[0] is not None:
            scores *= scales[0][slots].astype(jnp.float32)[None, :]
        if masked:
            seen = first + jnp.arange(keys) < stop[:, None]
            scores = jnp.where(seen, scores, -jnp.inf)
        weights, correction, *softmax = update_softmax(scores, sum_exp, running_max)
        if scales[1] is not None:
            weights *= scales[1][slots].astype(jnp.float32)[None, :]
        added = [dot(weights.astype(dtype), x) for x in read(stores[1])]
        acc = [correction[:, None] * x + y for x, y in zip(acc, added, strict=True)]
        return *acc, *softmax

    zeros = jnp.zeros((rows, columns), jnp.float32)
    state = (*(zeros,) * parts, jnp.zeros(rows, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32))
    whole, count = (x[...] * per_block for x in (whole_ref, count_ref))
    # Blocks that all rows see completely skip the mask.
    state = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), state)
    state = jax.lax.fori_loop(whole, count, functools.partial(step, masked=True), state)
    *acc, sum_exp, running_max = state
    for place, x in zip(at, acc, strict=True):
        partial = from_sums(x, sum_exp, running_max)
        plgpu.store(values_ref.at[place], partial.values, mask=in_head)
    lse_ref[...] = partial.lse
