"""One decoder layer: attention and a gated MLP around the residual stream."""

import flax.linen as nn
import jax
from jax.sharding import Mesh

from lsjax.cache import LayerCache
from lsjax.config import ModelConfig
from lsjax.nn.attention import Attention, Places
from lsjax.nn.linear import Linear, RMSNorm


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate, up = (
            Linear(c.intermediate_size, ("mlp", "embed"), c.mlp_bias, name=name)(x)
            for name in ("gate", "up")
        )
        down = Linear(c.hidden_size, ("embed", "mlp"), c.mlp_bias, name="down")
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP; families with post norms also norm what is added back."""

    config: ModelConfig
    mesh: Mesh
    window: int | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        places: Places,
        cache: LayerCache | None,
        lengths: jax.Array | None,
        decode: bool,
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config

        def norm(name: str, y: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, name=name)(y)

        attention = Attention(c, self.mesh, self.window, name="attn")
        y, cache = attention(norm("attn_norm", x), positions, places, cache, lengths, decode)
        x = x + (norm("post_attn_norm", y) if c.post_norms else y)
        y = GatedMLP(c, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("post_mlp_norm", y) if c.post_norms else y)
        return x, cache
