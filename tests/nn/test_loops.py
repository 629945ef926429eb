"""Loops whose results lie in arrays that are made when the loop begins."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.runtime.loops import map_in_turn, scan


def step(carry, x):
    carry = jnp.tanh(carry * x["a"] + x["b"])
    return carry, {"twice": 2 * carry, "sum": jnp.sum(carry)}


def inputs():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6, 3)).astype("f4")
    return rng.standard_normal(3).astype("f4"), {"a": a, "b": b}


def test_a_scan_is_jax_s_and_so_are_its_gradients():
    carry, xs = inputs()

    def loss(run, carry, xs):
        last, ys = run(carry, xs)
        return jnp.sum(last**2) + jnp.sum(ys["twice"] * xs["a"]) + jnp.sum(ys["sum"] ** 3)

    ours = lambda carry, xs: scan(step, carry, xs, xs["a"])  # noqa: E731
    theirs = lambda carry, xs: jax.lax.scan(step, carry, xs)  # noqa: E731
    for run in (ours, jax.checkpoint(ours)):
        found, wanted = (
            jax.value_and_grad(lambda *of, run=run: loss(run, *of), (0, 1))(carry, xs)
            for run in (run, theirs)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, wanted)


def test_results_are_not_written_to_constants():
    """XLA would make them at program start, for all layers."""
    _, xs = inputs()

    def zeros(run):
        text = jax.jit(run).lower(xs["a"]).as_text()
        constants = set(re.findall(r"(%\w+) = stablehlo.constant", text))
        filled = re.findall(r"broadcast_in_dim (%\w+), .* -> tensor<6x5xf32>", text)
        return [name for name in filled if name in constants]

    def one(x):
        return jnp.arange(5) * x[0]

    assert zeros(lambda x: jax.lax.map(one, x))
    assert not zeros(lambda x: map_in_turn(one, x, x))
