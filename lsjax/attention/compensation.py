"""Attention to the token that stands for those that a compressed cache has dropped."""

import jax
import jax.numpy as jnp

from lsjax.attention.partial import Partial
from lsjax.cache import Dropped
from lsjax.precision import einsum


def compensation(q: jax.Array, dropped: Dropped) -> Partial:
    """Attention of queries to it.

    Its score is raised by the log of how many they are, after scaling: with equal keys it has the
    weight that all of them had. Source: RazorAttention (arXiv 2407.15891).

    Args:
      q: [batch, kv_heads, group, length, head_dim], already scaled by 1/sqrt(head_dim).
      dropped: of these heads.
    """
    scores = einsum("bkgld,bkd->bkgl", q.astype(jnp.float32), dropped.k)
    lse = scores + jnp.log(dropped.count.astype(jnp.float32))[:, None, None, None]
    values = jnp.where(dropped.count > 0, 1.0, 0.0)[:, None, None] * dropped.v
    return Partial(jnp.broadcast_to(values[:, :, None, None], q.shape), lse)
