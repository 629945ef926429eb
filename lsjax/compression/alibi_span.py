"""How far ALiBi heads look back: beyond their span, attention weights are negligible.

Source: RazorAttention (arXiv 2407.15891), section 3.1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.distributed.multihost import to_host
from lsjax.nn.int8_weights import float_matrix
from lsjax.positions.alibi import alibi_slopes
from lsjax.runtime.precision import einsum


def score_bounds(config: ModelConfig, params: dict) -> np.ndarray:
    """Returns [layers, heads] upper bounds of each head's absolute score, before the ALiBi bias.

    The output of RMSNorm has a norm of at most sqrt(hidden_size), before its weights. So
    |q . k| / sqrt(head_dim) <= hidden_size / sqrt(head_dim) * |N Wq^T Wk N|, where N is the
    diagonal matrix of the norm's weights and |.| is the largest singular value.

    Args:
      config: model configuration; the query and key projections must have no bias.
      params: parameters of the model, a nested dict.
    """
    layers = range(config.num_layers)
    squares = np.stack(
        [to_host(_largest_squares(params[f"layers_{i}"], config.head_dim)) for i in layers]
    )
    return np.sqrt(squares.astype(np.float64)) * config.hidden_size / np.sqrt(config.head_dim)


@functools.partial(jax.jit, static_argnums=1)
def _largest_squares(layer: dict, head_dim: int) -> jax.Array:
    """Returns [heads] float32, the square of the largest singular value of N Wq^T Wk N."""
    norm = layer["attn_norm"]["weight"].astype(jnp.float32)

    def inner(name: str) -> jax.Array:
        """Returns [heads, head_dim, head_dim] products of a projection's rows, weighted by N."""
        weight = float_matrix(layer["attn"][name]) * norm
        rows = weight.reshape(-1, head_dim, weight.shape[-1])
        return einsum("hdi,hei->hde", rows, rows)

    # |A^T B| squared is the largest eigenvalue of (A A^T)(B B^T), and that of R^T (B B^T) R, which
    # is symmetric, for any R with R R^T = A A^T.
    queries, keys = inner("q"), inner("k")
    keys = jnp.repeat(keys, queries.shape[0] // keys.shape[0], axis=0)
    values, vectors = jnp.linalg.eigh(queries)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    symmetric = einsum("hdi,hde,hej->hij", root, keys, root)
    return jnp.maximum(jnp.linalg.eigvalsh(symmetric)[:, -1], 0)


def alibi_spans(config: ModelConfig, bounds: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns [layers, kv_heads] numbers of last tokens to keep, the current token included.

    A token's score with itself is at least -bound. Its score with the token at `distance` before it
    is at most bound - slope * distance. So all tokens beyond the span together have an attention
    weight below epsilon.

    Args:
      config: model configuration.
      bounds: [layers, heads] result of `score_bounds`.
      epsilon: largest total weight of the dropped tokens, below 1.
    """
    slopes = alibi_slopes(config.num_heads).astype(np.float64)
    of_query = np.ceil((2 * bounds - np.log(epsilon * -np.expm1(-slopes))) / slopes)
    return of_query.reshape(len(bounds), config.num_kv_heads, -1).max(axis=-1)
