"""Partial attention results and their merge, the basis of all long-sequence attention.

Attention over a block of keys yields a Partial. Partials over disjoint keys merge into the
Partial over their union, in any order and grouping: across key blocks, devices, or kinds of
cache. Source: FlashAttention (arXiv 2205.14135), Ring Attention (arXiv 2310.01889).
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Partial:
    """Attention result over a subset of the keys.

    Attributes:
      values: [..., head_dim] float32, softmax-weighted mean of these keys' values; 0 where no key
        is visible. Where nothing is left to merge it may be in the queries' dtype.
      lse: [...] float32, log-sum-exp of the scores; -inf where no key is visible.
    """

    values: jax.Array
    lse: jax.Array


def merge(a: Partial, b: Partial) -> Partial:
    """Merges two Partials over disjoint sets of keys into the Partial over their union."""
    running_max = _finite(jnp.maximum(a.lse, b.lse))
    weight_a, weight_b = jnp.exp(a.lse - running_max), jnp.exp(b.lse - running_max)
    return _normalize(
        weight_a[..., None] * a.values + weight_b[..., None] * b.values,
        weight_a + weight_b,
        running_max,
    )


def merge_over_axis(partial: Partial, axis_name: str) -> Partial:
    """Merges the Partials of all devices along a mesh axis; only Partials are sent, never keys."""
    running_max = _finite(jax.lax.pmax(partial.lse, axis_name))
    weight = jnp.exp(partial.lse - running_max)
    values = jax.lax.psum(weight[..., None] * partial.values, axis_name)
    return _normalize(values, jax.lax.psum(weight, axis_name), running_max)


def with_blind_queries(partial: Partial, count: int) -> Partial:
    """Puts `count` queries that see nothing before those of a Partial.

    `partial` has values [batch, kv_heads, group, length, head_dim].
    """
    before = ((0, 0),) * 3 + ((count, 0),)
    return Partial(
        jnp.pad(partial.values, (*before, (0, 0))),
        jnp.pad(partial.lse, before, constant_values=-jnp.inf),
    )


def update_softmax(
    scores: jax.Array, sum_exp: jax.Array, running_max: jax.Array, axis: int = -1
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes one step of a running softmax, over a block of keys.

    Args:
      scores: [..., keys] float32, -inf where a key is not visible.
      sum_exp, running_max: [...] or, for kernels that keep the axis, [..., 1]; see from_sums.
      axis: axis of scores that is keys.

    Returns:
      The block's weights [..., keys], the factor of what was summed up before, the new sum_exp and
      the new running_max.
    """
    keep = running_max.ndim == scores.ndim
    new_max = jnp.maximum(running_max, jnp.max(scores, axis=axis, keepdims=keep))
    finite = _finite(new_max)
    weights = jnp.exp(scores - (finite if keep else _along(axis, finite, scores)))
    correction = jnp.exp(running_max - finite)
    sum_exp = correction * sum_exp + jnp.sum(weights, axis=axis, keepdims=keep)
    return weights, correction, sum_exp, new_max


def from_sums(
    acc: jax.Array, sum_exp: jax.Array, running_max: jax.Array, axis: int = -1
) -> Partial:
    """Builds a Partial from the state of a running softmax.

    Args:
      acc: [..., head_dim], sum of exp(score - running_max) * value.
      sum_exp: [...], sum of exp(score - running_max).
      running_max: [...], largest score so far, -inf where no key was visible.
      axis: axis of acc, and of the Partial's values, that is head_dim.
    """
    return _normalize(acc, sum_exp, _finite(running_max), axis)


def _finite(running_max: jax.Array) -> jax.Array:
    # exp(-inf - -inf) would be nan; any finite number works where no key is visible.
    return jnp.where(running_max == -jnp.inf, 0.0, running_max)


def _along(axis: int, x: jax.Array, like: jax.Array) -> jax.Array:
    # At once, since Mosaic GPU has no axes of size 1.
    kept = [i for i in range(like.ndim) if i != axis % like.ndim]
    return jax.lax.broadcast_in_dim(x, like.shape, kept)


def _normalize(
    acc: jax.Array, sum_exp: jax.Array, running_max: jax.Array, axis: int = -1
) -> Partial:
    seen = sum_exp > 0
    values = acc / _along(axis, jnp.where(seen, sum_exp, 1.0), acc)
    return Partial(values=values, lse=jnp.where(seen, running_max + jnp.log(sum_exp), -jnp.inf))
