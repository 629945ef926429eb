"""How far attention is from float64.

The bound is the error of plain attention in the same dtype on the same device. A kernel's error may
be at most twice as large, plus a small constant in case plain attention happens to be exact.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial


def compare(
    q: jax.Array, k: KVArray, v: KVArray, visible: np.ndarray, got: Partial
) -> dict[str, Any]:
    """Compares errors from float64 with those of plain attention.

    Args:
      q: [batch, kv_heads, group, queries, head_dim], scaled.
      k, v: keys and values.
      visible: [batch, kv_heads or 1, queries, slots] whether a query sees a slot.
      got: what is checked.

    Returns:
      Row with ok, the errors of values and lse, and those of plain attention.
    """
    visible, (keys, entries) = visible[:, :, None], (k.dequantize(), v.dequantize())
    values, lse = (np.asarray(x, np.float64) for x in (got.values, got.lse))
    truth = _attention(*(np.asarray(x, np.float64) for x in (q, keys, entries)), visible)
    plain = _plain(q, keys, entries, visible)
    sees = np.isfinite(truth[1])
    errors = [_errors(truth, of, sees) for of in ((values, lse), plain)]
    spare = (2e-5, 2e-5) if q.dtype == jnp.float32 else (1e-3, 1e-4)
    near = all(a <= 2 * b + c for a, b, c in zip(*errors, spare, strict=True))
    blind = np.array_equal(sees, np.isfinite(lse)) and not values[~sees].any()
    row = dict(zip(("error", "lse_error"), errors[0], strict=True))
    row |= dict(zip(("plain_error", "plain_lse_error"), errors[1], strict=True))
    return row | {"ok": bool(near and blind and np.isfinite(values).all())}


def as_on_accelerators(store: KVArray) -> KVArray:
    """Returns a KV array with bfloat16 in its own dtype; a CPU holds its bits as uint16."""

    def held(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return jax.tree.map(held, store)


def _attention(q, k, v, visible) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and lse in float64; 0 and -inf for a query that sees nothing."""
    scores = np.where(visible, np.einsum("bkgld,bksd->bkgls", q, k, optimize=True), -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    values = np.einsum("bkgls,bksd->bkgld", weights, v, optimize=True)
    with np.errstate(divide="ignore"):
        return values / np.where(total > 0, total, 1), (highest + np.log(total))[..., 0]


@jax.jit
def _plain(q, k, v, visible) -> tuple[jax.Array, jax.Array]:
    """Attends with all scores at once, in q's dtype where a model would; NaN if nothing is seen."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    scores = dot("bkgld,bksd->bkgls", q, k.astype(q.dtype))
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    values = dot("bkgls,bksd->bkgld", weights, v.astype(q.dtype))
    return values.astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)


def _errors(truth, got, sees: np.ndarray) -> tuple[float, float]:
    """Returns the largest error norm of values and error of lse, over queries that see keys."""
    values, lse = (np.asarray(x, np.float64) for x in got)
    far = np.linalg.norm(values - truth[0], axis=-1)[sees]
    lse_far = np.abs(lse[sees] - truth[1][sees])
    return float(np.max(far, initial=0)), float(np.max(lse_far, initial=0))
