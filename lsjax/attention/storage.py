"""Memory layout and storage dtype of a KVArray's arrays, by platform."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_LANES = 128  # of a TPU vector


def with_tpu_layout(x: jax.Array, platform: str) -> jax.Array:
    """Constrains a cache array, or an update to it, to the layout that the TPU kernel reads.

    On TPU the attention kernel reads rows of whole vectors: channels are innermost if their number
    is a multiple of the lanes, else slots are. By itself XLA would choose the layout that suits
    writing one token, and would copy the cache between the two layouts at every step. Other
    platforms need no constraint.

    Args:
      x: [batch, kv_heads, slots, ...].
      platform: cpu, gpu (or cuda) or tpu.
    """
    if platform != "tpu":
        return x
    order = list(range(x.ndim))
    if x.ndim == 4 and x.shape[3] % _LANES:
        order[2:] = [3, 2]
    return with_layout_constraint(x, Layout(major_to_minor=tuple(order)))


def narrow_dtype(platform: str) -> jnp.dtype:
    """Returns the dtype that bfloat16 entries are stored in: on CPU uint16, for their bits.

    XLA on CPU has no native bfloat16: to write one entry it would convert the whole array to
    float32 and back, at every step.
    """
    return jnp.dtype(jnp.uint16 if platform == "cpu" else jnp.bfloat16)


def to_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts `x` to the storage dtype `dtype`; uint16 means the bits of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
    return x.astype(dtype)


def from_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts stored entries to the float dtype `dtype`; the inverse of `to_storage`."""
    if x.dtype == jnp.uint16:
        if dtype == jnp.bfloat16:
            return jax.lax.bitcast_convert_type(x, dtype)
        x = jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(dtype)
