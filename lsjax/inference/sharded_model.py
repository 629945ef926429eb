"""A model on a mesh: everything that is static when its programs are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.cache import KVCache, LayerCache
from lsjax.compression import Compression
from lsjax.config import ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_SPEC, TOKENS_SPEC, drop_axis, sharding
from lsjax.inference.engine_config import EngineConfig
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """What compiled programs depend on, besides their arguments; equal models share programs.

    Attributes:
      config: model configuration, see ModelConfig.traced.
      mesh: device mesh.
      dtype, weight_dtype: dtypes of weights and activations, see EngineConfig.
      zigzag: layout of positions along the context axis.
      compression: what layers keep of their KV cache; None for all that their queries see.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: str
    weight_dtype: str
    zigzag: Zigzag
    compression: Compression | None

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @functools.cached_property
    def decoder(self) -> Decoder:
        all_gather_weights = _all_gather_weights(self) if self.mesh.shape["context"] > 1 else None
        heads = self.compression and self.compression.query_heads(self.config)
        return Decoder(self.config, self.mesh, jnp.dtype(self.dtype), all_gather_weights, heads)

    @property
    def rows(self) -> NamedSharding:
        """Sharding of an array whose first axis is the batch."""
        return sharding(self.mesh, TOKENS_SPEC)

    @property
    def replicated(self) -> NamedSharding:
        return sharding(self.mesh, PartitionSpec())

    @property
    def chunk_sharding(self) -> NamedSharding:
        """Sharding of an array whose first axes are the batch and a prefill chunk."""
        return sharding(self.mesh, CHUNK_SPEC)

    def by_row(self, tree: Any) -> Any:
        """Shards arrays whose first axis is the batch, within a compiled program."""
        return jax.lax.with_sharding_constraint(tree, self.rows)

    def as_chunk(self, x: jax.Array) -> jax.Array:
        """Shards [batch, length, ...] over the data and context axes, within a program."""
        return jax.lax.with_sharding_constraint(x, self.chunk_sharding)

    def by_spec(self, tree: Any, specs: Any) -> Any:
        """Shards arrays by partition specs in the same structure, within a compiled program."""
        return jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, sharding(self.mesh, spec)),
            tree,
            specs,
        )

    def as_layer(self, cache: LayerCache) -> LayerCache:
        """Shards a layer's cache as it says, within a compiled program."""
        return self.by_spec(cache, cache.partition_specs())

    def as_cache(self, cache: KVCache) -> KVCache:
        """Shards a cache as its layers say, within a compiled program."""
        return tuple(map(self.as_layer, cache))


def sharded_model(config: ModelConfig, engine: EngineConfig) -> ShardedModel:
    """Returns what the programs of an engine depend on."""
    return ShardedModel(
        config=config.traced,
        mesh=engine.mesh,
        dtype=engine.dtype,
        weight_dtype=engine.weight_dtype,
        zigzag=engine.zigzag,
        compression=engine.compression,
    )


def _all_gather_weights(model: ShardedModel) -> Callable[[str, dict], dict]:
    """Returns a function that all-gathers a layer's weights over the context axis.

    The tokens of a chunk are split over that axis. Left to itself, XLA would send the activations
    of all tokens back and forth instead, which for a long chunk is far more data than the weights.
    """
    parameters = abstract_parameters(model.config, model.mesh, model.dtype, model.weight_dtype)
    whole = unflatten(
        {
            path: sharding(model.mesh, drop_axis(x.sharding.spec, "context"))
            for path, x in parameters.items()
        }
    )
    return lambda name, weights: jax.lax.with_sharding_constraint(weights, whole[name])
