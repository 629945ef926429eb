"""Partition specs of KV caches, as pytrees of the same structure as the caches."""

import jax
from jax.sharding import Mesh

from lsjax.cache.compressed import CompressedCache, WindowCache
from lsjax.cache.kv_cache import CacheSpec, KVCache, LayerCache, empty_layer
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CACHE_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC, sharding


def layer_cache_spec(cache: LayerCache) -> LayerCache:
    """Returns the partition specs of one layer's cache, in the cache's structure."""
    k, v = (jax.tree.map(lambda _: CACHE_SPEC, store) for store in (cache.k, cache.v))
    return cache.replace(
        k=k, v=v, float_tail=jax.tree.map(lambda _: FLOAT_TAIL_SPEC, cache.float_tail)
    )


def compressed_cache_spec(cache: CompressedCache) -> CompressedCache:
    """Returns the partition specs of one layer's compressed cache, in the cache's structure."""

    def of_window(window: WindowCache) -> WindowCache:
        k, v = (jax.tree.map(lambda _: CACHE_SPEC, store) for store in (window.k, window.v))
        if window.compensation_token is None:
            return window.replace(k=k, v=v)
        dropped = window.compensation_token.replace(
            k=FLOAT_TAIL_SPEC, v=FLOAT_TAIL_SPEC, count=TOKENS_SPEC
        )
        return window.replace(
            k=k, v=v, compensation_token=dropped, next_evicted=(FLOAT_TAIL_SPEC, FLOAT_TAIL_SPEC)
        )

    whole = cache.whole and layer_cache_spec(cache.whole)
    return cache.replace(whole=whole, windows=tuple(map(of_window, cache.windows)))


def cache_shardings(config: ModelConfig, mesh: Mesh, dtype: str, zigzag: Zigzag) -> KVCache:
    """Returns the shardings of a whole cache."""
    spec = CacheSpec(1, 1, dtype, "float32", zigzag)
    layer = layer_cache_spec(jax.eval_shape(lambda: empty_layer(config, spec)))
    return (jax.tree.map(lambda spec: sharding(mesh, spec), layer),) * config.num_layers
