"""Which code attends to a store, by where it runs: the one place that chooses.

- CPU: the blockwise loop. XLA has no faster attention there, and fuses the widening of int8.
- GPU, the few tokens of a decode step: a kernel of our own, since no library's reads int8.
- GPU, more: cuDNN, the fastest there is for floats, over int8 widened piece by piece.
- TPU: a kernel of our own, since splash attention reads no int8, and wants masks and lengths that
  are known when it is compiled.
- What those do not take goes through the blockwise loop everywhere: ALiBi, 4 bits, and on a GPU
  float32 prefill.
"""

import functools

import jax
import jax.numpy as jnp

from lsjax.attention import blockwise
from lsjax.attention.blockwise import CPU_BLOCKS, Blocks, Seen, in_query_blocks
from lsjax.attention.partial import Partial
from lsjax.cache import Store

# Queries of a KV head that the decode kernel's registers take.
_GPU_DECODE_QUERIES = 128
# On a GPU, queries that share one call of cuDNN: the more, the rarer are keys widened; the fewer,
# the less is left to the blockwise loop, which attends to the keys among the queries themselves.
_GPU_QUERIES = 1024
# An accelerator wants few large products; their scores lie in its memory anyway.
_ACCELERATOR_BLOCKS = Blocks(rows=4096, keys=512, keys_for_few=9216)


def attend(
    platform: str, q: jax.Array, k: Store, v: Store, seen: Seen, slopes: jax.Array | None
) -> Partial:
    """`blockwise.attend` on a platform: cpu, gpu (or cuda) or tpu; see there for the arguments."""
    group, length = q.shape[2:4]
    if slopes is None and k.data.dtype != jnp.uint8:
        if platform == "tpu":
            return _on_tpu(q, k, v, seen)
        if platform in ("gpu", "cuda") and group * length <= _GPU_DECODE_QUERIES:
            return _decode_on_gpu(q, k, v, seen)
        if platform in ("gpu", "cuda") and q.dtype == jnp.bfloat16:
            prefill = functools.partial(_prefill_on_gpu, k=k, v=v)
            return in_query_blocks(prefill, q, seen, _GPU_QUERIES)
    return blockwise.attend(q, k, v, seen, slopes, blocks_of(platform))


def blocks_of(platform: str) -> Blocks:
    """How much loops over blocks work on at a time there."""
    return CPU_BLOCKS if platform == "cpu" else _ACCELERATOR_BLOCKS


def _on_tpu(q: jax.Array, k: Store, v: Store, seen: Seen) -> Partial:
    from lsjax.attention import tpu

    return tpu.attend(q, k.data, v.data, k.scale, v.scale, *_range(seen))


def _decode_on_gpu(q: jax.Array, k: Store, v: Store, seen: Seen) -> Partial:
    from lsjax.attention import gpu

    return gpu.decode(q, k.data, v.data, k.scale, v.scale, *_range(seen))


def _prefill_on_gpu(q: jax.Array, seen: Seen, k: Store, v: Store) -> Partial:
    from lsjax.attention import cudnn

    def edges(begin: jax.Array, end: jax.Array) -> Partial:
        among = Seen(begin, end, seen.at)
        return blockwise.attend(q, k, v, among, blocks=_ACCELERATOR_BLOCKS)

    return cudnn.prefill(q, k.data, v.data, k.scale, v.scale, *_range(seen), edges)


def _range(seen: Seen) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(seen.end) if seen.begin is None else seen.begin, seen.end
