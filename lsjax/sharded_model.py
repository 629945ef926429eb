"""A model on a mesh as its programs see it: what is static when they are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.cache import KVCache, Zigzag, stripe_of
from lsjax.compression import Compression
from lsjax.compression.arrange import query_heads
from lsjax.config import ModelConfig
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.sharding import TOKENS, cache_shardings, sharding, without


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedModel:
    """What programs depend on, beside the shapes of their arguments.

    Attributes:
      config: the model, see ModelConfig.traced.
      mesh: the devices.
      dtype: of weights and activations.
      cache_dtype: one of CACHE_DTYPES.
      stripe: how positions lie along the context axis, see Zigzag.
      compression: of the KV heads, or None.
      compiled: its programs, see Program.
    """

    config: ModelConfig
    mesh: Mesh
    dtype: str
    cache_dtype: str
    stripe: int
    compression: Compression | None
    compiled: dict[Any, Callable] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def zigzag(self) -> Zigzag:
        return Zigzag(self.mesh.shape["context"], self.stripe)

    @functools.cached_property
    def decoder(self) -> Decoder:
        gather = _gather(self) if self.mesh.shape["context"] > 1 else None
        heads = self.compression and query_heads(self.config, self.compression)
        return Decoder(self.config, self.mesh, jnp.dtype(self.dtype), gather, heads)

    @property
    def rows(self) -> NamedSharding:
        """Where an array lies whose first axis are the rows of a batch."""
        return sharding(self.mesh, TOKENS)

    @property
    def replicated(self) -> NamedSharding:
        return sharding(self.mesh, PartitionSpec())

    @property
    def cache(self) -> KVCache:
        """The shardings of an uncompressed cache."""
        return cache_shardings(self.config, self.mesh, self.cache_dtype, self.stripe)

    @property
    def cache_after_step(self) -> KVCache | None:
        """The shardings of the cache that a step returns.

        A compressed cache's structure depends on its size; it stays where attention leaves it.
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
    """The model of an engine: one and the same for engines whose programs are the same.

    Args:
      config: the model.
      mesh: the devices.
      dtype: of weights and activations.
      cache_dtype: one of CACHE_DTYPES.
      chunk: tokens of prompt run at once; decides where positions lie on a context axis.
      compression: of the KV heads, or None.
    """
    stripe = stripe_of(chunk, mesh.shape["context"])
    return _shared(config.traced, mesh, dtype, cache_dtype, stripe, compression)


# A few models: the compiled programs of one take many of the memory mappings of a process.
@functools.lru_cache(maxsize=8)
def _shared(*static: Any) -> ShardedModel:
    return ShardedModel(*static)


def forget_compiled_programs() -> None:
    """Lets go of programs that no engine holds any more."""
    _shared.cache_clear()


def _gather(model: ShardedModel) -> Callable[[str, dict], dict]:
    """Makes a layer's weights whole along the context axis, over which the tokens of a chunk are
    split. Left to itself XLA would rather send the activations of all tokens to and fro, far more
    than the weights for a long chunk."""
    parameters = abstract_parameters(model.config, model.mesh, model.dtype)
    whole = unflatten(
        {
            path: sharding(model.mesh, without(x.sharding.spec, "context"))
            for path, x in parameters.items()
        }
    )
    return lambda name, weights: jax.lax.with_sharding_constraint(weights, whole[name])
