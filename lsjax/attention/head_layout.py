"""Layouts of queries, keys and values: by token outside attention, by head inside."""

import jax


def by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales queries, and moves the head axis of queries, keys and values forward.

    Args:
      q: [batch, length, heads, head_dim], not yet scaled.
      k, v: [batch, length, kv_heads, head_dim].

    Returns:
      q [batch, kv_heads, group, length, head_dim], scaled, in v's dtype; k and v [batch, kv_heads,
      length, head_dim].
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = (q * head_dim**-0.5).astype(v.dtype)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def by_token(values: jax.Array) -> jax.Array:
    """Transposes [batch, kv_heads, group, length, head_dim] to [batch, length, heads, head_dim]."""
    batch, kv_heads, group, length, head_dim = values.shape
    return values.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)
