"""Hadamard transform of a head's channels, which spreads outliers before keys are quantized.

Keys have a few channels that are far larger than the others (in Qwen, because of its biases). A
quantization step that fits those is too coarse for the rest. After a Hadamard transform every
channel is a signed sum of all channels, so no channel stands out. The transform is orthogonal:
with queries transformed too, all scores stay the same. Nothing has to be calibrated.
Source: QuaRot (arXiv 2404.00456). Matrices whose order is not a power of two use Paley's
construction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.runtime.precision import einsum


def hadamard_transform(x: jax.Array) -> jax.Array:
    """Transforms [..., head_dim] to float32 of the same shape; dot products are preserved."""
    signs = hadamard_signs(x.shape[-1], x.dtype)
    return einsum("...d,de->...e", x, signs) * x.shape[-1] ** -0.5


def undo_hadamard_transform(x: jax.Array) -> jax.Array:
    """Returns what `hadamard_transform` maps to [..., head_dim], in float32."""
    signs = hadamard_signs(x.shape[-1], x.dtype)
    return einsum("...e,de->...d", x, signs) * x.shape[-1] ** -0.5


def hadamard_signs(width: int, dtype: jnp.dtype) -> jax.Array:
    """Returns hadamard_matrix, in `dtype` if it is exact there, else in float32."""
    matrix = hadamard_matrix(width)
    return jnp.asarray(matrix, dtype if np.all(np.abs(matrix) == 1) else jnp.float32)


@functools.cache
def hadamard_matrix(width: int) -> np.ndarray:
    """Returns [width, width] float32, an orthogonal matrix times sqrt(width).

    Entries are 1 and -1 if a Hadamard matrix of that order is available (64, 80, 96, 128, 256 and
    most multiples of 4). Otherwise the matrix is the Kronecker product of a cosine transform, for
    the odd part of the width, and a Hadamard matrix.
    """
    odd = width // (width & -width)
    found = _hadamard(width)
    if found is None:
        found = np.kron(_cosines(odd), _hadamard(width // odd))
    return found.astype(np.float32)


def _hadamard(order: int) -> np.ndarray | None:
    if order == 1:
        return np.ones((1, 1))
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley(order - 1)
    half = _hadamard(order // 2) if order % 2 == 0 else None
    return None if half is None else np.kron([[1, 1], [1, -1]], half)


def _paley(prime: int) -> np.ndarray:
    """Returns a Hadamard matrix of order prime + 1, for a prime that is 3 modulo 4."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0, *(1 if i in squares else -1 for i in range(1, prime))])
    matrix = np.ones((prime + 1, prime + 1))
    matrix[1:, 0] = -1
    difference = np.arange(prime)[:, None] - np.arange(prime)
    matrix[1:, 1:] = character[difference % prime] + np.eye(prime)
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _cosines(size: int) -> np.ndarray:
    """Returns the cosine transform, scaled like a Hadamard matrix: rows have norm sqrt(size)."""
    rows, columns = np.arange(size)[:, None], np.arange(size)
    matrix = np.sqrt(2) * np.cos(np.pi * (columns + 0.5) * rows / size)
    matrix[0] = 1
    return matrix
