"""What an H100 would run, compiled for it on a machine without one.

Needs jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-cuda-nvdisasm and
nvidia-cudnn-cu13; no driver.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from helpers.sass import assembled
from jax.sharding import NamedSharding, PartitionSpec

from lsjax.attention import dispatch
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.cudnn import in_blocks
from lsjax.attention.differentiable import self_attention
from lsjax.attention.gpu import _BLOCK_BYTES, Slots
from lsjax.attention.gpu import decode as decode_on_gpu
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import merge_over_axis
from lsjax.attention.sparse.gpu import attend_tiles
from lsjax.attention.sparse.rule import TILE, KeptBlocks
from lsjax.distributed.sharding import CHUNK_QUERIES_SPEC, CHUNK_SPEC
from lsjax.planning import find_target, target_mesh

GLM4_9B = {"kv_heads": 4, "group": 8, "head_dim": 128, "capacity": 1048576 + 4096}
QWEN25_05B = {"kv_heads": 2, "group": 7, "head_dim": 64, "capacity": 131072 + 4096}
MODELS = pytest.mark.parametrize("model", [GLM4_9B, QWEN25_05B], ids=["GLM-4-9B", "Qwen2.5-0.5B"])
CACHES = pytest.mark.parametrize("cache", ["int8", "bfloat16"])


def mesh_of(devices):
    return target_mesh(find_target(f"h100-80gb:{devices}"), {"context": devices})


def store(mesh, model, cache, batch):
    """Data and scales, split over the mesh's devices by slots."""
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    shape = (batch, model["kv_heads"], model["capacity"])
    data = jax.ShapeDtypeStruct((*shape, model["head_dim"]), cache, sharding=sharding)
    scale = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)
    return data, scale if cache == "int8" else None


def queries(mesh, model, batch, length):
    """q, and begin or end."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = (batch, model["kv_heads"], model["group"], length, model["head_dim"])
    q = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=everywhere)
    return q, jax.ShapeDtypeStruct((batch, length), "int32", sharding=everywhere)


def compiled(mesh, f, *args, **options):
    with jax.set_mesh(mesh):  # tells Pallas what GPU it is for
        return jax.jit(f, **options).lower(*args).compile()


def decode(q, *slots):
    return decode_on_gpu(q, Slots(*slots))


def share_of_cache(program, data, scale):
    """Bytes of temporaries over those of keys and values that a device holds."""
    held = sum(2 * x.size * x.dtype.itemsize for x in (data, scale) if x is not None)
    return program.memory_analysis().temp_size_in_bytes / (held / data.sharding.num_devices)


@CACHES
@MODELS
def test_decode_compiles_and_copies_nothing(model, cache):
    mesh = mesh_of(1)
    q, bound = queries(mesh, model, batch=1, length=1)
    data, scale = store(mesh, model, cache, batch=1)
    program = compiled(mesh, decode, q, data, data, scale, scale, bound, bound)
    assert "decode_attention" in program.as_text()
    assert share_of_cache(program, data, scale) < 0.1


@pytest.mark.parametrize(("cache", "most"), [("int8", 0.165), ("bfloat16", 0.065)])
def test_decode_loop_spills_nothing_and_takes_few_instructions_a_byte(cache, most, tmp_path):
    mesh = mesh_of(1)
    q, bound = queries(mesh, GLM4_9B, batch=1, length=1)
    data, scale = store(mesh, GLM4_9B, cache, batch=1)
    far, near = Slots(data, data, scale, scale, bound, bound), None
    if cache == "int8":  # the block in progress is in floats
        tail, _ = store(mesh, GLM4_9B | {"capacity": 4096}, "bfloat16", batch=1)
        near = Slots(tail, tail, None, None, bound, bound)
    with jax.set_mesh(mesh):
        lowered = jax.jit(decode_on_gpu).lower(q, far, near)
        lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    kernel = assembled(tmp_path, "decode_attention")
    # An iteration reads a tile of keys and one of values, and the scales of each.
    per_byte = kernel.warps * kernel.loop / (2 * _BLOCK_BYTES)
    print(f"{cache}: {kernel}, {per_byte:.3f} instructions per byte")
    assert kernel.spilled == 0
    assert per_byte < most


ARCHITECTURES = {"h100-80gb:1": "sm_90a", "a100-80gb:1": "sm_80", "l40s:1": "sm_89"}


@CACHES
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_tiles_of_a_chunk_attend_to_kept_blocks_in_one_kernel_that_spills_nothing(
    target, cache, tmp_path
):
    mesh, tiles = target_mesh(find_target(target), {}), 32
    data, scale = store(mesh, GLM4_9B, cache, batch=1)
    q, stop = queries(mesh, GLM4_9B, batch=1, length=tiles * TILE)

    def of_tiles(*shape):
        return jax.ShapeDtypeStruct((tiles, 1, *shape), "int32", sharding=stop.sharding)

    count = of_tiles(GLM4_9B["kv_heads"])
    ids = of_tiles(GLM4_9B["kv_heads"], GLM4_9B["capacity"] // TILE)
    kept = KeptBlocks(ids, count, count, of_tiles(TILE))
    stored = KVArray(data, scale)
    with jax.set_mesh(mesh):
        lowered = jax.jit(attend_tiles).lower(q, stored, stored, kept)
        program = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    kernel = assembled(tmp_path, "attend_to_kept_blocks", ARCHITECTURES[target])
    print(f"{target}, {cache}: {kernel}")
    assert kernel.spilled == 0
    assert program.memory_analysis().temp_size_in_bytes < 2**20


def prefill_of_prefix(q, k, v, k_scale, v_scale, begin, end):
    blocks = QueryBlocks(q.shape[3], causal=False)
    key_range = KeyRange(None, end, end)
    return in_blocks(q, KVArray(k, k_scale), KVArray(v, v_scale), key_range, blocks)


@CACHES
@MODELS
def test_prefill_compiles_to_cudnn_and_widens_a_piece_at_a_time(model, cache):
    mesh = mesh_of(1)
    q, bound = queries(mesh, model, batch=1, length=512)
    data, scale = store(mesh, model, cache, batch=1)
    program = compiled(mesh, prefill_of_prefix, q, data, data, scale, scale, bound, bound)
    assert "cudnn" in program.as_text()
    piece = 2 * 32768 * model["kv_heads"] * model["head_dim"] * 2
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * piece


@pytest.mark.parametrize("batch", [1, 2])
@CACHES
def test_sixteen_tokens_are_written_and_attended_to_in_place(cache, batch):
    def write(held, new, positions):
        def one(row, x, at):
            return jax.lax.dynamic_update_slice_in_dim(row, x.astype(row.dtype), at, axis=1)

        return held if held is None else jax.vmap(one)(held, new, positions)

    def step(carry, _):
        stores, q, positions = carry
        token = q[:, :, 0]
        news = (token, token, jnp.max(token, axis=-1), jnp.max(token, axis=-1))
        stores = [write(x, new, positions) for x, new in zip(stores, news, strict=True)]
        end = positions[:, None] + 1
        partial = decode(q, *stores, jnp.zeros_like(end), end)
        return (stores, partial.values.astype(q.dtype), positions + 1), partial.lse

    def loop(stores, q, positions):
        return jax.lax.scan(step, (stores, q, positions), length=16)

    mesh = mesh_of(1)
    q, bound = queries(mesh, GLM4_9B, batch, length=1)
    data, scale = store(mesh, GLM4_9B, cache, batch)
    positions = jax.ShapeDtypeStruct((batch,), "int32", sharding=bound.sharding)
    stores = [data, data, scale, scale]
    program = compiled(mesh, loop, stores, q, positions, donate_argnums=0)
    assert share_of_cache(program, data, scale) < 0.1


def decode_without_triton(q, k, v, k_scale, v_scale, begin, end):
    with mock.patch.object(dispatch, "HAS_TRITON", False):
        key_range = KeyRange(begin, end, end)
        return dispatch.attend("gpu", q, KVArray(k, k_scale), KVArray(v, v_scale), key_range, None)


@pytest.mark.parametrize(
    "attend, length, cache, kernel",
    [
        (decode, 1, "int8", "decode_attention"),
        (decode, 1, "bfloat16", "decode_attention"),
        (prefill_of_prefix, 512, "int8", "cudnn"),
        (prefill_of_prefix, 512, "bfloat16", "cudnn"),
        (decode_without_triton, 1, "int8", "mosaic_gpu"),
    ],
)
def test_a_cache_split_over_eight_stays_where_it_is(attend, length, cache, kernel):
    def step(q, k, v, k_scale, v_scale, begin, end):
        first = jax.lax.axis_index("context") * k.shape[2]
        partial = attend(q, k, v, k_scale, v_scale, begin - first, end - first)
        return merge_over_axis(partial, "context")

    mesh = mesh_of(8)
    q, bound = queries(mesh, GLM4_9B, batch=1, length=length)
    data, scale = store(mesh, GLM4_9B, cache, batch=1)
    whole, slots = PartitionSpec(), PartitionSpec(None, None, "context")
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, slots, slots, slots, slots, whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    program = compiled(mesh, sharded, q, data, data, scale, scale, bound, bound)
    assert kernel in program.as_text()
    assert "all-gather" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 72 * 2**20  # a piece, widened


def test_gradients_compile_to_cudnn():
    mesh, length = mesh_of(8), 2**20

    def aval(heads):
        sharding = NamedSharding(mesh, CHUNK_QUERIES_SPEC)
        return jax.ShapeDtypeStruct((1, length, heads, 128), "bfloat16", sharding=sharding)

    def gradients(q, k, v, d_out, begin):
        _, pull = jax.vjp(lambda *args: self_attention(mesh, *args, begin), q, k, v)
        return pull(d_out)

    q, k = aval(28), aval(4)  # of Qwen2.5-7B
    begin = jax.ShapeDtypeStruct((1, length), "int32", sharding=NamedSharding(mesh, CHUNK_SPEC))
    program = compiled(mesh, gradients, q, k, k, q, begin)
    assert "fmhaSoftmaxBackward" in program.as_text()
    # Queries, output and its gradient by head in bfloat16, and the queries' gradient in float32.
    assert program.memory_analysis().temp_size_in_bytes < 5.5 * 2 * q.size / 8
