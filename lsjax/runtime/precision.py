"""Matrix products at the precision of their inputs."""

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Computes an einsum that is accumulated and returned in float32.

    float32 inputs are multiplied in float32; by default accelerators would first round them to
    bfloat16 or TF32.
    """
    exact = all(x.dtype == jnp.float32 for x in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)
