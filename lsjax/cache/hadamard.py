"""A fixed rotation of a head's channels that spreads outliers before keys are quantised.

Keys have channels far larger than the others (Qwen's biases put them there), and a step that
fits those is too coarse for the rest. Turned by a Hadamard matrix every channel is a sum of all,
with signs, so that no channel stands out. The matrix is orthogonal: turning queries too leaves
every score as it was, and nothing has to be calibrated. Source: QuaRot (arXiv 2404.00456);
matrices of other orders than powers of two by Paley's construction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.precision import einsum


def spread(x: jax.Array) -> jax.Array:
    """[..., head_dim] -> the same turned, float32; scores of two turned vectors do not change."""
    signs = jnp.asarray(spreading_matrix(x.shape[-1]))
    if np.all(np.abs(spreading_matrix(x.shape[-1])) == 1):
        signs = signs.astype(x.dtype)  # exact in any dtype
    return einsum("...d,de->...e", x, signs) * x.shape[-1] ** -0.5


@functools.cache
def spreading_matrix(width: int) -> np.ndarray:
    """[width, width] float32, orthogonal but for a factor of sqrt(width).

    Entries are 1 and -1 where a Hadamard matrix of that order is at hand (64, 80, 96, 128, 256
    and most multiples of 4); else the odd part of the width is turned by a cosine transform.
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
    """Of order prime + 1, for a prime that is 3 modulo 4."""
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
    """The cosine transform, scaled as a Hadamard matrix is: rows of length sqrt(size)."""
    rows, columns = np.arange(size)[:, None], np.arange(size)
    matrix = np.sqrt(2) * np.cos(np.pi * (columns + 0.5) * rows / size)
    matrix[0] = 1
    return matrix
