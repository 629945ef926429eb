"""Products that keep what their inputs promise."""

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """einsum accumulated and returned in float32.

    float32 inputs are multiplied as float32: accelerators would otherwise round them to bfloat16
    or TF32 on the way in.
    """
    exact = all(x.dtype == jnp.float32 for x in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)
