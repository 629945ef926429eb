"""The KV cache: a pytree of one float, int8 or int4 entry per layer, sharded over the sequence."""

from lsjax.cache.compressed import (
    CompensationToken,
    CompressedCache,
    HeadGroups,
    WindowCache,
    WindowSpec,
    compress,
    floats_at,
)
from lsjax.cache.kv_cache import (
    BLOCK,
    CACHE_DTYPES,
    MAX_DECODE_QUERIES,
    CacheSpec,
    FloatTail,
    KVCache,
    LayerCache,
    empty_cache,
    empty_layer,
)
from lsjax.cache.store import KVArray, empty_kv_array, write, write_tokens
from lsjax.distributed.sequence_layout import (
    CAPACITY_MULTIPLE,
    ONE_DEVICE,
    Zigzag,
    round_up_to_blocks,
    zigzag_of,
)

__all__ = [
    "BLOCK",
    "CACHE_DTYPES",
    "CAPACITY_MULTIPLE",
    "MAX_DECODE_QUERIES",
    "ONE_DEVICE",
    "CacheSpec",
    "CompensationToken",
    "CompressedCache",
    "FloatTail",
    "HeadGroups",
    "KVArray",
    "KVCache",
    "LayerCache",
    "WindowCache",
    "WindowSpec",
    "Zigzag",
    "compress",
    "empty_cache",
    "empty_kv_array",
    "empty_layer",
    "floats_at",
    "round_up_to_blocks",
    "write",
    "write_tokens",
    "zigzag_of",
]
