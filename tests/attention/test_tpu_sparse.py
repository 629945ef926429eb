"""The TPU kernel for the blocks that a tile keeps, evaluated on the CPU, against float64.

It may be at most twice as far off as a plain softmax in the same dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle import dequantised

from lsjax.attention.kv_array import empty_kv_array
from lsjax.attention.sparse_rule import TILE, KeptBlocks
from lsjax.attention.tpu_sparse import attend_tile
from lsjax.runtime.precision import einsum

kernel = jax.jit(functools.partial(attend_tile, interpret=True))


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "format", "dtype"),
    [
        (2, 2, 128, "int8", "bfloat16"),
        pytest.param(
            *(1, 3, 64, "float32", "float32"), marks=pytest.mark.slow("the same without scales")
        ),
    ],
)
def test_a_tile_attends_to_the_blocks_that_it_keeps(kv_heads, group, head_dim, format, dtype):
    rng, batch, blocks = np.random.default_rng(0), 2, 12
    shape = batch, kv_heads, blocks * TILE, head_dim
    empty = empty_kv_array(shape, format, "tpu")
    k, v = (empty.quantize(jnp.asarray(rng.standard_normal(shape), "f4")) for _ in "kv")
    q = rng.standard_normal((batch, kv_heads, group * TILE, head_dim)) * 2 * head_dim**-0.5
    q = jnp.asarray(q, dtype)
    # The second row's tile is earlier, so that its own block is another; the first head keeps all.
    own = np.array([11, 4])
    keep = rng.random((batch, kv_heads, blocks)) < 0.4
    keep[0, 0] = True
    keep &= np.arange(blocks) <= own[:, None, None]
    keep |= np.arange(blocks) == own[:, None, None]
    kept = KeptBlocks(
        ids=jnp.sort(jnp.where(keep, jnp.arange(blocks), blocks - 1)).astype(jnp.int32),
        count=jnp.sum(keep, axis=-1, dtype=jnp.int32),
        whole=jnp.sum(keep, axis=-1, dtype=jnp.int32) - 1,
        stop=jnp.asarray(own[:, None] * TILE + 1 + np.arange(TILE), jnp.int32),
    )
    found = kernel(q, k, v, kept)
    wide_k, wide_v = (dequantised(x).swapaxes(1, 2) for x in (k, v))
    scores = np.einsum("bkrd,bksd->bkrs", np.asarray(q, np.float64), wide_k)
    stop = np.tile(np.asarray(kept.stop), (1, group))[:, None, :, None]
    seen = np.repeat(keep, TILE, axis=-1)[:, :, None] & (np.arange(blocks * TILE) < stop)
    weights = np.exp(np.where(seen, scores, -np.inf))
    values = np.einsum("bkrs,bksd->bkrd", weights / weights.sum(-1, keepdims=True), wide_v)
    plain = jax.nn.softmax(
        jnp.where(seen, einsum("bkrd,bksd->bkrs", q, jnp.asarray(wide_k, dtype)), -jnp.inf)
    )
    plain = einsum("bkrs,bksd->bkrd", plain.astype(dtype), jnp.asarray(wide_v, dtype))
    assert rms(found.values - values) < 2 * rms(plain - values)
    assert np.abs(found.lse - np.log(weights.sum(-1))).max() < (
        1e-5 if dtype == "float32" else 1e-2
    )
