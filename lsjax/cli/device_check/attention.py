"""Times attention alone: decode in bytes per second, prefill in FLOPs per second."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lsjax.attention import gpu_mosaic
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.dispatch import attend, attend_to_kept, decode_by_mosaic
from lsjax.attention.partial import Partial
from lsjax.attention.sparse.rule import TILE
from lsjax.cli.device_check.record import Recorder
from lsjax.cli.device_check.sizes import HEADS, Heads, Sizes
from lsjax.cli.device_check.timing import (
    first_and_median,
    random_array,
    random_kv_array,
    store_bytes,
)

_FEWEST_LAYERS, _MOST_LAYERS = 2, 16


def decode(sizes: Sizes, record: Recorder) -> None:
    """Times decode of one token over several layers' caches, one after the other as in a model."""
    platform = jax.default_backend()
    dispatched = functools.partial(attend, platform, slopes=None)
    ways = [("decode attention", dispatched, cache) for cache in ("int8", "bfloat16")]
    if platform == "gpu" and gpu_mosaic.on_hopper():
        ways.append(("Mosaic GPU's decode attention", decode_by_mosaic, "int8"))
    for what, way, cache in ways:
        for keys in sizes.decode_keys:
            for name in sizes.heads:
                row = {"what": what, "heads": name, "keys": keys, "cache": cache}
                try:
                    row |= _decode(way, sizes, HEADS[name], keys, cache)
                except Exception as error:  # such as out of memory; other cases may still run
                    row["why"] = repr(error)[:300]
                record(**row)


def _decode(way: Callable[..., Partial], sizes: Sizes, heads: Heads, keys: int, cache: str) -> dict:
    shape = 1, heads.kv_heads, keys, heads.head_dim
    one = 2 * math.prod(shape) * jnp.dtype(cache).itemsize
    layers = min(max(_FEWEST_LAYERS, math.ceil(sizes.rotated_bytes / one)), _MOST_LAYERS)
    stores = [[random_kv_array(shape, cache, 2 * i + j) for j in range(2)] for i in range(layers)]
    q = random_array((1, heads.kv_heads, heads.group, 1, heads.head_dim), "bfloat16", 99)
    end = jnp.full((1, 1), keys - 3, jnp.int32)

    @jax.jit
    def run(q, stores):
        for k, v in stores:
            key_range = KeyRange(None, end, end - 1)
            q = q + way(q, k, v, key_range).values.astype(q.dtype)
        return q

    first, seconds = first_and_median(lambda: run(q, stores), sizes.rounds)
    seconds /= layers
    nbytes = store_bytes(*stores[0])
    return {
        "microseconds": seconds * 1e6,
        "bytes_per_second": nbytes / seconds,
        "compile_seconds": round(first, 1),
    }


def prefill(sizes: Sizes, record: Recorder) -> None:
    """Times attention of a prompt's last queries to all of its keys, and to a tenth of them."""
    platform = jax.default_backend()
    work = [("prefill attention", _prefill, *lengths) for lengths in sizes.prefill]
    work.append(("sparse prefill attention", _sparse_prefill, *sizes.prefill[-1]))
    for name in sizes.heads:
        for cache in ("bfloat16", "int8"):
            for what, times, queries, keys in work:
                row = {"what": what, "heads": name, "cache": cache}
                row |= {"queries": queries, "keys": keys}
                try:
                    row |= times(platform, sizes, HEADS[name], cache, queries, keys)
                except Exception as error:  # such as out of memory; other cases may still run
                    row["why"] = repr(error)[:300]
                record(**row)


def _chunk(heads: Heads, cache: str, queries: int, keys: int) -> tuple:
    """Returns q, k, v and the positions of a prompt's last queries."""
    shape = 1, heads.kv_heads, keys, heads.head_dim
    k, v = random_kv_array(shape, cache, 1), random_kv_array(shape, cache, 2)
    q = random_array((1, heads.kv_heads, heads.group, queries, heads.head_dim), "bfloat16", 3)
    return q * heads.head_dim**-0.5, k, v, keys - queries + jnp.arange(queries)[None]


def _prefill(
    platform: str, sizes: Sizes, heads: Heads, cache: str, queries: int, keys: int
) -> dict:
    q, k, v, at = _chunk(heads, cache, queries, keys)

    @jax.jit
    def run(q, k, v, at):
        key_range, blocks = KeyRange(None, at + 1, at), QueryBlocks(queries, causal=True)
        return attend(platform, q, k, v, key_range, None, blocks).values.astype(q.dtype)

    first, seconds = first_and_median(lambda: run(q, k, v, at), min(sizes.rounds, 3))
    pairs = queries * keys - queries**2 / 2
    return _rate_of(heads, pairs, seconds, first)


def _sparse_prefill(
    platform: str, sizes: Sizes, heads: Heads, cache: str, queries: int, keys: int
) -> dict:
    """Times attention to a tenth of the blocks; the rate counts only what is attended to."""
    q, k, v, at = _chunk(heads, cache, queries, keys)
    tiles, blocks = queries // TILE, keys // TILE
    keep = jax.random.uniform(jax.random.key(4), (1, heads.kv_heads, tiles, blocks)) < 0.1

    @jax.jit
    def run(q, k, v, keep, at):
        return attend_to_kept(platform, q, k, v, keep, at + 1).values.astype(q.dtype)

    first, seconds = first_and_median(lambda: run(q, k, v, keep, at), min(sizes.rounds, 3))
    seen = keep & (jnp.arange(blocks) * TILE < at[0, TILE - 1 :: TILE, None])
    pairs = int(jnp.sum(seen)) / heads.kv_heads * TILE**2
    return _rate_of(heads, pairs, seconds, first)


def _rate_of(heads: Heads, pairs: float, seconds: float, first: float) -> dict:
    """Returns the figures of a row, for pairs of a query and a key per query head."""
    work = 4 * heads.kv_heads * heads.group * heads.head_dim * pairs
    return {
        "microseconds": seconds * 1e6,
        "flops_per_second": work / seconds,
        "compile_seconds": round(first, 1),
    }


def cudnn_ceilings(sizes: Sizes, record: Recorder) -> None:
    """Times cuDNN's own attention, causal and unmasked: an upper bound for prefill."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    for name in sizes.heads:
        heads = HEADS[name]
        for what, mask, queries, keys in (
            ("cuDNN, causal", MaskType.CAUSAL, 32768, 32768),
            ("cuDNN, whole", MaskType.NO_MASK, 4096, 131_072),
            ("cuDNN, whole", MaskType.NO_MASK, 1024, 131_072),
        ):
            q = random_array(
                (1, heads.kv_heads * heads.group, queries, heads.head_dim), "bfloat16", 1
            )
            k, v = (
                random_array((1, heads.kv_heads, keys, heads.head_dim), "bfloat16", seed)
                for seed in (2, 3)
            )

            @jax.jit
            def run(q, k, v, mask=mask, scale=heads.head_dim**-0.5):
                return dot_product_attention(
                    q, k, v, mask_type=mask, qkv_layout="BNTH", scale=scale, return_residual=True
                )

            row = {"what": what, "heads": name, "queries": queries, "keys": keys}
            try:
                first, seconds = first_and_median(lambda: run(q, k, v), min(sizes.rounds, 5))  # noqa: B023
            except Exception as error:
                record(**row, why=repr(error)[:300])
                continue
            share = 0.5 if mask == MaskType.CAUSAL else 1
            work = 4 * heads.kv_heads * heads.group * heads.head_dim * queries * keys * share
            record(
                **row,
                microseconds=seconds * 1e6,
                flops_per_second=work / seconds,
                compile_seconds=round(first, 1),
            )
