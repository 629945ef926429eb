"""Attention over a store on TPU: one Pallas kernel for decode and prefill, int8 and float.

A kernel reads its operands where they lie: the layout in which a token is written is the one in
which keys are multiplied, int8 is widened after it reaches VMEM, and HBM never holds a copy. That
layout is XLA's own for the store's shape: head_dim minor where it is a multiple of the 128 lanes,
else the capacity minor, which needs no padding.
Source: FlashAttention (arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lsjax.attention.partial import Partial
from lsjax.precision import einsum

_LANES = 128
_VMEM = 32 * 2**20  # bytes of a core's for one kernel, within every generation's since v4


@functools.partial(jax.jit, static_argnames="interpret")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    begin: jax.Array,
    end: jax.Array,
    interpret: bool = False,
) -> Partial:
    """Attention of each query to a range of slots.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16 or float32, already scaled by
        1/sqrt(head_dim).
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float; capacity is a power of two or a
        multiple of 128.
      k_scale, v_scale: [batch, kv_heads, capacity] bfloat16, what int8 is to be multiplied by;
        None for float.
      begin, end: [batch, length] int32: a query sees the slots begin <= slot < end, those of them
        that there are.
      interpret: evaluate the kernel in plain JAX, on a machine without a TPU.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    batch, kv_heads, group, length, head_dim = q.shape
    # All queries of a KV head are rows of one product, token by token: its keys are read once.
    rows = length * group
    heads, size, keys = _block_sizes(kv_heads, rows, head_dim, k)
    pad = -rows % size
    q = q.swapaxes(2, 3).reshape(batch, kv_heads, rows, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    bounds = jnp.clip(jnp.stack([begin, end], axis=1), 0, k.shape[2])
    bounds = jnp.repeat(bounds, group, axis=2)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, pad)), mode="edge")
    spans = first, stop, _, _ = _spans(bounds, size, keys)

    capacity_minor = head_dim % _LANES != 0
    if capacity_minor:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    kept = [x for x in (k, v, k_scale, v_scale) if x is not None]
    if not interpret:
        # Left to itself XLA may first bring all of a store into VMEM, of which queries see little.
        kept = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in kept]
    k, v, *scales = kept

    def of_rows(b, h, r, i, *_):
        return b, h, r

    def of_keys(b, h, r, i, first, stop, *_):
        # A step past the last block names it again, and fetches nothing.
        return b, h, jnp.maximum(jnp.minimum(first[b, r] + i, stop[b, r] - 1), 0)

    def vectors_of_keys(*at):
        b, h, block = of_keys(*at)
        return (b, h, 0, block) if capacity_minor else (b, h, block, 0)

    of_store = (head_dim, keys) if capacity_minor else (keys, head_dim)
    store = pl.BlockSpec((None, heads, *of_store), vectors_of_keys)
    queries = pl.BlockSpec((None, heads, size, head_dim), lambda *at: (*of_rows(*at), 0))
    values, lse = pl.pallas_call(
        functools.partial(_kernel, keys, "ds" if capacity_minor else "sd"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(spans),
            # As many steps as the longest span needs, however much the store could hold.
            grid=(
                batch,
                kv_heads // heads,
                (rows + pad) // size,
                jnp.maximum(jnp.max(stop - first), 1),
            ),
            in_specs=[
                pl.BlockSpec((None, 2, size), lambda b, h, r, i, *_: (b, 0, r)),
                queries,
                store,
                store,
                [pl.BlockSpec((None, heads, keys), of_keys)] * len(scales),
            ],
            out_specs=[queries, pl.BlockSpec((None, heads, size), of_rows)],
            scratch_shapes=[
                pltpu.VMEM((heads, size, head_dim), jnp.float32),
                pltpu.VMEM((heads, size, 1), jnp.float32),
                pltpu.VMEM((heads, size, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=interpret,
        name="attend",
    )(*spans, bounds, q, k, v, scales)

    def by_query(x: jax.Array) -> jax.Array:
        x = x[:, :, :rows].reshape(batch, kv_heads, length, group, *x.shape[3:])
        return x.swapaxes(2, 3)

    return Partial(values=by_query(values), lse=by_query(lse))


def _block_sizes(kv_heads: int, rows: int, head_dim: int, k: jax.Array) -> tuple[int, int, int]:
    """KV heads, rows of queries and keys of a block.

    What a block holds stays, with the second buffers of the pipeline, under _VMEM.
    """
    # The scales stand head by head in tiles of 8: a block has all heads or whole tiles of them.
    heads = 8 if kv_heads % 8 == 0 else kv_heads
    width = -(-head_dim // _LANES) * _LANES
    # 1 MiB of accumulated values; with queries and output, each twice, some 5 MiB.
    size = min(max(_power_of_two(2**18 // (heads * width)), _LANES), 512)
    size = min(size, -(-rows // 16) * 16)  # tiles of bfloat16 are 16 rows high
    # 1 MiB of keys and as much of values: a transfer long enough to hide a step's fixed cost. And
    # at most 1 MiB of scores of a head, which live with the weights made of them.
    keys = 2**20 // (heads * head_dim * k.dtype.itemsize)
    keys = max(_power_of_two(min(keys, 2**18 // size)), _LANES)
    return heads, size, min(keys, k.shape[2] & -k.shape[2])


def _power_of_two(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << n.bit_length() - 1


def _spans(bounds: jax.Array, size: int, keys: int) -> tuple[jax.Array, ...]:
    """What the rows of a block see, each [batch, row blocks] int32.

    Returns:
      The first block of keys that some row sees, the one after the last such, and the first slot
      and the one after the last that all rows see.
    """
    batch, _, rows = bounds.shape
    begin, end = jnp.moveaxis(bounds.reshape(batch, 2, rows // size, size), 1, 0)
    first, stop = jnp.min(begin, axis=-1) // keys, -(-jnp.max(end, axis=-1) // keys)
    return first, stop, jnp.max(begin, axis=-1), jnp.min(end, axis=-1)


def _kernel(
    keys,
    order,
    first,
    stop,
    all_begin,
    all_end,
    bounds,
    q,
    k,
    v,
    scales,
    values,
    lse,
    weighted,
    total,
    highest,
):
    """One block of queries and one of keys, of some heads.

    Refs: of [batch, row blocks] in SMEM, what _spans gives; bounds [2, rows];
    q, values, weighted [heads, rows, head_dim]; k, v [heads, keys, head_dim], or the last two
    swapped, as order says; scales, none or two of [heads, keys]; lse [heads, rows];
    total, highest [heads, rows, 1].
    """
    b, r, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, r] + i
    slot = block * keys
    whole = (all_begin[b, r] <= slot) & (slot + keys <= all_end[b, r])

    def each_head(body):
        # Unrolled, heads overlap, which the short chains of a decode step need; the long ones of
        # a prefill do not, and would take long to compile.
        jax.lax.fori_loop(0, q.shape[0], lambda h, _: body(h), None, unroll=q.shape[1] < _LANES)

    @pl.when(i == 0)
    def start():
        weighted[...] = jnp.zeros_like(weighted)
        total[...] = jnp.zeros_like(total)
        highest[...] = jnp.full_like(highest, -jnp.inf)

    def step(visible=None):
        @each_head
        def attend_to_block(h):
            scores = einsum(f"rd,{order}->rs", q[h], k[h].astype(q.dtype))
            if scales:
                scores *= _row(scales[0][...], h)
            if visible is not None:
                scores = jnp.where(visible, scores, -jnp.inf)
            new = jnp.maximum(highest[h], jnp.max(scores, axis=1, keepdims=True))
            finite = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp(scores - finite)
            keep = jnp.exp(highest[h] - finite)
            highest[h] = new
            total[h] = keep * total[h] + jnp.sum(weights, axis=1, keepdims=True)
            if scales:
                weights *= _row(scales[1][...], h)
            added = einsum(f"rs,{order}->rd", weights.astype(q.dtype), v[h].astype(q.dtype))
            weighted[h] = keep * weighted[h] + added

    @pl.when((block < stop[b, r]) & whole)
    def inside():
        step()

    @pl.when((block < stop[b, r]) & ~whole)
    def at_edge():
        begin, end = jnp.split(bounds[...].T, 2, axis=1)
        slots = slot + jax.lax.broadcasted_iota(jnp.int32, (q.shape[1], keys), 1)
        step((begin <= slots) & (slots < end))

    @pl.when(i == pl.num_programs(3) - 1)
    def finish():
        @each_head
        def normalise(h):
            seen = total[h] > 0
            values[h] = weighted[h] / jnp.where(seen, total[h], 1.0)
            lse[pl.ds(h, 1)] = jnp.where(seen, highest[h] + jnp.log(total[h]), -jnp.inf).T


def _row(x: jax.Array, h: jax.Array) -> jax.Array:
    """[1, n] float32, row h of x: a bfloat16 tile has no row at an index known only in the loop."""
    here = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == h
    return jnp.sum(jnp.where(here, x.astype(jnp.float32), 0.0), axis=0, keepdims=True)
