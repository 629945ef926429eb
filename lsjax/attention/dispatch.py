"""Chooses the attention implementation by platform; nothing else makes this choice.

- CPU: the blockwise loop. XLA has no faster attention there, and fuses the dequantization of int8.
- GPU, decode: our own kernels, since no library's kernel reads int8. Pallas' Triton backend, which
  is deprecated, compiles them. The one for its successor, Mosaic GPU, has run on no GPU yet: it
  decodes only if JAX has no Triton, on a Hopper.
- GPU, prefill: cuDNN, the fastest for floats, over int8 and int4 that are dequantized piece by
  piece. Queries in blocks need nothing else, see QueryBlocks. The edges of other key ranges are
  left to the blockwise loop: those of chunks that may begin within a block of a quantized cache, of
  a window within which a block of queries does not fit or that is larger than a piece, of
  StreamingLLM, of windows around the ring, and of dual chunk attention there, after a document and
  in chunks that may reach into another chunk of positions.
- GPU, gradients: cuDNN's backward pass for the slots that 1,024 queries all see; edges as above.
- GPU and TPU, sparse prefill: our own kernels, which read the blocks that were chosen.
- TPU: our own kernel, since splash attention reads no int8 and needs masks and lengths that are
  known at compile time.
- Everywhere, loops over blocks handle what these do not support: ALiBi, int4 but for prefill on a
  GPU, prefill and gradients on a GPU in float32 or of wide heads, and what `gpu_mosaic.takes`
  refuses. Gradients elsewhere are its own, too. Wide heads have more than 128 channels; in prefill
  on a Hopper or a later GPU, more than 256. `prefill_path` names what follows.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lsjax.attention import blockwise
from lsjax.attention.backward import Gradients, Queries, add_blockwise
from lsjax.attention.blockwise import (
    CPU_BLOCKS,
    MAX_DECODE_QUERIES,
    Blocks,
    KeyRange,
    QueryBlocks,
    in_query_blocks,
)
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial
from lsjax.attention.sparse.rule import attend_in_tiles, kept_blocks

# Whether `gpu.py`, `gpu_token.py` and `sparse/gpu.py` can be compiled.
HAS_TRITON = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
_GPU = ("gpu", "cuda")
# Maximum number of query rows per KV head that fit in the decode kernel's registers.
_GPU_DECODE_QUERIES = 128
# Widest head that cuDNN takes on every GPU, and on those of compute capability 9 or later.
_CUDNN_HEAD_DIM, _CUDNN_HEAD_DIM_OF_9 = 128, 256
# Queries per cuDNN call on a GPU where there are edges. More queries dequantize keys less often.
# Fewer queries leave less to the blockwise loop, which handles the keys among the queries.
_GPU_QUERIES = 1024
# Accelerators prefer few large matmuls; the scores lie in device memory anyway.
_ACCELERATOR_BLOCKS = Blocks(rows=4096, keys=((256, 9216), (4096, 512)))


def attend(
    platform: str,
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    key_range: KeyRange,
    slopes: jax.Array | None,
    blocks: QueryBlocks | None = None,
) -> Partial:
    """Runs attention on `platform`: cpu, gpu (or cuda) or tpu.

    `blocks` is what is known of `key_range` when the program is compiled, or None. See
    `blockwise.attend` for the other arguments and the result.
    """
    is_int4 = k.data.dtype == jnp.uint8
    if slopes is None and not is_int4:
        if platform == "tpu":
            return _on_tpu(q, k, v, key_range)
        if on_gpu(platform) and (decode := _gpu_decode(q, k)) is not None:
            return decode(q, k, v, key_range)
    if _prefill_by_cudnn(platform, q, slopes) and (not is_int4 or q.shape[3] > MAX_DECODE_QUERIES):
        return _prefill_on_gpu(q, k, v, key_range, blocks)
    return blockwise.attend(q, k, v, key_range, slopes, blocks_of(platform))


def add_gradients(
    platform: str,
    gradients: Gradients,
    queries: Queries,
    k: jax.Array,
    v: jax.Array,
    key_range: KeyRange,
    slopes: jax.Array | None,
    blocks: Blocks,
) -> Gradients:
    """Adds what some keys and values contribute to gradients; see backward.add_blockwise."""

    def edges(gradients: Gradients, queries: Queries, key_range: KeyRange) -> Gradients:
        return add_blockwise(gradients, queries, k, v, key_range, slopes, blocks)

    if not _by_cudnn(platform, queries.q, slopes, _CUDNN_HEAD_DIM):
        return edges(gradients, queries, key_range)
    from lsjax.attention import cudnn_gradients

    return cudnn_gradients.add_gradients(gradients, queries, k, v, key_range, edges)


def attend_to_kept(
    platform: str, q: jax.Array, k: KVArray, v: KVArray, keep: jax.Array, stop: jax.Array
) -> Partial:
    """Runs attention to the blocks of slots that tiles of queries keep.

    `q` is [batch, kv_heads, group, tiles * TILE, head_dim], scaled. See kept_blocks for `keep` and
    `stop`. Values of the result are shaped as q.
    """
    kept, is_int4 = kept_blocks(keep, stop), k.data.dtype == jnp.uint8
    if on_gpu(platform) and HAS_TRITON and q.dtype == jnp.bfloat16 and not is_int4:
        from lsjax.attention.sparse.gpu import attend_tiles

        return attend_tiles(q, k, v, kept)
    if platform == "tpu" and not is_int4:
        from lsjax.attention.sparse.tpu import attend_tile
    else:
        from lsjax.attention.sparse.loop import attend_tile
    return attend_in_tiles(lambda q, kept: attend_tile(q, k, v, kept), q, kept)


def prefill_path(
    platform: str, dtype: str, cache_dtype: str, head_dim: int, alibi: bool, capability: int = 0
) -> str:
    """Names what `attend` runs the queries of a prefill chunk by.

    Args:
      platform: cpu, gpu or tpu.
      dtype: dtype of the queries.
      cache_dtype: format of the cache.
      head_dim: channels of a head.
      alibi: whether scores have ALiBi's slopes.
      capability: major number of the GPU's compute capability; 0 where a program is compiled
        without the GPU, which JAX asks what cuDNN takes.
    """
    if platform == "tpu" and not alibi and cache_dtype != "int4":
        return "a Pallas kernel"
    if _cudnn_takes(platform, dtype, head_dim, alibi, _cudnn_head_dim(capability >= 9)):
        return "cuDNN"
    return "the blockwise loop"


def on_gpu(platform: str) -> bool:
    """Returns whether a platform, as JAX names it, is a GPU."""
    return platform in _GPU


def reads_once(platform: str) -> bool:
    """Returns whether queries of a decode step that see other keys are best run in one call.

    Accelerators wait for the keys, which one call reads once for all queries. A CPU's time is that
    of the products.
    """
    return platform != "cpu"


def takes_blocks(platform: str) -> bool:
    """Returns whether prefill gains from what is known of its queries; see QueryBlocks.

    A CPU and the TPU's kernel gain nothing: they read key ranges as they run.
    """
    return on_gpu(platform)


def takes_token(
    platform: str, q: jax.Array, k: KVArray, near: KVArray, slopes: jax.Array | None
) -> bool:
    """Returns whether `write_and_attend` takes a decode step."""
    one = q.shape[3] == 1 and q.shape[2] <= _GPU_DECODE_QUERIES
    formats = k.data.dtype == jnp.int8 and near.data.dtype == q.dtype
    return platform in _GPU and HAS_TRITON and slopes is None and one and formats


def write_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: tuple[KVArray, KVArray],
    near: tuple[KVArray, KVArray],
    key_range: KeyRange,
    near_range: KeyRange,
) -> tuple[Partial, tuple[KVArray, KVArray], tuple[KVArray, KVArray]]:
    """Writes one token per row to an int8 cache and to floats beside it, and attends to both.

    On a GPU these are three kernels.

    Args:
      q: [batch, kv_heads, group, 1, head_dim], already scaled, not yet Hadamard-transformed.
      k, v: [batch, kv_heads, 1, head_dim], keys not yet Hadamard-transformed.
      cache: keys and values in int8; slots are the query positions of `key_range`.
      near: keys and values in floats; slots are the query positions of `near_range`.
      key_range, near_range: range of slots that each query sees in them.

    Returns:
      Partial over both, with values in q's dtype, and both with the token written.
    """
    from lsjax.attention import gpu, gpu_token

    stores = gpu_token.Stores(*jax.tree.leaves(cache), *jax.tree.leaves(near))
    slot, near_slot = (x.query_positions[:, 0] for x in (key_range, near_range))
    q, written = gpu_token.write_token(q, k, v, stores, slot, near_slot)
    far = gpu.Slots(written.k, written.v, written.k_scale, written.v_scale, *_range(key_range))
    beside = gpu.Slots(written.near_k, written.near_v, None, None, *_range(near_range))
    both = KVArray(written.k, written.k_scale), KVArray(written.v, written.v_scale)
    floats = KVArray(written.near_k, None), KVArray(written.near_v, None)
    return gpu.decode(q, far, beside, q.dtype), both, floats


def decode_by_mosaic(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    """Decodes by Mosaic GPU, also where JAX has Triton; `gpu_mosaic.takes` says what."""
    from lsjax.attention import gpu_mosaic

    return gpu_mosaic.decode(q, k.data, v.data, k.scale, v.scale, *_range(key_range))


def blocks_of(platform: str) -> Blocks:
    """Returns the block sizes of the blockwise loops on a platform."""
    return CPU_BLOCKS if platform == "cpu" else _ACCELERATOR_BLOCKS


def _prefill_by_cudnn(platform: str, q: jax.Array, slopes: jax.Array | None) -> bool:
    """Does what `_by_cudnn` does, for prefill on the GPU that is here."""
    if not on_gpu(platform):
        return False
    return _by_cudnn(platform, q, slopes, _cudnn_head_dim(_has_capability_9()))


def _by_cudnn(platform: str, q: jax.Array, slopes: jax.Array | None, widest: int) -> bool:
    """Returns whether cuDNN takes these queries and what they see."""
    return _cudnn_takes(platform, q.dtype.name, q.shape[-1], slopes is not None, widest)


def _cudnn_takes(platform: str, dtype: str, head_dim: int, alibi: bool, widest: int) -> bool:
    return on_gpu(platform) and not alibi and dtype == "bfloat16" and head_dim <= widest


def _cudnn_head_dim(capability_9: bool) -> int:
    """Returns the widest head that cuDNN takes in prefill."""
    return _CUDNN_HEAD_DIM_OF_9 if capability_9 else _CUDNN_HEAD_DIM


def _has_capability_9() -> bool:
    """Returns whether a GPU is here, a Hopper or a later one: JAX asks so before it calls cuDNN."""
    from jax._src.cudnn.fused_attention_stablehlo import check_compute_capability

    return check_compute_capability("9.0")


def _on_tpu(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    from lsjax.attention import tpu

    return tpu.attend(q, k.data, v.data, k.scale, v.scale, *_range(key_range))


def _decode_by_triton(q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange) -> Partial:
    from lsjax.attention import gpu

    return gpu.decode(q, gpu.Slots(k.data, v.data, k.scale, v.scale, *_range(key_range)))


def _gpu_decode(q: jax.Array, k: KVArray) -> Callable[..., Partial] | None:
    """Returns the kernel that decodes on a GPU, if one takes these queries and keys."""
    if HAS_TRITON:
        fits = q.shape[2] * q.shape[3] <= _GPU_DECODE_QUERIES
        return _decode_by_triton if fits else None
    from lsjax.attention import gpu_mosaic

    return decode_by_mosaic if gpu_mosaic.takes(q, k.data) else None


def _prefill_on_gpu(
    q: jax.Array, k: KVArray, v: KVArray, key_range: KeyRange, blocks: QueryBlocks | None
) -> Partial:
    from lsjax.attention import cudnn

    if blocks is not None and (blocks.window or 0) <= cudnn.PIECE:
        return cudnn.in_blocks(q, k, v, key_range, blocks)

    def some(q: jax.Array, key_range: KeyRange) -> Partial:
        def edges(begin: jax.Array, end: jax.Array) -> Partial:
            among = KeyRange(begin, end, key_range.query_positions)
            return blockwise.attend(q, k, v, among, blocks=_ACCELERATOR_BLOCKS)

        return cudnn.in_general(q, k, v, *_range(key_range), edges)

    return in_query_blocks(some, q, key_range, _GPU_QUERIES)


def _range(key_range: KeyRange) -> tuple[jax.Array, jax.Array]:
    start = jnp.zeros_like(key_range.stop) if key_range.start is None else key_range.start
    return start, key_range.stop
