"""A new token of each row on a GPU, all that is done before it attends, in one kernel.

Queries and keys are Hadamard-transformed; keys and values are quantized and written in place, into
the int8 cache and into the block of floats beside it. XLA makes a chain of ten kernels of it, each
of which waits for the one before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lsjax.attention.hadamard import hadamard_signs
from lsjax.attention.kv_array import BYTE_SIZES

_TILE = 16  # smallest number of rows that a tensor core multiplies
# Rows of the transform's matrix that are multiplied at a time: all rows of heads of 256 channels
# would not fit into the shared memory of an L40S.
_MOST_SIGNS = 128


class Stores(NamedTuple):
    """Arrays that a token is written to, [batch, kv_heads, slots, ...].

    Attributes:
      k, k_scale, v, v_scale: int8 cache.
      near_k, near_v: block of floats; keys are Hadamard-transformed.
    """

    k: jax.Array
    k_scale: jax.Array
    v: jax.Array
    v_scale: jax.Array
    near_k: jax.Array
    near_v: jax.Array


def write_token(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    stores: Stores,
    slot: jax.Array,
    near_slot: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, Stores]:
    """Writes one token per row.

    Args:
      q: [batch, kv_heads, group, 1, head_dim].
      k, v: [batch, kv_heads, 1, head_dim].
      stores: arrays to write to, in place.
      slot, near_slot: [batch] slots of the token in the cache and in the block of floats.
      interpret: whether to interpret the kernel, slowly, on any device.

    Returns:
      The Hadamard-transformed queries, in their dtype, and the stores with the token written.
    """
    batch, kv_heads, group, _, head_dim = q.shape
    signs = hadamard_signs(head_dim, q.dtype)

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h: (b, h, *(0 for _ in shape)))

    of_row = pl.BlockSpec((None,), lambda b, h: (b,))
    of_stores = Stores(*(of_head(*x.shape[2:]) for x in stores))
    rows = q.reshape(batch, kv_heads, group, head_dim)
    queries, written = pl.pallas_call(
        _kernel,
        grid=(batch, kv_heads),
        in_specs=[
            *(of_row, of_row, pl.BlockSpec(signs.shape, lambda b, h: (0, 0))),
            *(of_head(group, head_dim), of_head(head_dim), of_head(head_dim)),
            of_stores,
        ],
        out_specs=[of_head(group, head_dim), of_stores],
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, q.dtype),
            Stores(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stores)),
        ],
        input_output_aliases={6 + i: 1 + i for i in range(len(stores))},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_token",
    )(slot, near_slot, signs, rows, k[:, :, 0], v[:, :, 0], stores)
    return queries.reshape(q.shape), written


def _kernel(
    slot_ref, near_slot_ref, signs_ref, q_ref, k_ref, v_ref, _, queries_ref, stores: Stores
) -> None:
    """Writes the token of one row and KV head."""
    group, head_dim = q_ref.shape
    rows, columns = max(_TILE, pl.next_power_of_2(group + 1)), pl.next_power_of_2(head_dim)
    row, channels = jnp.arange(rows), pl.ds(0, columns)
    in_head = jnp.arange(columns) < head_dim
    precision = jax.lax.Precision.HIGHEST if signs_ref.dtype == jnp.float32 else None
    transformed = jnp.zeros((rows, columns), jnp.float32)
    size = columns
    if head_dim > _MOST_SIGNS and head_dim % _TILE == 0:
        size = min(head_dim & -head_dim, _MOST_SIGNS)
    for first in range(0, head_dim, size):
        some, exists = pl.ds(first, size), first + jnp.arange(size) < head_dim
        is_query = (row < group)[:, None] & exists[None, :]
        q = plgpu.load(q_ref.at[pl.ds(0, rows), some], mask=is_query, other=0)
        k = plgpu.load(k_ref.at[some], mask=exists, other=0)
        signs = plgpu.load(
            signs_ref.at[some, channels], mask=exists[:, None] & in_head[None, :], other=0
        )
        # The key is one more row of the queries' product.
        both = jnp.where((row == group)[:, None], k[None, :], q).astype(signs.dtype)
        transformed += jnp.dot(both, signs, precision=precision, preferred_element_type=jnp.float32)
    transformed *= head_dim**-0.5
    is_query = (row < group)[:, None] & in_head[None, :]
    queries = transformed.astype(queries_ref.dtype)
    plgpu.store(queries_ref.at[pl.ds(0, rows), channels], queries, mask=is_query)
    v = plgpu.load(v_ref.at[channels], mask=in_head, other=0).astype(jnp.float32)
    k = jnp.sum(jnp.where((row == group)[:, None], transformed, 0), axis=0)

    def write(ref, at, x):
        inside = in_head & (at < ref.shape[0])
        plgpu.store(ref.at[at, channels], x.astype(ref.dtype), mask=inside)

    slot, near_slot = slot_ref[...], near_slot_ref[...]
    arrays = (k, stores.k, stores.k_scale), (v, stores.v, stores.v_scale)
    for x, data_ref, scale_ref in arrays:
        steps, size = _quantized(x)
        write(data_ref, slot, steps.astype(jnp.int32))
        plgpu.store(scale_ref.at[slot], size.astype(scale_ref.dtype), mask=slot < data_ref.shape[0])
    write(stores.near_k, near_slot, k)
    write(stores.near_v, near_slot, v)


def _quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes [channels] as KVArray.quantize does; returns float32 steps and their size []."""
    largest = jnp.max(jnp.abs(x))
    best, steps, size = jnp.float32(jnp.inf), x, largest
    for ratio in BYTE_SIZES:
        tried = (largest / 127 * ratio).astype(jnp.bfloat16).astype(jnp.float32)
        quotient = x / jnp.where(tried > 0, tried, 1.0)
        rounded = jnp.clip(_rounded(quotient), -127, 127)
        off = (rounded * tried - x) / jnp.where(largest > 0, largest, 1.0)
        error = jnp.sum(off * off)
        better = error < best
        best, size = jnp.minimum(error, best), jnp.where(better, tried, size)
        steps = jnp.where(better, rounded, steps)
    return steps, size


def _rounded(x: jax.Array) -> jax.Array:
    """Rounds to the nearest integer, ties to even, as jnp.round does, which Triton lacks."""
    down = jnp.floor(x)
    off, is_odd = x - down, down != 2 * jnp.floor(down / 2)
    return down + jnp.where((off > 0.5) | ((off == 0.5) & is_odd), 1.0, 0.0)
