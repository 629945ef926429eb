"""Grouped-query attention with rotary positions or ALiBi and an explicit cache."""

import flax.linen as nn
import jax
from jax.sharding import Mesh

from lsjax.attention import compressed
from lsjax.attention.cached import write_and_attend
from lsjax.attention.differentiable import self_attention
from lsjax.cache import CompressedCache, LayerCache
from lsjax.config import ModelConfig
from lsjax.nn.linear import Linear, RMSNorm
from lsjax.positions.rotary import rotate

Places = tuple[jax.Array, jax.Array] | jax.Array


class Attention(nn.Module):
    """Projections, optional norms of q and k, rotation, attention over the cache, projection.

    Attributes:
      config: the model.
      mesh: see lsjax.sharding.
      window: this layer's sliding window, or None.
    """

    config: ModelConfig
    mesh: Mesh
    window: int | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        places: Places,
        cache: LayerCache | CompressedCache | None,
        lengths: jax.Array | None,
        decode: bool,
        begin: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | CompressedCache | None]:
        """[batch, length, hidden] -> the same, and the cache with these tokens written.

        `places` tells the heads where tokens are: cos and sin at their positions, each [batch,
        length, rotary_dim / 2], or the slopes of ALiBi, [heads] in the order of the heads.

        Without a cache the tokens are whole rows, and gradients flow; see self_attention for
        their order and `begin`.
        """
        c = self.config

        def heads(name: str, count: int, axis: str) -> jax.Array:
            y = Linear(count * c.head_dim, (axis, "embed"), c.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:2], count, c.head_dim)

        q = heads("q", c.num_heads, "heads")
        k = heads("k", c.num_kv_heads, "kv_heads")
        v = heads("v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, name="k_norm")(k)
        slopes = places if c.alibi else None
        if not c.alibi:
            q = rotate(q, *places, c.rope_interleaved)
            k = rotate(k, *places, c.rope_interleaved)
        # What heads look at is asked for to find those that retrieve; else nothing is kept.
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        if cache is None:
            y = self_attention(self.mesh, q, k, v, begin, self.window, slopes)
        elif isinstance(cache, CompressedCache):
            y, cache = compressed.write_and_attend(
                self.mesh, q, k, v, positions, lengths, cache, decode, slopes
            )
        else:
            y, cache = write_and_attend(
                self.mesh, q, k, v, positions, lengths, cache, decode, self.window, slopes
            )
        y = y.reshape(*y.shape[:2], c.num_heads * c.head_dim)
        return Linear(c.hidden_size, ("embed", "heads"), c.out_bias, name="o")(y), cache
