"""One decoder layer: attention or a recurrence, and an MLP, around the residual stream."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from lsjax.attention.differentiable import self_attention
from lsjax.cache import LayerCache
from lsjax.config import LayerKind, ModelConfig
from lsjax.nn.attention import Attention, LayerInputs, SelfAttention
from lsjax.nn.layer_modules import mlp_module, recurrence_module
from lsjax.nn.linear import RMSNorm


class Block(nn.Module):
    """Pre-norm attention, or a recurrence, and MLP.

    Families with post norms also normalize what is added back.

    `kind` is that of the layer. See Attention for the other attributes, and for the arguments and
    results of `__call__`.
    """

    config: ModelConfig
    mesh: Mesh
    kind: LayerKind
    self_attention: SelfAttention = self_attention

    def setup(self):
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, c.zero_centered_norms)
        self.attn_norm = norm()
        if net := self.kind.recurrence:
            self.recurrence = recurrence_module(net)(net, c, self.mesh, name=net.name)
        else:
            self.attn = Attention(c, self.mesh, self.kind.window, self.self_attention)
        self.mlp_norm = norm()
        self.mlp = mlp_module(c.mlp_of(self.kind), self.mesh)
        if c.post_norms:
            self.post_attn_norm = norm()
            self.post_mlp_norm = norm()

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        x, cache = self.attend(x, inputs, cache)
        return self.feed_forward(x, inputs.decode), cache

    def attend(self, x, inputs, cache):
        """Runs the half that mixes tokens, attention or a recurrence; see `__call__`."""
        if self.kind.recurrence:
            y, cache = self.recurrence(self.attn_norm(x), inputs, cache)
        else:
            y, cache = self.attn(self.attn_norm(x, inputs.decode), inputs, cache)
        return x + (self.post_attn_norm(y) if self.config.post_norms else y), cache

    def feed_forward(self, x: jax.Array, decode: bool = False) -> jax.Array:
        """Runs the MLP half on each token separately; [batch, length, hidden] in and out."""
        y = self.mlp(self.mlp_norm(x, decode and self.mlp.takes_scaled), decode)
        return x + (self.post_mlp_norm(y) if self.config.post_norms else y)

    def loss_terms(self, x: jax.Array) -> Any:
        """Returns the terms of the MLP's own loss in training; see layer_modules.own_loss."""
        return self.mlp.loss_terms(self.mlp_norm(x))
