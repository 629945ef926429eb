"""The gated MLP of a decoder layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lsjax.nn.linear import Linear, Scaled


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv 2002.05202.

    Attributes:
      width: width of gate and up.
      use_bias: whether the projections add a bias.
    """

    width: int
    use_bias: bool = False

    takes_scaled = True

    @nn.compact
    def __call__(self, x: jax.Array | Scaled, decode: bool = False) -> jax.Array:
        """Runs [batch, length, hidden], in a decode step as elsewhere."""
        gate, up = (
            Linear(self.width, ("mlp", "embed"), self.use_bias, name=name)(x)
            for name in ("gate", "up")
        )
        down = Linear(x.shape[-1], ("embed", "mlp"), self.use_bias, name="down")
        return down(gated(gate, up))


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up in their dtype."""
    if up.dtype == jnp.float32:
        return nn.silu(gate) * up
    return jax.lax.platform_dependent(
        gate, up, cpu=_rounded_once, default=lambda gate, up: nn.silu(gate) * up
    )


def _rounded_once(gate: jax.Array, up: jax.Array) -> jax.Array:
    # A CPU takes long to round. On a TPU, XLA would hold both in float32.
    return (nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)
