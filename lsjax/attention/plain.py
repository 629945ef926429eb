"""Causal attention of a whole sequence to itself, scores and all: differentiable and short."""

import jax
import jax.numpy as jnp

from lsjax.precision import einsum


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v; memory grows with the square of the length.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      window: sliding window in tokens, or None.
      slopes: [heads] of ALiBi, or None.

    Returns:
      Like q.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = einsum("bqkgd,bskd->bkgqs", grouped, k) * head_dim**-0.5
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    if slopes is not None:
        scores -= slopes.reshape(*grouped.shape[2:4], 1, 1) * distance
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape).astype(q.dtype)
