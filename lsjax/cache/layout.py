"""How a store's arrays lie in memory, by platform."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_LANES = 128  # of a TPU's vectors


def pinned(x: jax.Array, platform: str) -> jax.Array:
    """A store's array, or what is written to it, [batch, kv_heads, slots, ...], where it lies.

    On a TPU the attention kernel reads rows of whole vectors: channels innermost where they are a
    multiple of the lanes, else slots. Left to itself XLA takes the layout that suits the writing
    of one token, and copies the cache between the two at every step. Elsewhere it needs no telling.
    """
    if platform != "tpu":
        return x
    order = list(range(x.ndim))
    if x.ndim == 4 and x.shape[3] % _LANES:
        order[2:] = [3, 2]
    return with_layout_constraint(x, Layout(major_to_minor=tuple(order)))


def narrow_dtype(platform: str) -> jnp.dtype:
    """What a store holds bfloat16 entries in: on a CPU, uint16, their bits.

    XLA has no bfloat16 there: to write one entry of an array it would widen the whole of it and
    narrow it again, at every step.
    """
    return jnp.dtype(jnp.uint16 if platform == "cpu" else jnp.bfloat16)


def to_held(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x as the entries of an array of `dtype`, where uint16 stands for the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
    return x.astype(dtype)


def to_floats(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Entries in the floats of `dtype`; the inverse of `to_held`."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(dtype)
