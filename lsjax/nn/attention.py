"""Grouped-query attention with rotary positions or ALiBi and an explicit KV cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.attention.differentiable import self_attention
from lsjax.cache import LayerCache, update_and_attend
from lsjax.config import ModelConfig
from lsjax.nn.linear import Linear, RMSNorm
from lsjax.positions.rotary import RotaryTables, cos_sin, rotate

# (mesh, q, k, v, begin, window, slopes) -> output; see self_attention.
SelfAttention = Callable[..., jax.Array]


@flax.struct.dataclass
class LayerInputs:
    """What a layer is told of its tokens, beside their activations.

    Attributes:
      positions: [batch, length]; see update_and_attend.
      lengths: [batch] total number of tokens in each row; later ones are padding. Or None.
      begin: [batch, length] first token that each token sees, without a cache; see self_attention,
        also for the order of the tokens.
      tables: rotary tables of the batch; None with ALiBi.
      angles: cos and sin at the positions, each [batch, length, rotary_dim / 2]; None with ALiBi.
        With dual chunk attention they are those of the keys.
      query_angles: those of the queries for each range of keys, where they differ; else None.
      slopes: [heads] ALiBi slopes in the order of the heads, or None.
      decode: whether these are the few tokens of a decode step, not a prefill chunk.
    """

    positions: jax.Array | None = None
    lengths: jax.Array | None = None
    begin: jax.Array | None = None
    tables: RotaryTables | None = None
    angles: tuple[jax.Array, jax.Array] | None = None
    query_angles: tuple[tuple[jax.Array, jax.Array], ...] | None = None
    slopes: jax.Array | None = None
    decode: bool = flax.struct.field(pytree_node=False, default=False)

    def at(self, positions: jax.Array, **changes: Any) -> "LayerInputs":
        """Returns the inputs at other positions, with their angles and with other changes."""
        tables, given = self.tables, {"positions": positions, **changes}
        if tables is None:
            return self.replace(**given)
        if tables.chunks is None:
            return self.replace(angles=cos_sin(tables, positions), **given)
        return self.replace(
            angles=cos_sin(tables, tables.chunks.key_position(positions)),
            query_angles=tuple(
                cos_sin(tables, at) for at in tables.chunks.query_positions(positions)
            ),
            **given,
        )

    def rotated(self, q: jax.Array, interleaved: bool) -> jax.Array:
        """Rotates queries [batch, length, heads, head_dim], for each range of keys that they see.

        Returns:
          [batch, length, heads, views * head_dim], one view after the other; see Step.
        """
        if self.query_angles is None:
            return q if self.angles is None else rotate(q, *self.angles, interleaved)
        scaled = q.astype(jnp.float32) * self.tables.score_factor[:, None, None, None]
        views = [rotate(scaled, *angles, interleaved) for angles in self.query_angles]
        return jnp.concatenate(views, axis=-1).astype(q.dtype)


class Attention(nn.Module):
    """Q, K and V projections, optional Q and K norms, rotation, attention, output projection.

    With a gate, Q gives the query of a head and then its gate.

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
        inputs: LayerInputs,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Maps [batch, length, hidden] to the same shape, and writes the tokens to the cache.

        Without a cache the tokens are whole rows, and gradients flow.
        """
        c = self.config

        def heads(name: str, count: int, axis: str, parts: int = 1) -> jax.Array:
            y = Linear(count * parts * c.head_dim, (axis, "embed"), c.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:2], count, parts * c.head_dim)

        q, gate = heads("q", c.num_heads, "heads", 1 + c.gated_attention), None
        if c.gated_attention:
            q, gate = jnp.split(q, 2, axis=-1)
        k = heads("k", c.num_kv_heads, "kv_heads")
        v = heads("v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.zero_centered_norms, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.zero_centered_norms, name="k_norm")(k)
        q = inputs.rotated(q, c.rope_interleaved)
        if inputs.angles is not None:
            k = rotate(k, *inputs.angles, c.rope_interleaved)
        # Recorded on request, to find retrieval heads; otherwise nothing is stored.
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        if cache is None:
            slopes, begin = inputs.slopes, inputs.begin
            y = self.self_attention(self.mesh, q, k, v, begin, self.window, slopes)
        else:
            y, cache = update_and_attend(
                self.mesh,
                q,
                k,
                v,
                inputs.positions,
                inputs.lengths,
                cache,
                inputs.decode,
                window=self.window,
                slopes=inputs.slopes,
                tables=inputs.tables,
                rope_interleaved=c.rope_interleaved,
            )
        if gate is not None:
            y = y * nn.sigmoid(gate)
        y = y.reshape(*y.shape[:2], c.num_heads * c.head_dim)
        return Linear(c.hidden_size, ("embed", "heads"), c.out_bias, name="o")(y), cache
