"""The RMS norm whose factor is left to the product after it, against float64.

The measure is the norm and the product one after the other, in the same dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.nn.linear import Linear, RMSNorm


@pytest.mark.parametrize(("dtype", "zero_centered"), [("float32", False), ("bfloat16", True)])
def test_a_factor_left_to_the_product_costs_no_exactness(dtype, zero_centered):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 300))
    x[..., 7] *= 1e3  # as models have it: one channel that is far larger than the others
    x, weight, matrix, bias = (
        jnp.asarray(y, dtype)
        for y in (x, rng.uniform(0.2, 2, 300), rng.standard_normal((70, 300)), np.ones(70))
    )
    norm, linear = RMSNorm(1e-5, zero_centered), Linear(70, (None, None), use_bias=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(for_linear):
        y = norm.apply({"params": {"weight": weight}}, x, for_linear)
        return linear.apply({"params": {"weight": matrix, "bias": bias}}, y)

    wide, weight64, matrix64 = (np.asarray(y, np.float64) for y in (x, weight, matrix))
    rms = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    exact = (wide / rms * (weight64 + zero_centered)) @ matrix64.T + 1
    left, plain = (
        np.linalg.norm(np.asarray(run(for_linear), np.float64) - exact)
        for for_linear in (True, False)
    )
    assert left <= 2 * plain
