"""The TPU kernel compiled for TPUs: it does compile, and no program copies the cache for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.attention import dispatch
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import merge_over_axis
from lsjax.attention.sparse.rule import TILE
from lsjax.attention.tpu import attend

CAPACITY = 131072  # slots of a device


class Heads(NamedTuple):
    kv_heads: int
    group: int
    head_dim: int


GLM_4_9B = Heads(4, 8, 128)
QWEN2_5_0_5B = Heads(2, 7, 64)


def mesh(topology, devices):
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.asarray(found[:devices]), ("context",))


def store_avals(heads, dtype, batch=1, capacity=CAPACITY):
    """k, v, k_scale, v_scale."""
    shape = (batch, heads.kv_heads, capacity, heads.head_dim)
    data = jax.ShapeDtypeStruct(shape, dtype)
    scale = jax.ShapeDtypeStruct(shape[:-1], "bfloat16") if dtype == "int8" else None
    return data, data, scale, scale


def query_avals(heads, length, dtype="bfloat16", batch=1):
    shape = (batch, heads.kv_heads, heads.group, length, heads.head_dim)
    return jax.ShapeDtypeStruct(shape, dtype)


def nbytes(avals):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(avals))


def compiled(mesh, f, *avals, **options):
    """For a mesh over whose axis whatever has a capacity is split."""

    def placed(x):
        split = x.ndim > 2 and x.shape[2] >= CAPACITY
        spec = PartitionSpec(None, None, "context") if split else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.jit(f, **options).lower(*jax.tree.map(placed, avals)).compile()


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize("heads", [GLM_4_9B, QWEN2_5_0_5B], ids=str)
@pytest.mark.parametrize("length", [1, 512])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_reads_a_long_cache_where_it_lies(topology, heads, length, dtype):
    store = store_avals(heads, dtype, capacity=4 * CAPACITY)  # next to which the queries are small
    q, bounds = query_avals(heads, length), jax.ShapeDtypeStruct((1, length), "int32")
    program = compiled(mesh(topology, 1), attend, q, *store, bounds, bounds)
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * nbytes(store)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize(
    "heads, dtype, q_dtype",
    [
        (Heads(32, 1, 80), "int8", "bfloat16"),
        (Heads(4, 2, 96), "int8", "float32"),
        (Heads(8, 4, 256), "float32", "float32"),
        (Heads(40, 1, 128), "bfloat16", "float32"),
        (Heads(20, 1, 128), "float32", "float32"),
        (Heads(1, 16, 128), "int8", "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 300])
def test_fits_whatever_the_heads(topology, heads, dtype, q_dtype, length):
    store = store_avals(heads, dtype, batch=2, capacity=16384)
    q, bounds = query_avals(heads, length, q_dtype, batch=2), jax.ShapeDtypeStruct((2, length), int)
    compiled(mesh(topology, 1), attend, q, *store, bounds, bounds)


def decode(store, q, position):
    """16 steps over a shard of one layer's int8 cache; each writes its token and attends."""
    first = jax.lax.axis_index("context") * store[0].shape[2]

    def write(old, new, slot):
        at = (0, 0, jnp.clip(slot, 0, old.shape[2] - 1), 0)[: old.ndim]
        held = jax.lax.dynamic_slice(old, at, new.shape)
        here = (slot >= 0) & (slot < old.shape[2])
        return jax.lax.dynamic_update_slice(old, jnp.where(here, new, held), at)

    def step(state, _):
        store, q, position = state
        token = q[:, :, 0]
        scale = (jnp.max(jnp.abs(token), axis=-1) / 127).astype("bfloat16")
        steps = jnp.round(token / scale[..., None]).astype("int8")
        slot = position - first
        new = (steps, -steps, scale, scale)
        store = tuple(write(old, x, slot) for old, x in zip(store, new, strict=True))
        end = jnp.reshape(slot + 1, (1, 1))
        partial = merge_over_axis(attend(q, *store, jnp.zeros_like(end), end), "context")
        return (store, partial.values.astype(q.dtype), position + 1), partial.lse

    (store, _, _), lse = jax.lax.scan(step, (store, q, position), length=16)
    return store, lse


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("heads", [GLM_4_9B, QWEN2_5_0_5B], ids=str)
def test_a_decode_loop_writes_its_cache_in_place(devices, heads):
    store = store_avals(heads, "int8", capacity=devices * CAPACITY)
    over, split = mesh("v5e:2x4", devices), PartitionSpec(None, None, "context")
    f = jax.shard_map(
        decode,
        mesh=over,
        in_specs=(split, PartitionSpec(), PartitionSpec()),
        out_specs=(split, PartitionSpec()),
        check_vma=False,
    )
    position = jax.ShapeDtypeStruct((), "int32")
    program = compiled(over, f, store, query_avals(heads, 1), position, donate_argnums=0)
    memory = program.memory_analysis()
    cache = nbytes(store) / devices
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.1 * cache


@pytest.mark.parametrize(("heads", "dtype"), [(GLM_4_9B, "int8"), (QWEN2_5_0_5B, "bfloat16")])
def test_the_kernel_for_kept_blocks_reads_them_in_place(heads, dtype):
    k, v, *scales = store_avals(heads, dtype, capacity=2**20)
    keep = jax.ShapeDtypeStruct((1, heads.kv_heads, 4096 // TILE, 2**20 // TILE), "bool")
    stop = jax.ShapeDtypeStruct((1, 4096), "int32")

    def attend_to_kept(q, k, v, k_scale, v_scale, keep, stop):
        stores = KVArray(k, k_scale), KVArray(v, v_scale)
        return dispatch.attend_to_kept("tpu", q, *stores, keep, stop)

    avals = query_avals(heads, 4096), k, v, *scales, keep, stop
    program = compiled(mesh("v5e:2x2", 1), attend_to_kept, *avals)
    # What is held is of the size of the queries: a copy of the keys alone would be half of these.
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * (k.size + v.size) * k.dtype.itemsize
