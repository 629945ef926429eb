"""One decoder layer: attention and an MLP around the residual stream."""

import flax.linen as nn
import jax
from jax.sharding import Mesh

from lsjax.attention.differentiable import self_attention
from lsjax.cache import LayerCache
from lsjax.config import LayerKind, ModelConfig
from lsjax.nn.attention import Attention, LayerInputs, SelfAttention
from lsjax.nn.experts import MixtureOfExperts
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
    """Pre-norm attention and MLP; families with post norms also normalize what is added back.

    `kind` is that of the layer. See Attention for the other attributes, and for the arguments and
    results of `__call__`.
    """

    config: ModelConfig
    mesh: Mesh
    kind: LayerKind
    self_attention: SelfAttention = self_attention

    def setup(self):
        c = self.config
        self.attn_norm = RMSNorm(c.norm_eps)
        self.attn = Attention(c, self.mesh, self.kind.window, self.self_attention)
        self.mlp_norm = RMSNorm(c.norm_eps)
        experts = self.kind.experts
        self.mlp = MixtureOfExperts(experts, self.mesh) if experts else GatedMLP(c)
        if c.post_norms:
            self.post_attn_norm = RMSNorm(c.norm_eps)
            self.post_mlp_norm = RMSNorm(c.norm_eps)

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        x, cache = self.attend(x, inputs, cache)
        return self.feed_forward(x, inputs.decode), cache

    def attend(self, x, inputs, cache):
        """Runs the attention half, which mixes tokens; arguments and results as in `__call__`."""
        y, cache = self.attn(self.attn_norm(x), inputs, cache)
        return x + (self.post_attn_norm(y) if self.config.post_norms else y), cache

    def feed_forward(self, x: jax.Array, decode: bool = False) -> jax.Array:
        """Runs the MLP half on each token separately; [batch, length, hidden] in and out."""
        y = self.mlp_norm(x)
        y = self.mlp(y, decode) if self.kind.experts else self.mlp(y)
        return x + (self.post_mlp_norm(y) if self.config.post_norms else y)

    def balance(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns how a layer's router spreads the tokens; see MixtureOfExperts.balance."""
        return self.mlp.balance(self.mlp_norm(x))
