"""The algebra that everything long rests on.

Attention over a block of keys yields a Partial. Partials over disjoint keys merge into the
Partial over their union, in any order and grouping: across key blocks, devices, or kinds of
cache. Source: FlashAttention (arXiv 2205.14135), Ring Attention (arXiv 2310.01889).
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Partial:
    """Attention over some of the keys.

    Attributes:
      values: [..., head_dim] float32, the softmax-weighted mean of the block's values; 0 where
        no key is visible.
      lse: [...] float32, the log of the sum of the exponentiated scores; -inf where no key is
        visible.
    """

    values: jax.Array
    lse: jax.Array


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the keys of both, which must be disjoint."""
    highest = _finite(jnp.maximum(a.lse, b.lse))
    weight_a, weight_b = jnp.exp(a.lse - highest), jnp.exp(b.lse - highest)
    return _normalise(
        weight_a[..., None] * a.values + weight_b[..., None] * b.values,
        weight_a + weight_b,
        highest,
    )


def merge_over_axis(partial: Partial, axis_name: str) -> Partial:
    """Merges the Partials of all devices along a mesh axis; only Partials travel, never keys."""
    highest = _finite(jax.lax.pmax(partial.lse, axis_name))
    weight = jnp.exp(partial.lse - highest)
    values = jax.lax.psum(weight[..., None] * partial.values, axis_name)
    return _normalise(values, jax.lax.psum(weight, axis_name), highest)


def from_sums(weighted: jax.Array, total: jax.Array, highest: jax.Array) -> Partial:
    """A Partial from a running softmax.

    Args:
      weighted: [..., head_dim], sum of exp(score - highest) * value.
      total: [...], sum of exp(score - highest).
      highest: [...], the largest score so far, -inf where none was visible.
    """
    return _normalise(weighted, total, _finite(highest))


def _finite(highest: jax.Array) -> jax.Array:
    # exp(-inf - -inf) would be nan; any finite number serves where no key is visible.
    return jnp.where(highest == -jnp.inf, 0.0, highest)


def _normalise(weighted: jax.Array, total: jax.Array, highest: jax.Array) -> Partial:
    seen = total > 0
    values = weighted / jnp.where(seen, total, 1.0)[..., None]
    return Partial(values=values, lse=jnp.where(seen, highest + jnp.log(total), -jnp.inf))
