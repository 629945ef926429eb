"""What a compressed cache is made of, before there is one."""

import jax

from lsjax.cache import CacheSpec, CompressedCache, Zigzag, compress, empty_layer
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
    window, zigzag = compression.window(room), Zigzag(context, spec.stripe)

    def kept_by(heads: int) -> CompressedCache:
        return jax.eval_shape(
            lambda cache, n: compress(cache, n, heads, compression.shards, zigzag, window),
            whole,
            lengths,
        )

    of = {heads: kept_by(heads) for heads in set(compression.kept)}
    return [of[heads] for heads in compression.kept]
