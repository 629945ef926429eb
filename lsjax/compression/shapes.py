"""Shapes of a compressed cache, before it is allocated."""

import jax

from lsjax.cache import CacheSpec, CompressedCache, HeadGroups, compress, empty_layer
from lsjax.compression.razor import Compression
from lsjax.config import ModelConfig


def compressed_shapes(
    config: ModelConfig,
    spec: CacheSpec,
    compression: Compression,
    prompt_capacity: int,
    platform: str = "cpu",
) -> list[CompressedCache]:
    """Returns each layer's compressed cache, with jax.ShapeDtypeStruct in place of arrays.

    Args:
      config: model configuration.
      spec: spec of the cache before compression.
      compression: compression of the KV heads.
      prompt_capacity: longest prompt that the cache holds, in tokens.
      platform: cpu, gpu (or cuda) or tpu.
    """
    lengths = jax.ShapeDtypeStruct((spec.batch,), "int32")
    whole = jax.eval_shape(lambda: empty_layer(config, spec, platform))
    layers = compression.parts(prompt_capacity)

    def kept_by(parts: HeadGroups) -> CompressedCache:
        return jax.eval_shape(
            lambda cache, n: compress(cache, n, parts, compression.shards, spec.zigzag),
            whole,
            lengths,
        )

    of = {parts: kept_by(parts) for parts in set(layers)}
    return [of[parts] for parts in layers]
