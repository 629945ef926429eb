"""Decode on a Hopper GPU by Mosaic GPU, the successor of the compiler that `gpu.py` goes through.

A program of four warps reads one split of the keys of a row and KV head. Blocks of keys and values
come into shared memory by TMA, one ahead of the block in use. int8 is widened in registers and put
back as bfloat16, from where wgmma multiplies it. Keys, and channels of values, are the rows of the
products, which have at least 64; queries are the columns, of which 16 do. XLA merges the splits.
Source: jax/experimental/pallas/ops/gpu/attention_mgpu.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lsjax.attention.partial import Partial, from_sums, update_softmax

# Smallest and largest number of queries, which are padded to a power of 2. As bfloat16 they are 32
# bytes, the least that is swizzled, to 128, the most.
_FEWEST, _MOST = 16, 64
# Keys that a program reads at a time, and how many such blocks its shared memory holds.
_BLOCK, _STAGES = 64, 2
# Programs that run concurrently: an H100 has 132 multiprocessors, each with shared memory for two.
_PROGRAMS = 264
_HEAD_DIMS = (64, 128)
# Parts of JAX's device_kind.
_HOPPER = ("H100", "H20", "H800")


def on_hopper() -> bool:
    """Returns whether the GPU compiled for has wgmma, which others before and after it have not."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return any(name in device.device_kind for name in _HOPPER)


def takes(q: jax.Array, k: jax.Array) -> bool:
    """Returns whether `decode` supports these queries and keys on the GPU compiled for."""
    return (
        on_hopper()
        and q.dtype == jnp.bfloat16
        and k.dtype in (jnp.int8, jnp.bfloat16)
        and q.shape[2] * q.shape[3] <= _MOST
        and q.shape[4] in _HEAD_DIMS
        and k.shape[2] % _BLOCK == 0
    )


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    begin: jax.Array,
    end: jax.Array,
    interpret: Any = None,
) -> Partial:
    """Computes attention of a few queries per row and head to their slots begin <= s < end.

    Key blocks that none of a row's queries see are not read.

    Args:
      q: [batch, kv_heads, group, length, head_dim] bfloat16, already scaled by 1/sqrt(head_dim); at
        most 64 queries per KV head, of 64 or 128 channels.
      k, v: [batch, kv_heads, capacity, head_dim], int8 or bfloat16; 64 divides the capacity.
      k_scale, v_scale: [batch, kv_heads, capacity] scales of int8 keys and values, else None.
      begin, end: [batch, length] int32 slot range of each query; slots past the capacity are
        ignored.
      interpret: parameters of Pallas' interpreter for Mosaic GPU, or None to compile.

    Returns:
      Partial with float32 values [batch, kv_heads, group, length, head_dim].
    """
    batch, kv_heads, group, length, head_dim = q.shape
    queries, capacity = group * length, k.shape[2]
    columns = max(_FEWEST, pl.next_power_of_2(queries))
    splits = min(pl.cdiv(_PROGRAMS, batch * kv_heads), capacity // _BLOCK)

    def padded(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, columns - queries)
        return jnp.pad(x, widths)

    begin, end = (jnp.tile(jnp.clip(x, 0, capacity), (1, group)) for x in (begin, end))
    sees = begin < end
    first = jnp.min(jnp.where(sees, begin, capacity), axis=1) // _BLOCK
    last = jnp.maximum(first, pl.cdiv(jnp.max(jnp.where(sees, end, 0), axis=1), _BLOCK))
    share = pl.cdiv(last - first, splits)

    scales = None if k_scale is None else (k_scale, v_scale)
    q_rows = padded(q.reshape(batch, kv_heads, queries, head_dim), 2)
    bounds, blocks = (padded(begin, 1), padded(end, 1)), (first, last, share)
    shape = batch, kv_heads, splits
    values, lse = plgpu.kernel(
        _kernel,
        out_type=[
            jax.ShapeDtypeStruct((*shape, head_dim, columns), jnp.float32),
            jax.ShapeDtypeStruct((*shape, columns), jnp.float32),
        ],
        scratch_types=_scratch(columns, head_dim, k.dtype, getattr(k_scale, "dtype", None)),
        grid=shape,
        grid_names=("batch", "head", "split"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup  # which infers layouts
        ),
        kernel_name="decode_attention",
        interpret=interpret,
    )(q_rows, (k, v), scales, bounds, blocks)
    merged = _merged(jnp.swapaxes(values, 3, 4)[:, :, :, :queries], lse[..., :queries])
    return jax.tree.map(lambda x: x.reshape(*q.shape[:4], *x.shape[3:]), merged)


def _scratch(
    columns: int, head_dim: int, dtype: jnp.dtype, scale_dtype: jnp.dtype | None
) -> dict[str, Any]:
    """Returns what `_kernel` holds in shared memory, by the names of its parameters."""

    def tiled(*shape: int, dtype: jnp.dtype = jnp.bfloat16, width: int = 128) -> Any:
        """As products and TMA read it: in tiles of 8 rows, of `width` bytes if rows are as long."""
        itemsize = jnp.dtype(dtype).itemsize
        width = min(width, shape[-1] * itemsize)
        tiling = plgpu.TilingTransform((8, width // itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))

    is_int8 = dtype == jnp.int8
    # Tiles of both operands of a product have one width. Those of weights are as wide as a row.
    width = columns * jnp.dtype(jnp.bfloat16).itemsize
    stored = functools.partial(tiled, _STAGES, _BLOCK, head_dim, dtype=dtype)
    widened = functools.partial(tiled, _BLOCK, head_dim)
    arrived = plgpu.Barrier(num_arrivals=2 if is_int8 else 1, num_barriers=_STAGES)
    return {
        "q": tiled(columns, head_dim),
        "stored": (stored(), stored() if is_int8 else stored(width=width)),
        "scales": (plgpu.SMEM((_STAGES, _BLOCK), scale_dtype),) * 2 if is_int8 else None,
        "widened": (widened(), widened(width=width)) if is_int8 else None,
        "weights": tiled(_BLOCK, columns),
        "bounds": (plgpu.SMEM((columns,), jnp.int32),) * 2,
        "values": tiled(head_dim, columns, dtype=jnp.float32),
        "lse": plgpu.SMEM((columns,), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=3),
        "arrived": (arrived, arrived),
    }


def _kernel(
    q_ref,
    stored_refs,
    scale_refs,
    bound_refs,
    block_refs,
    values_ref,
    lse_ref,
    *,
    q,
    stored,
    scales,
    widened,
    weights,
    bounds,
    values,
    lse,
    ready,
    arrived,
) -> None:
    """Computes the Partial of one split of one row and KV head; pairs are of keys and values."""
    b, h, split = (jax.lax.axis_index(name) for name in ("batch", "head", "split"))
    first, last, share = (ref[b] for ref in block_refs)
    start = first + split * share
    stop = jnp.minimum(start + share, last)

    def fetch(i: jax.Array) -> None:
        stage, at = jax.lax.rem(i - start, _STAGES), pl.ds(i * _BLOCK, _BLOCK)
        for j in range(2):
            barrier = arrived[j].at[stage]
            plgpu.copy_gmem_to_smem(stored_refs[j].at[b, h, at], stored[j].at[stage], barrier)
            if scales is not None:
                plgpu.copy_gmem_to_smem(scale_refs[j].at[b, h, at], scales[j].at[stage], barrier)

    def product(x, y) -> jax.Array:
        def run(acc):
            plgpu.wgmma(acc, x, y)
            return acc[...]

        return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))

    def arrival(j: int, stage: jax.Array):
        """Waits for a block; returns it as floats, and its scales per key."""
        plgpu.barrier_wait(arrived[j].at[stage])
        block = stored[j].at[stage]
        if scales is None:
            return block, None
        widened[j][...] = block[...].astype(jnp.bfloat16)
        return widened[j], scales[j][stage].astype(jnp.float32)

    def over(x: jax.Array, like: jax.Array, axis: int) -> jax.Array:
        return jax.lax.broadcast_in_dim(x, like.shape, (axis,))

    def step(i, state):
        acc, sum_exp, running_max = state
        stage = jax.lax.rem(i - start, _STAGES)
        plgpu.commit_smem()  # no warp reads any longer what the next block replaces
        pl.when(i + _STAGES - 1 < stop)(lambda: fetch(i + _STAGES - 1))
        k, k_scale = arrival(0, stage)
        plgpu.commit_smem()
        scores = product(k, q.T)
        if k_scale is not None:
            scores *= over(k_scale, scores, 0)
        slot = i * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        visible = (slot >= over(begin, scores, 1)) & (slot < over(end, scores, 1))
        scores = jnp.where(visible, scores, -jnp.inf)
        weight, correction, *softmax = update_softmax(scores, sum_exp, running_max, axis=0)
        v, v_scale = arrival(1, stage)
        if v_scale is not None:
            weight *= over(v_scale, weight, 0)
        weights[...] = weight.astype(jnp.bfloat16)
        plgpu.commit_smem()
        acc = over(correction, acc, 1) * acc + product(v.T, weights)
        return acc, *softmax

    for i in range(_STAGES - 1):
        pl.when(start + i < stop)(functools.partial(fetch, start + i))
    plgpu.copy_gmem_to_smem(q_ref.at[b, h], q, ready)
    for src, dst in zip(bound_refs, bounds, strict=True):
        plgpu.copy_gmem_to_smem(src.at[b], dst, ready)
    plgpu.barrier_wait(ready)
    begin, end = (ref[...] for ref in bounds)
    state = jnp.zeros(values.shape), jnp.zeros(lse.shape), jnp.full(lse.shape, -jnp.inf)
    partial = from_sums(*jax.lax.fori_loop(start, stop, step, state), axis=0)
    values[...], lse[...] = partial.values, partial.lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values, values_ref.at[b, h, split])
    plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, h, split])
    plgpu.wait_smem_to_gmem(0)


def _merged(values: jax.Array, lse: jax.Array) -> Partial:
    """Merges Partials [batch, kv_heads, splits, ...] over the splits."""
    nothing = jnp.zeros((*lse.shape[:2], *lse.shape[3:]))
    weights, _, *softmax = update_softmax(lse, nothing, nothing - jnp.inf, axis=2)
    return from_sums(jnp.sum(weights[..., None] * values, axis=2), *softmax)
