"""Causal attention written plainly in JAX: all scores at once, gradients by differentiation."""

import jax
import jax.numpy as jnp

from lsjax.runtime.precision import einsum


def causal_attention(q, k, v, window=None, slopes=None, begin=0):
    """softmax(q k^T / sqrt(head_dim)) v over the tokens begin .. itself that a window reaches.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      window: a token sees itself and the window - 1 tokens before it, or None.
      slopes: [heads] of ALiBi, or None.
      begin: [batch, length], or one for all.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = einsum("bqkgd,bskd->bkgqs", grouped, k) * head_dim**-0.5
    at = jnp.arange(length)
    distance = at[:, None] - at
    if slopes is not None:
        scores -= slopes.reshape(*grouped.shape[2:4], 1, 1) * distance
    visible = (distance >= 0) & (at >= jnp.broadcast_to(begin, (batch, length))[..., None])
    if window is not None:
        visible &= distance < window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape).astype(q.dtype)
