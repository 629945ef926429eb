"""Grouped-query attention with rotary positions or ALiBi and an explicit KV cache."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
from jax.sharding import Mesh

from lsjax.attention.differentiable import self_attention
from lsjax.cache import LayerCache, update_and_attend
from lsjax.config import ModelConfig
from lsjax.nn.linear import Linear, RMSNorm
from lsjax.positions.rotary import RotaryTables, cos_sin, rotate

# (mesh, q, k, v, begin, window, slopes) -> output; see self_attention.
SelfAttention = Callable[..., jax.Array]


@flax.struct.dataclass
class PositionInputs:
    """What a layer is given of positions.

    Attributes:
      tables: rotary tables of the batch; None with ALiBi.
      slopes: [heads] ALiBi slopes in the order of the heads, or None.
      angles: cos and sin at the tokens' positions, each [batch, length, rotary_dim / 2]; None with
        ALiBi, and before the positions are known.
    """

    tables: RotaryTables | None = None
    slopes: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None

    def at(self, positions: jax.Array) -> "PositionInputs":
        """Returns the inputs with the angles at [batch, length] positions."""
        if self.tables is None:
            return self
        return self.replace(angles=cos_sin(self.tables, positions))


class Attention(nn.Module):
    """Q, K and V projections, optional Q and K norms, rotation, attention, output projection.

    Attributes:
      config: model configuration.
      mesh: see lsjax.distributed.sharding.
      window: this layer's sliding window, or None.
      self_attention: attention of whole rows, without a cache.
    """

    config: ModelConfig
    mesh: Mesh
    window: int | None
    self_attention: SelfAttention = self_attention

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        inputs: PositionInputs,
        cache: LayerCache | None,
        lengths: jax.Array | None,
        decode: bool,
        begin: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps [batch, length, hidden] to the same shape, and writes the tokens to the cache.

        Without a cache the tokens are whole rows, and gradients flow.

        Args:
          x: [batch, length, hidden] activations.
          positions: [batch, length]; see update_and_attend.
          inputs: rotary angles or ALiBi slopes.
          cache: this layer's cache, or None.
          lengths: [batch] total number of tokens in each row, or None.
          decode: whether these are the few tokens of a decode step.
          begin: first token that each token sees, without a cache; see self_attention, also for
            the order of the tokens.

        Returns:
          [batch, length, hidden] output, and the cache with the tokens written.
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
        if inputs.angles is not None:
            q = rotate(q, *inputs.angles, c.rope_interleaved)
            k = rotate(k, *inputs.angles, c.rope_interleaved)
        # Recorded on request, to find retrieval heads; otherwise nothing is stored.
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        if cache is None:
            y = self.self_attention(self.mesh, q, k, v, begin, self.window, inputs.slopes)
        else:
            tokens = q, k, v, positions, lengths
            rotation = inputs.tables, c.rope_interleaved
            y, cache = update_and_attend(
                self.mesh, *tokens, cache, decode, self.window, inputs.slopes, *rotation
            )
        y = y.reshape(*y.shape[:2], c.num_heads * c.head_dim)
        return Linear(c.hidden_size, ("embed", "heads"), c.out_bias, name="o")(y), cache
