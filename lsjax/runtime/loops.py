"""Loops whose results lie in arrays that are made when the loop begins.

jax.lax.map and jax.lax.scan write to zeros. XLA takes them for constants, and allocates those of
all layers when a program starts. Here the initial values depend on an array of the layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def to_overwrite(shapes: Any, like: jax.Array) -> Any:
    """Returns arrays of any values, shaped as `shapes`, that are made once `like` is there."""
    value = like[(0,) * like.ndim]
    return jax.tree.map(lambda x: jnp.full(x.shape, value.astype(x.dtype)), shapes)


def map_in_turn(fn: Callable[[Any], Any], xs: Any, like: jax.Array) -> Any:
    """Does what jax.lax.map does: maps `fn` over the first axis of `xs`. It has no gradient."""
    return _loop(lambda _, x: (None, fn(x)), None, xs, like)[1]


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, like: jax.Array
) -> tuple[Any, Any]:
    """Does what jax.lax.scan does, gradients included.

    Args:
      step: (carry, element of xs) -> (carry, y), of no other arrays that gradients are taken of.
      carry: initial carry.
      xs: arrays to loop over, along their first axis.
      like: an array that is known only when the program runs.

    Returns:
      The last carry, and the y of all elements.
    """

    @jax.custom_jvp
    def run(carry: Any, xs: Any, like: jax.Array) -> tuple[Any, Any]:
        return _loop(step, carry, xs, like)

    @run.defjvp
    def with_tangents(primals: Any, tangents: Any) -> Any:
        def plain(carry: Any, xs: Any, _: jax.Array) -> tuple[Any, Any]:
            return jax.lax.scan(step, carry, xs)

        return jax.jvp(plain, primals, tangents)

    return run(carry, xs, like)


def _loop(step: Callable, carry: Any, xs: Any, like: jax.Array) -> tuple[Any, Any]:
    def take(i: jax.Array | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), xs)

    def body(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, ys = state
        carry, y = step(carry, take(i))
        put = jax.lax.dynamic_update_index_in_dim
        return carry, jax.tree.map(lambda x, new: put(x, new, i, 0), ys, y)

    count = jax.tree.leaves(xs)[0].shape[0]
    of_one = jax.eval_shape(step, carry, take(0))[1]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), of_one)
    return jax.lax.fori_loop(0, count, body, (carry, to_overwrite(shapes, like)))
