"""Causal attention of a whole sequence to itself: differentiable, for sequences that are short."""

import functools

import jax
import jax.numpy as jnp

from lsjax.precision import einsum

_QUERIES = (
    128  # a block of queries sees no later key, and keeps its scores in the processor's cache
)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v, by blocks of queries.

    Scores are computed again for the gradient, so that memory grows with the length.

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
    if slopes is not None:
        slopes = slopes.reshape(*grouped.shape[2:4], 1, 1)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def attend(start: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = einsum("bqkgd,bskd->bkgqs", q, k) * head_dim**-0.5
        distance = start + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
        if slopes is not None:
            scores -= slopes * distance
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return einsum("bkgqs,bskd->bqkgd", weights, v)

    parts = []
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        parts.append(attend(start, grouped[:, start:end], k[:, :end], v[:, :end]))
    return jnp.concatenate(parts, axis=1).reshape(q.shape).astype(q.dtype)
