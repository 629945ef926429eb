"""Attention over a KV cache on TPU: one Pallas kernel for decode and prefill, int8 and float.

The kernel reads its operands in place: keys are multiplied in the layout in which tokens are
written, int8 is converted after it reaches VMEM, and HBM never holds a copy. That layout is XLA's
own for the cache's shape: head_dim is minor if it is a multiple of the 128 lanes; otherwise the
capacity is minor, which needs no padding.
Source: FlashAttention (arXiv 2205.14135).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lsjax.attention.partial import Partial, update_softmax
from lsjax.runtime.precision import einsum

LANES = 128
VMEM = 32 * 2**20  # bytes of VMEM for one kernel; every core since v4 has that much


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
    """Computes attention of each query to a range of slots.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16 or float32, already scaled by
        1/sqrt(head_dim).
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float; capacity is a power of two or a
        multiple of 128.
      k_scale, v_scale: [batch, kv_heads, capacity] bfloat16 scales of int8 keys and values; None
        for float.
      begin, end: [batch, length] int32; each query sees the slots begin <= slot < end that exist.
      interpret: whether to evaluate the kernel in plain JAX, without a TPU.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].
    """
    batch, kv_heads, group, length, head_dim = q.shape
    # All queries of a KV head are rows of one matmul, token by token, so its keys are read once.
    rows = length * group
    heads, size, keys = _block_sizes(kv_heads, rows, head_dim, k)
    pad = -rows % size
    q = q.swapaxes(2, 3).reshape(batch, kv_heads, rows, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    bounds = jnp.clip(jnp.stack([begin, end], axis=1), 0, k.shape[2])
    bounds = jnp.repeat(bounds, group, axis=2)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, pad)), mode="edge")
    spans = first, stop, _, _ = _spans(bounds, size, keys)

    capacity_minor = head_dim % LANES != 0
    if capacity_minor:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    kept = [x for x in (k, v, k_scale, v_scale) if x is not None]
    if not interpret:
        # Otherwise XLA may first copy a whole cache into VMEM, though queries see little of it.
        kept = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in kept]
    k, v, *scales = kept

    def of_rows(b, h, r, i, *_):
        return b, h, r

    def of_keys(b, h, r, i, first, stop, *_):
        # A step past the last block repeats its index, so nothing is fetched.
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
            # As many steps as the longest span needs, regardless of the capacity.
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
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
        name="attend",
    )(*spans, bounds, q, k, v, scales)

    def by_query(x: jax.Array) -> jax.Array:
        x = x[:, :, :rows].reshape(batch, kv_heads, length, group, *x.shape[3:])
        return x.swapaxes(2, 3)

    return Partial(values=by_query(values), lse=by_query(lse))


def _block_sizes(kv_heads: int, rows: int, head_dim: int, k: jax.Array) -> tuple[int, int, int]:
    """Returns the KV heads, query rows and keys per block.

    A block's data, including the pipeline's second buffers, stays under VMEM.
    """
    # Scales are tiled by 8 heads: a block has all heads or a whole tile of them.
    heads = 8 if kv_heads % 8 == 0 else kv_heads
    width = -(-head_dim // LANES) * LANES
    # 1 MiB of accumulated values; about 5 MiB with queries and output, each double-buffered.
    size = min(max(_power_of_two(2**18 // (heads * width)), LANES), 512)
    size = min(size, -(-rows // 16) * 16)  # tiles of bfloat16 are 16 rows high
    # 1 MiB of keys and 1 MiB of values: a transfer long enough to hide a step's fixed cost. And at
    # most 1 MiB of scores per head, which coexist with the softmax weights computed from them.
    keys = 2**20 // (heads * head_dim * k.dtype.itemsize)
    keys = max(_power_of_two(min(keys, 2**18 // size)), LANES)
    return heads, size, min(keys, k.shape[2] & -k.shape[2])


def _power_of_two(n: int) -> int:
    """Returns the largest power of two up to n."""
    return 1 << n.bit_length() - 1


def _spans(bounds: jax.Array, size: int, keys: int) -> tuple[jax.Array, ...]:
    """Summarizes the slot ranges of the rows of each row block.

    Returns:
      Four arrays [batch, row blocks] int32: the first key block that some row sees, one past the
      last such block, the first slot that all rows see, and one past the last such slot.
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
    acc,
    sum_exp,
    running_max,
):
    """Processes one block of query rows and one block of keys, for some KV heads.

    Args:
      keys: number of keys per block.
      order: axes of a head's keys and values, "sd" or "ds" (s: slots, d: head_dim).
      first, stop, all_begin, all_end: refs [batch, row blocks] in SMEM, results of _spans.
      bounds: ref [2, rows], begin and end of each row.
      q, values, acc: refs [heads, rows, head_dim].
      k, v: refs [heads, keys, head_dim], or [heads, head_dim, keys] with order "ds".
      scales: none or two refs [heads, keys].
      lse: ref [heads, rows].
      sum_exp, running_max: refs [heads, rows, 1].
    """
    b, r, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    block = first[b, r] + i
    slot = block * keys
    whole = (all_begin[b, r] <= slot) & (slot + keys <= all_end[b, r])

    def each_head(body):
        # Unrolling lets heads overlap. The short dependency chains of a decode step need that; the
        # long ones of prefill do not, and unrolling them would take long to compile.
        jax.lax.fori_loop(0, q.shape[0], lambda h, _: body(h), None, unroll=q.shape[1] < LANES)

    @pl.when(i == 0)
    def start():
        acc[...] = jnp.zeros_like(acc)
        sum_exp[...] = jnp.zeros_like(sum_exp)
        running_max[...] = jnp.full_like(running_max, -jnp.inf)

    def step(visible=None):
        @each_head
        def attend_to_block(h):
            scores = einsum(f"rd,{order}->rs", q[h], k[h].astype(q.dtype))
            if scales:
                scores *= row_of_tile(scales[0][...], h)
            if visible is not None:
                scores = jnp.where(visible, scores, -jnp.inf)
            weights, correction, *softmax = update_softmax(scores, sum_exp[h], running_max[h])
            sum_exp[h], running_max[h] = softmax
            if scales:
                weights *= row_of_tile(scales[1][...], h)
            added = einsum(f"rs,{order}->rd", weights.astype(q.dtype), v[h].astype(q.dtype))
            acc[h] = correction * acc[h] + added

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
        def normalize(h):
            seen = sum_exp[h] > 0
            values[h] = acc[h] / jnp.where(seen, sum_exp[h], 1.0)
            lse[pl.ds(h, 1)] = jnp.where(seen, running_max[h] + jnp.log(sum_exp[h]), -jnp.inf).T


def row_of_tile(x: jax.Array, h: jax.Array) -> jax.Array:
    """Returns row h of x as [1, n] float32, by a masked sum.

    A row of a bfloat16 tile cannot be indexed with a value known only inside the loop.
    """
    here = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == h
    return jnp.sum(jnp.where(here, x.astype(jnp.float32), 0.0), axis=0, keepdims=True)
