"""Checks attention of tiles of queries to the blocks of keys that they keep; see sparse prefill."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention import dispatch
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.attention.partial import Partial
from lsjax.attention.sparse.rule import TILE, attend_in_tiles, kept_blocks
from lsjax.cli.device_check.accuracy import as_on_accelerators, compare
from lsjax.cli.device_check.sizes import Sizes

# (q, k, v, keep, stop) -> Partial; see dispatch.attend_to_kept.
Attend = Callable[[jax.Array, KVArray, KVArray, jax.Array, jax.Array], Partial]

_BATCH, _KV_HEADS, _GROUP, _TILES = 2, 2, 4, 3
_KEPT = 0.3  # share of the blocks that a tile keeps
_SAMPLED_QUERIES = 48


def check_kept_blocks(platform: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yields a row for each implementation, head_dim and format of the cache."""
    ways = {f"attention to kept blocks on {platform}": _on(platform)}
    if platform == "cpu":
        ways["the TPU's kernel for kept blocks, interpreted"] = _tpu_kernel
        if dispatch.HAS_TRITON:
            ways["the GPU's kernel for kept blocks, interpreted"] = _gpu_kernel
    for name, attend in ways.items():
        for head_dim in sizes.head_dims:
            for cache in ("int8", "bfloat16"):
                row = {"check": name, "case": {"head_dim": head_dim, "cache": cache}}
                try:
                    row |= check_kept(attend, head_dim, cache, sizes.check_blocks, platform)
                except Exception as error:  # the other cases may still run
                    row |= {"ok": False, "why": repr(error)[:500]}
                yield row


def check_kept(
    attend: Attend, head_dim: int, cache: str, blocks: int, platform: str
) -> dict[str, Any]:
    """Attends from tiles at the end of a cache, and from those of a row that is shorter.

    Args:
      attend: implementation.
      head_dim: channels per head.
      cache: format of the cache.
      blocks: number of blocks in the cache.
      platform: cpu, gpu or tpu, which decides how the cache is stored.

    Returns:
      Row of accuracy.compare.
    """
    rng, rows = np.random.default_rng(head_dim), (_BATCH, _KV_HEADS)
    slots = *rows, blocks * TILE, head_dim
    empty = empty_kv_array(slots, cache, platform)
    k, v = (empty.quantize(jnp.asarray(rng.standard_normal(slots), jnp.float32)) for _ in "kv")
    q = 2 * rng.standard_normal((*rows, _GROUP, _TILES * TILE, head_dim)) * head_dim**-0.5
    q = jnp.asarray(q, jnp.bfloat16)
    last = TILE * np.array([[blocks], [blocks // 2]])
    stop = last - _TILES * TILE + np.arange(1, _TILES * TILE + 1)
    keep = rng.random((*rows, _TILES, blocks)) < _KEPT
    got = jax.jit(attend)(q, k, v, jnp.asarray(keep), jnp.asarray(stop, jnp.int32))
    sample = np.unique(np.linspace(0, _TILES * TILE - 1, _SAMPLED_QUERIES, dtype=int))
    visible = np.repeat(keep[:, :, sample // TILE], TILE, axis=-1)
    visible &= np.arange(blocks * TILE) < stop[:, None, sample, None]
    got = jax.tree.map(lambda x: x[:, :, :, sample], got)
    return compare(q[:, :, :, sample], k, v, visible, got)


def _on(platform: str) -> Attend:
    return functools.partial(dispatch.attend_to_kept, platform)


def _gpu_kernel(q, k, v, keep, stop) -> Partial:
    from lsjax.attention.sparse.gpu import attend_tiles

    k, v = as_on_accelerators(k), as_on_accelerators(v)
    return attend_tiles(q, k, v, kept_blocks(keep, stop), interpret=True)


def _tpu_kernel(q, k, v, keep, stop) -> Partial:
    from lsjax.attention.sparse.tpu import attend_tile

    attend = functools.partial(
        attend_tile, k=as_on_accelerators(k), v=as_on_accelerators(v), interpret=True
    )
    return attend_in_tiles(lambda q, kept: attend(q, kept=kept), q, kept_blocks(keep, stop))
