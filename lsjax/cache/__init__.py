"""The KV cache: a pytree of one entry a layer, float, int8 or int4, sharded over the sequence."""

from lsjax.cache.compressed import (
    CompressedCache,
    Dropped,
    Parts,
    WindowCache,
    WindowSpec,
    compress,
    floats_at,
)
from lsjax.cache.kv_cache import (
    BLOCK,
    CACHE_DTYPES,
    CacheSpec,
    KVCache,
    LayerCache,
    Recent,
    empty_cache,
    empty_layer,
)
from lsjax.cache.store import Store, empty_store, write, write_tokens
from lsjax.cache.zigzag import GRANULE, Zigzag, stripe_of, whole_stripes

__all__ = [
    "BLOCK",
    "CACHE_DTYPES",
    "GRANULE",
    "CacheSpec",
    "CompressedCache",
    "Dropped",
    "KVCache",
    "LayerCache",
    "Parts",
    "Recent",
    "Store",
    "WindowCache",
    "WindowSpec",
    "Zigzag",
    "compress",
    "empty_cache",
    "empty_layer",
    "empty_store",
    "floats_at",
    "stripe_of",
    "whole_stripes",
    "write",
    "write_tokens",
]
