"""Matrix products at the precision of their inputs."""

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Computes an einsum that is accumulated and returned in float32, that of int8 in int32.

    float32 inputs are multiplied in float32; by default accelerators would first round them to
    bfloat16 or TF32.
    """
    exact = all(x.dtype == jnp.float32 for x in operands)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    total = jnp.int32 if all(x.dtype == jnp.int8 for x in operands) else jnp.float32
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=total)
