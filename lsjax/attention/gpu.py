"""Decode on a GPU: attention of a few queries per row to the KV cache, bound by memory bandwidth.

A Pallas kernel, compiled by Triton. The keys of each row and KV head are divided into splits, one
per program, so that a single row keeps every multiprocessor reading. Each program yields a Partial,
and the Partials are merged. int8 keys and values are dequantized in registers, after the read.
Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lsjax.attention.partial import Partial, from_sums, merge_over_axis, update_softmax

# Bytes of keys, and of values, that a program reads at a time: 64 int8 keys with a head_dim of 128.
# Two such pairs are in flight while a third is processed.
_BLOCK_BYTES = 8192
# Programs that run concurrently: an H100 has 132 multiprocessors, each with room for four.
_PROGRAMS = 528
# Smallest number of rows and keys that a tensor core multiplies; query rows are padded to it.
_TILE = 16


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    begin: jax.Array,
    end: jax.Array,
    interpret: bool = False,
) -> Partial:
    """Computes attention of a few queries per row and head to their slots begin <= s < end.

    Key blocks that none of a row's queries see are not read.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float.
      k_scale, v_scale: [batch, kv_heads, capacity] scales of int8 keys and values, else None.
      begin, end: [batch, length] int32 slot range of each query, not decreasing along length;
        slots past the capacity are ignored.
      interpret: whether to interpret the kernel, slowly, on any device.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].

    Raises:
      ValueError: int8 keys take more than 2 GiB and at most 4 GiB on one device.
    """
    batch, kv_heads, group, length, head_dim = q.shape
    queries = group * length
    capacity = k.shape[2]
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32:
        # Pallas uses int32 offsets, in entries, for arrays of up to 4 GiB.
        raise ValueError(
            f"int8 keys of {k.shape} are {k.size} bytes on one device; a Triton kernel reaches "
            f"no more than {2**31} of them: split the cache over more devices, or its batch"
        )
    block = max(_TILE, _BLOCK_BYTES // (pl.next_power_of_2(head_dim) * k.dtype.itemsize))
    block = min(block, capacity & -capacity)
    splits = min(pl.cdiv(_PROGRAMS, batch * kv_heads), capacity // block)

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h, s: (b, h) + (0,) * len(shape))

    def of_split(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda b, h, s: (b, h, s, *zeros))

    of_row = pl.BlockSpec((None, queries), lambda b, h, s: (b, 0))
    keys, scales = of_head(capacity, head_dim), of_head(capacity)
    shape = (batch, kv_heads, splits, queries)
    q_rows = q.reshape(batch, kv_heads, queries, head_dim)
    begin, end = (jnp.tile(x, (1, group)) for x in (begin, end))
    values, lse = pl.pallas_call(
        functools.partial(_kernel, block=block, splits=splits),
        grid=(batch, kv_heads, splits),
        in_specs=[
            of_head(queries, head_dim),
            keys,
            keys,
            None if k_scale is None else scales,
            None if v_scale is None else scales,
            of_row,
            of_row,
        ],
        out_specs=[of_split(queries, head_dim), of_split(queries)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(q_rows, k, v, k_scale, v_scale, begin, end)
    merge = functools.partial(merge_over_axis, axis_name="split")
    partials = Partial(values=values, lse=lse)
    merged = jax.vmap(merge, in_axes=2, out_axes=None, axis_name="split")(partials)
    return jax.tree.map(lambda x: x.reshape(*q.shape[:4], *x.shape[3:]), merged)


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    k_scale_ref,
    v_scale_ref,
    begin_ref,
    end_ref,
    values_ref,
    lse_ref,
    *,
    block: int,
    splits: int,
) -> None:
    """Computes the Partial of one split of one row and KV head."""
    queries, head_dim = q_ref.shape
    rows = max(_TILE, pl.next_power_of_2(queries))
    columns = pl.next_power_of_2(head_dim)
    is_query = jnp.arange(rows) < queries
    in_head = (jnp.arange(columns) < head_dim)[None, :]
    q_at = (pl.ds(0, rows), pl.ds(0, columns))
    q = plgpu.load(q_ref.at[q_at], mask=is_query[:, None] & in_head, other=0)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    capacity = k_ref.shape[0]
    begin = plgpu.load(begin_ref.at[pl.ds(0, rows)], mask=is_query, other=capacity)
    end = plgpu.load(end_ref.at[pl.ds(0, rows)], mask=is_query, other=0)
    sees = begin < end
    first = jnp.clip(jnp.min(jnp.where(sees, begin, capacity)), 0, capacity) // block
    last = pl.cdiv(jnp.clip(jnp.max(jnp.where(sees, end, 0)), 0, capacity), block)
    last = jnp.maximum(first, last)
    share = pl.cdiv(last - first, splits)
    start = first + pl.program_id(2) * share

    def read(ref, at):
        whole = columns == head_dim
        mask = None if whole else jnp.broadcast_to(in_head, (block, columns))
        x = plgpu.load(ref.at[at, pl.ds(0, columns)], mask=mask, other=None if whole else 0)
        return x.astype(q.dtype)

    def step(i, state):
        acc, sum_exp, running_max = state
        at = pl.ds(i * block, block)
        scores = _dot(q, read(k_ref, at).T, precision)
        if k_scale_ref is not None:
            scores *= k_scale_ref[at].astype(jnp.float32)[None, :]
        slots = i * block + jnp.arange(block)
        visible = (slots >= begin[:, None]) & (slots < end[:, None])
        scores = jnp.where(visible, scores, -jnp.inf)
        weights, correction, *softmax = update_softmax(scores, sum_exp, running_max)
        if v_scale_ref is not None:
            weights *= v_scale_ref[at].astype(jnp.float32)[None, :]
        acc = correction[:, None] * acc + _dot(weights.astype(q.dtype), read(v_ref, at), precision)
        return acc, *softmax

    zeros = jnp.zeros((rows, columns), jnp.float32)
    state = (zeros, jnp.zeros(rows, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32))
    state = jax.lax.fori_loop(start, jnp.minimum(start + share, last), step, state)
    partial = from_sums(*state)
    plgpu.store(values_ref.at[q_at], partial.values, mask=is_query[:, None] & in_head)
    plgpu.store(lse_ref.at[pl.ds(0, rows)], partial.lse, mask=is_query)


def _dot(a: jax.Array, b: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
