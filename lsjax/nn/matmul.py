"""Products of activations and weight matrices, float or int8."""

import jax
import jax.numpy as jnp

from lsjax.runtime.precision import einsum

# Numbers of vectors that a CPU multiplies as columns: of float32, and of bfloat16.
CPU_COLUMN_BATCH = {"float32": range(2, 33), "bfloat16": range(1, 33)}
# Numbers of vectors that a CPU multiplies by int8 weights without widening the matrix.
CPU_DIGIT_BATCH = range(1, 9)
# Base of the digits of an activation: they are int8, and rounding leaves half a step on each side.
_BASE = 254


def matmul(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Multiplies x [batch, length, in] by weight [out, in]: [batch, length, out] float32.

    Args:
      x: activations.
      weight: matrix in the dtype of x, or int8.
      scale: [out] scale of an int8 matrix; None for a float one.
    """
    vectors = x.shape[0] * x.shape[1]
    if scale is not None:
        cpu = _digits if vectors in CPU_DIGIT_BATCH else _widened
        return jax.lax.platform_dependent(x, weight, cpu=cpu, default=_rows) * scale
    if vectors not in CPU_COLUMN_BATCH.get(x.dtype.name, ()):
        return _rows(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_columns, default=_rows)


def _rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum("bli,oi->blo", x, weight.astype(x.dtype))


def _columns(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies a few vectors with the matrix on the left.

    XLA on a CPU repacks the right operand, here the vectors rather than the matrix.
    """
    vectors = x.reshape(-1, x.shape[-1])
    # XLA takes three times as long for a single bfloat16 vector as for two.
    alone = x.dtype == jnp.bfloat16 and len(vectors) == 1
    if alone:
        vectors = jnp.concatenate([vectors, vectors])
    # Without the barriers XLA would move the vectors back to the left.
    vectors = jax.lax.optimization_barrier(vectors)
    y = jax.lax.optimization_barrier(einsum("oi,vi->ov", weight, vectors))
    return (y[:, :1] if alone else y).T.reshape(*x.shape[:-1], -1)


def _widened(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies many vectors: the matrix is widened for the time of the product."""
    # XLA on a CPU drops barriers before it orders operations, and would widen the matrices of all
    # layers first. A zero that depends on x makes each of them wait.
    zero = (0 * x[0, 0, 0]).astype(weight.dtype)
    return _rows(x, weight + zero)


def _digits(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies a few vectors in int8, each split into digits, at the precision of their dtype.

    XLA's int8 products on a CPU read the matrix as it is, but are slow for a single vector. A
    vector's digits make it several: two hold 15 bits of its largest entry, three hold 23.
    """
    count = 3 if x.dtype == jnp.float32 else 2
    wide = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / (_BASE / 2)
    left = wide / jnp.where(step > 0, step, 1.0)
    digits = []
    for _ in range(count):
        digits.append(jnp.round(left))
        left = (left - digits[-1]) * _BASE
    y = jnp.zeros((), jnp.float32)
    for product in _columns(jnp.stack(digits).astype(jnp.int8), weight)[::-1]:
        y = y / _BASE + product.astype(jnp.float32)
    return y * step
