"""Decode on a GPU: attention of a few queries per row to the KV cache, bound by memory bandwidth.

A Pallas kernel, compiled by Triton. The keys of each row and KV head are divided into splits, one
per program, so that a single row keeps every multiprocessor reading. Each program yields a Partial,
and a second kernel merges them. int8 keys and values are read as pairs of channels and dequantized
in registers: even and odd channels are two products. A block of float keys beside a quantized cache
is a few splits more.
Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lsjax.attention.partial import Partial, from_sums, update_softmax

# Bytes of keys, and of values, that a program reads at a time: 64 int8 keys with a head_dim of 128.
# Two such pairs are in flight while a third is processed.
_BLOCK_BYTES = 8192
# Programs that run concurrently: an H100 has 132 multiprocessors, each with room for four.
_PROGRAMS = 528
# Smallest number of rows and keys that a tensor core multiplies; query rows are padded to it.
_TILE = 16
# Float keys beside a quantized cache that are one split.
_NEAR_KEYS = 256
# Splits that are merged at a time.
_MERGED = 32

# Widens the low bytes of two int16 to bfloat16, exactly: an integer x of 7 bits is
# bfloat16(x | 0x4300) - 128, and the bit of the sign weighs -128. Ampere can fma pairs of bfloat16,
# and only Hopper can sub them.
_WIDEN_LOW = """{ .reg .b32 a, b, one;
lop3.b32 a, $1, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 b, $1, 0x00800080, 0xC300C300, 0xEA;
mov.b32 one, 0x3F803F80;
fma.rn.bf16x2 $0, a, one, b; }"""
# The same of the high bytes.
_WIDEN_HIGH = """{ .reg .b32 a, b, c, one;
shr.u32 c, $1, 8;
lop3.b32 a, c, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 b, c, 0x00800080, 0xC300C300, 0xEA;
mov.b32 one, 0x3F803F80;
fma.rn.bf16x2 $0, a, one, b; }"""


class Slots(NamedTuple):
    """Keys and values, and what each query sees of them.

    Attributes:
      k, v: [batch, kv_heads, capacity, head_dim], int8 or float.
      k_scale, v_scale: [batch, kv_heads, capacity] scales of int8 keys and values, else None.
      begin, end: [batch, length] int32 slot range of each query; slots past the capacity are
        ignored.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    begin: jax.Array
    end: jax.Array


def decode(
    q: jax.Array,
    slots: Slots,
    near: Slots | None = None,
    dtype: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> Partial:
    """Computes attention of a few queries per row and head to their slots begin <= s < end.

    Key blocks that none of a row's queries see are not read.

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      slots: the cache.
      near: float keys and values that are attended to as well, or None.
      dtype: dtype of the result's values.
      interpret: whether to interpret the kernels, slowly, on any device.

    Returns:
      Partial with values [batch, kv_heads, group, length, head_dim].

    Raises:
      ValueError: int8 keys take more than 2 GiB and at most 4 GiB on one device.
    """
    batch, kv_heads, group, length, head_dim = q.shape
    queries, k = group * length, slots.k
    check_addressable(k)
    block = _block(k)
    splits = min(pl.cdiv(_PROGRAMS, batch * kv_heads), k.shape[2] // block)
    near_splits = 0 if near is None else pl.cdiv(near.k.shape[2], _NEAR_KEYS)

    def of_head(x: jax.Array | None) -> pl.BlockSpec | None:
        if x is None:
            return None
        zeros = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, s: (b, h, *zeros))

    def of_split(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, None, *shape), lambda b, h, s: (b, h, s, *zeros))

    parts = num_parts(k)

    def prepared(slots: Slots | None) -> Slots | None:
        if slots is None:
            return None
        begin, end = (jnp.tile(x, (1, group)) for x in (slots.begin, slots.end))
        k, v = (stored_parts(x, parts) for x in (slots.k, slots.v))
        return Slots(k, v, slots.k_scale, slots.v_scale, begin, end)

    def specs(slots: Slots | None) -> Slots | None:
        if slots is None:
            return None
        of_row = pl.BlockSpec((None, queries), lambda b, h, s: (b, 0))
        return Slots(*map(of_head, slots[:4]), of_row, of_row)

    q_rows = by_part(q.reshape(batch, kv_heads, queries, head_dim), parts)
    far, near = prepared(slots), prepared(near)
    shape = (batch, kv_heads, splits + near_splits, queries)
    kernel = functools.partial(
        _kernel, block=block, splits=splits, near_splits=near_splits, interpret=interpret
    )
    values, lse = pl.pallas_call(
        kernel,
        grid=shape[:3],
        in_specs=[of_head(q_rows), specs(far), specs(near)],
        out_specs=[of_split(*q_rows.shape[2:]), of_split(queries)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, *q_rows.shape[3:]), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(q_rows, far, near)
    merged = _merged(values.reshape(*shape, head_dim), lse, dtype, interpret)
    return jax.tree.map(lambda x: x.reshape(*q.shape[:4], *x.shape[3:]), merged)


def check_addressable(k: jax.Array) -> None:
    """Refuses keys that a kernel cannot address; see decode."""
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32:
        # Pallas uses int32 offsets, in entries, for arrays of up to 4 GiB.
        raise ValueError(
            f"int8 keys of {k.shape} are {k.size} bytes on one device; a Triton kernel reaches "
            f"no more than {2**31} of them: split the cache over more devices, or its batch"
        )


def num_parts(k: jax.Array) -> int:
    """Returns the parts of the channels that are read as one: even and odd ones of int8."""
    return 2 if k.dtype == jnp.int8 else 1


def by_part(x: jax.Array, parts: int) -> jax.Array:
    """Splits the axis of channels, [..., head_dim] -> [..., head_dim / parts, parts]."""
    return x.reshape(*x.shape[:-1], -1, parts)


def stored_parts(x: jax.Array, parts: int) -> jax.Array:
    """Returns keys or values as `read_parts` takes them; pairs of int8 are int16."""
    x = by_part(x, parts)
    return jax.lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.int8 else x


def read_parts(ref, at: pl.Slice, parts: int, dtype: jnp.dtype, interpret: bool) -> list[jax.Array]:
    """Reads slots of a head's keys or values, of which `stored_parts` are given.

    Returns:
      For each part [slots, channels] in `dtype`, zeros behind the last channel.
    """
    channels = ref.shape[1]
    columns = pl.next_power_of_2(channels)
    whole, here = columns == channels, (at, pl.ds(0, columns))
    mask = None
    if not whole:
        mask = jnp.broadcast_to((jnp.arange(columns) < channels)[None, :], (at.size, columns))
    load = functools.partial(plgpu.load, mask=mask, other=None if whole else 0)
    if ref.dtype == jnp.int16:
        return _widened(load(ref.at[here]), dtype, interpret)
    return [load(ref.at[*here, jnp.int32(i)]).astype(dtype) for i in range(parts)]


def _block(k: jax.Array) -> int:
    """Returns how many keys a program reads at a time."""
    capacity, head_dim = k.shape[2:]
    block = max(_TILE, _BLOCK_BYTES // (pl.next_power_of_2(head_dim) * k.dtype.itemsize))
    return min(block, capacity & -capacity)


def _kernel(
    q_ref,
    far: Slots,
    near: Slots | None,
    values_ref,
    lse_ref,
    *,
    block: int,
    splits: int,
    near_splits: int,
    interpret: bool,
) -> None:
    """Computes the Partial of one split of one row and KV head.

    Channels of floats have an axis of parts: even and odd ones where int8 is read in pairs.
    """
    queries, channels, parts = q_ref.shape
    rows = max(_TILE, pl.next_power_of_2(queries))
    columns = pl.next_power_of_2(channels)
    is_query = jnp.arange(rows) < queries
    in_head = (jnp.arange(columns) < channels)[None, :]
    part = [jnp.int32(i) for i in range(parts)]
    q_at = [(pl.ds(0, rows), pl.ds(0, columns), i) for i in part]
    q = [plgpu.load(q_ref.at[at], mask=is_query[:, None] & in_head, other=0) for at in q_at]
    dtype = q[0].dtype

    read = functools.partial(read_parts, parts=parts, dtype=dtype, interpret=interpret)

    def attend(slots: Slots, split: jax.Array, splits: int, block: int, state):
        begin, end, start, stop = _share(slots, is_query, split, splits, block)

        def step(i, state):
            *acc, sum_exp, running_max = state
            at = pl.ds(i * block, block)
            scores = sum(dot(x, y.T) for x, y in zip(q, read(slots.k, at), strict=True))
            if slots.k_scale is not None:
                scores *= slots.k_scale[at].astype(jnp.float32)[None, :]
            here = i * block + jnp.arange(block)
            visible = (here >= begin[:, None]) & (here < end[:, None])
            scores = jnp.where(visible, scores, -jnp.inf)
            weights, correction, *softmax = update_softmax(scores, sum_exp, running_max)
            if slots.v_scale is not None:
                weights *= slots.v_scale[at].astype(jnp.float32)[None, :]
            weights = weights.astype(dtype)
            added = [dot(weights, x) for x in read(slots.v, at)]
            acc = [correction[:, None] * x + y for x, y in zip(acc, added, strict=True)]
            return *acc, *softmax

        return jax.lax.fori_loop(start, stop, step, state)

    zeros = jnp.zeros((rows, columns), jnp.float32)
    state = (zeros,) * parts
    state += jnp.zeros(rows, jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    split = pl.program_id(2)
    state = attend(far, split, splits, block, state)
    if near is not None:
        near_block = min(block, near.k.shape[0] & -near.k.shape[0])
        state = attend(near, split - splits, near_splits, near_block, state)
    *acc, sum_exp, running_max = state
    for at, x in zip(q_at, acc, strict=True):
        partial = from_sums(x, sum_exp, running_max)
        plgpu.store(values_ref.at[at], partial.values, mask=is_query[:, None] & in_head)
    plgpu.store(lse_ref.at[pl.ds(0, rows)], partial.lse, mask=is_query)


def _share(
    slots: Slots, is_query: jax.Array, split: jax.Array, splits: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns each query's begin and end, and which blocks this split reads: none if there is no
    such split."""
    capacity, rows = slots.k.shape[0], pl.ds(0, is_query.size)
    begin = plgpu.load(slots.begin.at[rows], mask=is_query, other=capacity)
    end = plgpu.load(slots.end.at[rows], mask=is_query, other=0)
    sees = begin < end
    first = jnp.clip(jnp.min(jnp.where(sees, begin, capacity)), 0, capacity) // block
    last = pl.cdiv(jnp.clip(jnp.max(jnp.where(sees, end, 0)), 0, capacity), block)
    last = jnp.maximum(first, last)
    share = pl.cdiv(last - first, splits)
    start = first + split * share
    stop = jnp.minimum(start + share, last)
    return begin, end, start, jnp.where(split < 0, start, stop)


def _widened(pairs: jax.Array, dtype: jnp.dtype, interpret: bool) -> list[jax.Array]:
    """Converts the low and the high bytes of int16 to floats."""
    if dtype == jnp.bfloat16 and not interpret:
        widen = functools.partial(
            plgpu.elementwise_inline_asm,
            args=[pairs],
            constraints="=r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(pairs.shape, dtype)],
        )
        return [*widen(_WIDEN_LOW), *widen(_WIDEN_HIGH)]
    return [((pairs << 8) >> 8).astype(dtype), (pairs >> 8).astype(dtype)]


def _merged(values: jax.Array, lse: jax.Array, dtype: jnp.dtype, interpret: bool) -> Partial:
    """Merges Partials [batch, kv_heads, splits, queries, ...] over the splits, in one kernel."""
    batch, kv_heads, splits, queries, head_dim = values.shape

    def of_query(*shape: int, axis: int) -> pl.BlockSpec:
        at = [0] * len(shape)

        def index(b, h, i):
            return b, h, *at[:axis], i, *at[axis:]

        return pl.BlockSpec((None, None, *shape[:axis], None, *shape[axis:]), index)

    shape = (batch, kv_heads, queries)
    merged = pl.pallas_call(
        _merge_kernel,
        grid=shape,
        in_specs=[of_query(splits, head_dim, axis=1), of_query(splits, axis=1)],
        out_specs=[of_query(head_dim, axis=0), pl.BlockSpec((None, None, 1), lambda *at: at)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, head_dim), dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="merge_splits",
    )(values, lse)
    return Partial(*merged)


def _merge_kernel(values_ref, lse_ref, merged_ref, merged_lse_ref) -> None:
    """Merges the Partials of one query."""
    splits, head_dim = values_ref.shape
    columns = pl.next_power_of_2(head_dim)
    in_head = jnp.arange(columns) < head_dim

    def step(i, state):
        acc, sum_exp, running_max = state
        at = pl.ds(i * _MERGED, _MERGED)
        exists = i * _MERGED + jnp.arange(_MERGED) < splits
        lse = plgpu.load(lse_ref.at[at], mask=exists, other=-jnp.inf)
        mask = exists[:, None] & in_head[None, :]
        values = plgpu.load(values_ref.at[at, pl.ds(0, columns)], mask=mask, other=0)
        weights, correction, *softmax = update_softmax(lse[None], sum_exp, running_max)
        added = jnp.sum(weights.reshape(_MERGED, 1) * values, axis=0)
        return correction[:, None] * acc + added[None], *softmax

    state = jnp.zeros((1, columns)), jnp.zeros(1), jnp.full(1, -jnp.inf)
    partial = from_sums(*jax.lax.fori_loop(0, pl.cdiv(splits, _MERGED), step, state))
    values = partial.values.reshape(columns).astype(merged_ref.dtype)
    plgpu.store(merged_ref.at[pl.ds(0, columns)], values, mask=in_head)
    merged_lse_ref[...] = partial.lse


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies two matrices of one dtype, in float32 exactly, into float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
