"""Attention of a tile of queries to the blocks of keys that it has chosen, on TPU.

The blocks' numbers are scalars that the pipeline reads ahead of its steps, so that the others never
leave HBM. Keys are read in place, as in `attention.tpu`.
Source: FlashAttention (arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, update_softmax
from lsjax.attention.sparse.rule import TILE, KeptBlocks
from lsjax.attention.tpu import LANES, VMEM, row_of_tile
from lsjax.runtime.precision import einsum

_BLOCKS = 4  # blocks of keys per step, each of which the pipeline fetches by itself
_ROWS = 8  # query heads of a group in a block of rows, at most


@functools.partial(jax.jit, static_argnames="interpret")
def attend_tile(
    q: jax.Array, k: KVArray, v: KVArray, kept: KeptBlocks, interpret: bool = False
) -> Partial:
    """Computes attention of one tile of queries to the blocks that it keeps.

    Args:
      q: [batch, kv_heads, group * TILE, head_dim], scaled.
      k, v: keys and values, int8 or floats; the capacity is a multiple of TILE.
      kept: blocks of the tile.
      interpret: whether to evaluate the kernel in plain JAX, without a TPU.

    Returns:
      Partial with values shaped as q.
    """
    batch, kv_heads, rows, head_dim = q.shape
    group = rows // TILE
    size = TILE * max(n for n in range(1, _ROWS + 1) if group % n == 0)
    heads = 8 if kv_heads % 8 == 0 else kv_heads  # scales are tiled by 8 heads
    capacity_minor = head_dim % LANES != 0
    stores, scales = [k.data, v.data], [x for x in (k.scale, v.scale) if x is not None]
    if capacity_minor:
        stores = [x.swapaxes(2, 3) for x in stores]
    if not interpret:
        stores = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in stores]
        scales = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in scales]
    stop = jnp.tile(kept.stop, (1, group))[:, None]

    def block(j: int, b, h, i, ids, count):
        # A step past the last block repeats its number, so nothing is fetched.
        return ids[b, h, jnp.maximum(jnp.minimum(i * _BLOCKS + j, count[b, h] - 1), 0)]

    def of_vectors(j: int):
        def index(b, h, r, i, ids, count, whole):
            at = block(j, b, h, i, ids, count)
            return (b, h, 0, at) if capacity_minor else (b, h, at, 0)

        return pl.BlockSpec(
            (None, None, head_dim, TILE) if capacity_minor else (None, None, TILE, head_dim), index
        )

    def of_scales(j: int):
        def index(b, h, r, i, ids, count, whole):
            return b, jax.lax.div(h, heads), block(j, b, h, i, ids, count)

        return pl.BlockSpec((None, heads, TILE), index)

    vectors, factors = ([spec(j) for j in range(_BLOCKS)] for spec in (of_vectors, of_scales))
    queries = pl.BlockSpec((None, None, size, head_dim), lambda b, h, r, i, *_: (b, h, r, 0))
    values, lse = pl.pallas_call(
        functools.partial(_kernel, heads, "ds" if capacity_minor else "sd"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(
                batch,
                kv_heads,
                rows // size,
                jnp.maximum(-(-jnp.max(kept.count) // _BLOCKS), 1),
            ),
            in_specs=[
                pl.BlockSpec((None, 1, size), lambda b, h, r, i, *_: (b, 0, r)),
                queries,
                [vectors] * 2,
                [factors] * len(scales),
            ],
            out_specs=[
                queries,
                pl.BlockSpec((None, None, 1, size), lambda b, h, r, i, *_: (b, h, 0, r)),
            ],
            scratch_shapes=[
                pltpu.VMEM((size, head_dim), jnp.float32),
                pltpu.VMEM((size, 1), jnp.float32),
                pltpu.VMEM((size, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="attend_to_kept_blocks",
    )(
        kept.ids,
        kept.count,
        kept.whole,
        stop,
        q,
        [[x] * _BLOCKS for x in stores],
        [[x] * _BLOCKS for x in scales],
    )
    return Partial(values=values, lse=lse[:, :, 0])


def _kernel(
    heads, order, ids, count, whole, stop, q, stores, scales, values, lse, acc, sum_exp, running_max
):
    """Processes one block of query rows and a step of key blocks, for one KV head.

    Args:
      heads: heads in a block of scales.
      order: axes of a head's keys and values, "sd" or "ds" (s: slots, d: head_dim).
      ids, count, whole: refs in SMEM; see KeptBlocks.
      stop: ref [1, rows] slots that each row sees.
      q, values, acc: refs [rows, head_dim].
      stores: refs of keys and of values, one for each block of the step: [TILE, head_dim], or
        [head_dim, TILE] with order "ds".
      scales: none, or the same for scales, [heads, TILE].
      lse: ref [1, rows].
      sum_exp, running_max: refs [rows, 1].
    """
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    first = i * _BLOCKS

    @pl.when(i == 0)
    def start():
        acc[...] = jnp.zeros_like(acc)
        sum_exp[...] = jnp.zeros_like(sum_exp)
        running_max[...] = jnp.full_like(running_max, -jnp.inf)

    def step(masked: bool):
        def scores_of(j):
            scores = einsum(f"rd,{order}->rs", q[...], stores[0][j][...].astype(q.dtype))
            if scales:
                scores *= row_of_tile(scales[0][j][...], jax.lax.rem(h, heads))
            if masked:
                slots = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                slots += ids[b, h, first + j] * TILE
                seen = (slots < stop[...].T) & (first + j < count[b, h])
                scores = jnp.where(seen, scores, -jnp.inf)
            return scores

        scores = jnp.concatenate([scores_of(j) for j in range(_BLOCKS)], axis=1)
        weights, correction, *softmax = update_softmax(scores, sum_exp[...], running_max[...])
        sum_exp[...], running_max[...] = softmax
        added = correction * acc[...]
        for j in range(_BLOCKS):
            part = weights[:, j * TILE : (j + 1) * TILE]
            if scales:
                part *= row_of_tile(scales[1][j][...], jax.lax.rem(h, heads))
            store = stores[1][j][...].astype(q.dtype)
            added += einsum(f"rs,{order}->rd", part.astype(q.dtype), store)
        acc[...] = added

    unmasked = first + _BLOCKS <= whole[b, h]
    pl.when(unmasked)(functools.partial(step, masked=False))
    pl.when((first < count[b, h]) & ~unmasked)(functools.partial(step, masked=True))

    @pl.when(i == pl.num_programs(3) - 1)
    def finish():
        seen = sum_exp[...] > 0
        values[...] = acc[...] / jnp.where(seen, sum_exp[...], 1.0)
        lse[...] = jnp.where(seen, running_max[...] + jnp.log(sum_exp[...]), -jnp.inf).T
