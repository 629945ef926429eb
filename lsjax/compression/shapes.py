"""What a compressed cache is made of, before there is one."""

import jax

from lsjax.cache import CacheSpec, CompressedCache, Parts, Zigzag, compress, empty_layer
from lsjax.compression.razor import Compression
from lsjax.config import ModelConfig


def compressed_shapes(
    config: ModelConfig,
    spec: CacheSpec,
    compression: Compression,
    room: int,
    context: int,
    platform: str = "cpu",
) -> list[CompressedCache]:
    """Of each layer, of jax.ShapeDtypeStruct.

    Args:
      config: the model.
      spec: of the cache before it is compressed.
      compression: of the KV heads.
      room: tokens of prompt that there is room for.
      context: devices that positions are dealt out to.
      platform: that it runs on: cpu, gpu (or cuda) or tpu.
    """
    lengths = jax.ShapeDtypeStruct((spec.batch,), "int32")
    whole = jax.eval_shape(lambda: empty_layer(config, spec, platform))
    zigzag, layers = Zigzag(context, spec.stripe), compression.parts(room)

    def kept_by(parts: Parts) -> CompressedCache:
        return jax.eval_shape(
            lambda cache, n: compress(cache, n, parts, compression.shards, zigzag), whole, lengths
        )

    of = {parts: kept_by(parts) for parts in set(layers)}
    return [of[parts] for parts in layers]
