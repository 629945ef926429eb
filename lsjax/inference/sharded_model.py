"""A model on a mesh: everything that is static when its programs are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.cache import KVCache, Zigzag, zigzag_of
from lsjax.cache.partition_specs import cache_shardings
from lsjax.compression import Compression
from lsjax.compression.reorder_heads import query_heads
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import TOKENS_SPEC, drop_axis, sharding
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedModel:
    """What compiled programs depend on, besides the shapes of their arguments.

    Attributes:
      config: model configuration, see ModelConfig.traced.
      mesh: device mesh.
      dtype: dtype of weights and activations.
      cache_dtype: dtype of the KV cache, one of CACHE_DTYPES.
      zigzag: layout of positions along the context axis.
      compression: KV head compression, or None.
      compiled: compiled programs of the model, see Program.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: str
    cache_dtype: str
    zigzag: Zigzag
    compression: Compression | None
    compiled: dict[Any, Callable] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @functools.cached_property
    def decoder(self) -> Decoder:
        all_gather_weights = _all_gather_weights(self) if self.mesh.shape["context"] > 1 else None
        heads = self.compression and query_heads(self.config, self.compression)
        return Decoder(self.config, self.mesh, jnp.dtype(self.dtype), all_gather_weights, heads)

    @property
    def rows(self) -> NamedSharding:
        """Sharding of an array whose first axis is the batch."""
        return sharding(self.mesh, TOKENS_SPEC)

    @property
    def replicated(self) -> NamedSharding:
        return sharding(self.mesh, PartitionSpec())

    @property
    def cache(self) -> KVCache:
        """Shardings of an uncompressed cache."""
        return cache_shardings(self.config, self.mesh, self.cache_dtype, self.zigzag)

    @property
    def cache_after_step(self) -> KVCache | None:
        """Shardings of the cache that a step returns.

        None for a compressed cache: its structure depends on its size, and it keeps the shardings
        that attention gives it.
        """
        return None if self.compression else self.cache


def sharded_model(
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    cache_dtype: str,
    chunk: int,
    compression: Compression | None,
) -> ShardedModel:
    """Returns an engine's model; engines whose programs are the same share one object.

    Args:
      config: model configuration.
      mesh: device mesh.
      dtype: dtype of weights and activations.
      cache_dtype: dtype of the KV cache, one of CACHE_DTYPES.
      chunk: prompt tokens per prefill step; decides the zigzag layout.
      compression: KV head compression, or None.
    """
    zigzag = zigzag_of(chunk, mesh.shape["context"])
    return _shared(config.traced, mesh, dtype, cache_dtype, zigzag, compression)


# Few models are kept: the compiled programs of each take many of the process's memory mappings.
@functools.lru_cache(maxsize=8)
def _shared(*static: Any) -> ShardedModel:
    return ShardedModel(*static)


def forget_compiled_programs() -> None:
    """Releases compiled programs that no engine holds any more."""
    _shared.cache_clear()


def _all_gather_weights(model: ShardedModel) -> Callable[[str, dict], dict]:
    """Returns a function that all-gathers a layer's weights over the context axis.

    The tokens of a chunk are split over that axis. Left to itself, XLA would send the activations
    of all tokens back and forth instead, which for a long chunk is far more data than the weights.
    """
    parameters = abstract_parameters(model.config, model.mesh, model.dtype)
    whole = unflatten(
        {
            path: sharding(model.mesh, drop_axis(x.sharding.spec, "context"))
            for path, x in parameters.items()
        }
    )
    return lambda name, weights: jax.lax.with_sharding_constraint(weights, whole[name])
