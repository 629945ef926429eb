"""How far the heads of a model with ALiBi look back: beyond that, weights are next to nothing.

Source: RazorAttention (arXiv 2407.15891), section 3.1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.hosts import to_host
from lsjax.positions.alibi import alibi_slopes
from lsjax.precision import einsum


def score_bounds(config: ModelConfig, params: dict) -> np.ndarray:
    """[layers, heads]: no score of a head, before its bias, is larger or smaller than this.

    What RMSNorm gives has a length of sqrt(hidden_size) at most, times its weights. So
    |q . k| / sqrt(head_dim) <= hidden_size / sqrt(head_dim) * |N Wq^T Wk N|, N being the norm's
    weights and |.| the largest singular value.

    Args:
      config: the model; its projections of queries and keys have no bias.
      params: the model's, a nested dict.
    """
    layers = range(config.num_layers)
    squares = np.stack(
        [to_host(_largest_squares(params[f"layers_{i}"], config.head_dim)) for i in layers]
    )
    return np.sqrt(squares.astype(np.float64)) * config.hidden_size / np.sqrt(config.head_dim)


@functools.partial(jax.jit, static_argnums=1)
def _largest_squares(layer: dict, head_dim: int) -> jax.Array:
    """[heads] float32, of N Wq^T Wk N the largest singular value's square."""
    norm = layer["attn_norm"]["weight"].astype(jnp.float32)

    def inner(name: str) -> jax.Array:
        """[heads, head_dim, head_dim] products of a projection's rows, weighted by the norm."""
        weight = layer["attn"][name]["weight"].astype(jnp.float32) * norm
        rows = weight.reshape(-1, head_dim, weight.shape[-1])
        return einsum("hdi,hei->hde", rows, rows)

    # |A^T B| squared is the largest eigenvalue of (A A^T)(B B^T), or of the symmetric
    # R (B B^T) R with R the root of A A^T.
    queries, keys = inner("q"), inner("k")
    keys = jnp.repeat(keys, queries.shape[0] // keys.shape[0], axis=0)
    values, vectors = jnp.linalg.eigh(queries)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    symmetric = einsum("hdi,hde,hej->hij", root, keys, root)
    return jnp.maximum(jnp.linalg.eigvalsh(symmetric)[:, -1], 0)


def reaches(config: ModelConfig, bounds: np.ndarray, epsilon: float) -> np.ndarray:
    """[layers, kv_heads] how many of the last tokens a KV head is to keep, itself included.

    A token's own score is -bound at least, that of one `distance` before it bound - slope *
    distance at most. All tokens from the reach on weigh less than epsilon together.

    Args:
      config: the model.
      bounds: [layers, heads] of `score_bounds`.
      epsilon: below 1.
    """
    slopes = alibi_slopes(config.num_heads).astype(np.float64)
    of_query = np.ceil((2 * bounds - np.log(epsilon * -np.expm1(-slopes))) / slopes)
    return of_query.reshape(len(bounds), config.num_kv_heads, -1).max(axis=-1)
