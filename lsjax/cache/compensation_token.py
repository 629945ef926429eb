"""The token that stands for those that a window has dropped; see WindowCache.

Source: RazorAttention (arXiv 2407.15891).
"""

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial
from lsjax.runtime.precision import einsum


@flax.struct.dataclass
class CompensationToken:
    """The compensation token of each head, which stands for the tokens that the head has dropped.

    Attributes:
      k, v: [batch, kv_heads, head_dim] float32 means of the dropped keys and values; keys in the
        form that queries attend to.
      count: [batch] number of dropped tokens.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array

    def add(self, k: jax.Array, v: jax.Array, valid: jax.Array) -> "CompensationToken":
        """Adds one dropped token to each row in which `valid` [batch] is true.

        `k` and `v` are [batch, kv_heads, head_dim] float32.
        """
        count = self.count + valid
        share = (valid / jnp.maximum(count, 1))[:, None, None]
        return CompensationToken(
            self.k + share * (k - self.k), self.v + share * (v - self.v), count
        )

    def count_between(self, begin: jax.Array, end: jax.Array, sinks: int) -> jax.Array:
        """Returns how many of the positions begin .. end - 1 were dropped, shaped as `begin`.

        The dropped ones follow the `sinks`. `begin` and `end` are [batch, queries].
        """
        stop = jnp.minimum(end, sinks + self.count[:, None])
        return jnp.maximum(stop - jnp.maximum(begin, sinks), 0)


def attend_to_compensation_token(
    q: jax.Array, token: CompensationToken, count: jax.Array | None = None
) -> Partial:
    """Computes attention of queries to the compensation token.

    The log of the number of dropped tokens is added to the scaled score: with equal keys, the
    compensation token gets their combined weight. Source: RazorAttention (arXiv 2407.15891).

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      token: compensation token of these heads.
      count: [batch, length] number of dropped tokens that each query sees; None for all.
    """
    count = token.count[:, None] if count is None else count
    scores = einsum("bkgld,bkd->bkgl", q.astype(jnp.float32), token.k)
    lse = scores + jnp.log(count.astype(jnp.float32))[:, None, None]
    seen = jnp.where(count > 0, 1.0, 0.0)[:, None, None, :, None]
    values = jnp.broadcast_to(seen * token.v[:, :, None, None], q.shape)
    return Partial(values, lse)
