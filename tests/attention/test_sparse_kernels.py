"""The kernels for the blocks that tiles keep, evaluated on the CPU, against float64.

They may be at most twice as far off as a plain softmax in the same dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle import dequantised

from lsjax.attention.kv_array import empty_kv_array
from lsjax.attention.sparse import gpu as gpu_sparse
from lsjax.attention.sparse import tpu as tpu_sparse
from lsjax.attention.sparse.rule import TILE, attend_in_tiles, kept_blocks
from lsjax.runtime.precision import einsum


@jax.jit
def on_tpu(q, k, v, kept):
    return attend_in_tiles(
        lambda q, kept: tpu_sparse.attend_tile(q, k, v, kept, interpret=True), q, kept
    )


@jax.jit
def on_gpu(q, k, v, kept):
    return gpu_sparse.attend_tiles(q, k, v, kept, interpret=True)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow("the quick cases have each of its steps"))


@pytest.mark.parametrize(
    ("kernel", "kv_heads", "group", "head_dim", "format", "dtype"),
    [
        (on_tpu, 2, 2, 128, "int8", "bfloat16"),
        slow(on_tpu, 1, 3, 64, "float32", "float32"),
        (on_gpu, 2, 2, 80, "int8", "bfloat16"),
        slow(on_gpu, 1, 3, 128, "bfloat16", "bfloat16"),
        slow(on_gpu, 1, 7, 64, "int8", "float32"),
        slow(on_gpu, 2, 1, 256, "float32", "bfloat16"),
    ],
)
def test_tiles_attend_to_the_blocks_that_they_keep(
    kernel, kv_heads, group, head_dim, format, dtype
):
    rng, batch, blocks = np.random.default_rng(0), 2, 12
    shape = batch, kv_heads, blocks * TILE, head_dim
    empty = empty_kv_array(shape, format, "tpu")
    k, v = (empty.quantize(jnp.asarray(rng.standard_normal(shape), "f4")) for _ in "kv")
    # Two tiles; those of the second row are earlier, and its first one is of padding.
    own = np.array([[10, 11], [-1, 4]])[:, None, :, None]
    tiles = own.shape[2]
    q = rng.standard_normal((batch, kv_heads, group, tiles * TILE, head_dim)) * 2 * head_dim**-0.5
    q = jnp.asarray(q, dtype)
    keep = rng.random((batch, kv_heads, tiles, blocks)) < 0.4
    keep[0, 0] = True  # also those that come later, which are not seen
    keep |= np.arange(blocks) == own
    stop = np.maximum(own[:, 0] * TILE + 1 + np.arange(TILE), 0).reshape(batch, -1)
    kept = kept_blocks(jnp.asarray(keep), jnp.asarray(stop, jnp.int32))
    found = kernel(q, k, v, kept)
    wide_k, wide_v = (dequantised(x).swapaxes(1, 2) for x in (k, v))
    scores = np.einsum("bkgld,bksd->bkgls", np.asarray(q, np.float64), wide_k)
    seen = np.repeat(np.repeat(keep, TILE, axis=-1), TILE, axis=-2)[:, :, None]
    seen = seen & (np.arange(blocks * TILE) < stop[:, None, None, :, None])
    weights = np.exp(np.where(seen, scores, -np.inf))
    sums = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(sums)
    values = np.einsum("bkgls,bksd->bkgld", weights, wide_v) / np.maximum(sums, 1e-30)[..., None]
    plain = jax.nn.softmax(
        jnp.where(seen, einsum("bkgld,bksd->bkgls", q, jnp.asarray(wide_k, dtype)), -jnp.inf)
    )
    plain = einsum("bkgls,bksd->bkgld", plain.astype(dtype), jnp.asarray(wide_v, dtype))
    visible = np.isfinite(lse)
    assert rms((found.values - values)[visible]) < 2 * rms((plain - values)[visible])
    assert not np.asarray(found.values)[~visible].any()
    np.testing.assert_array_equal(np.isfinite(found.lse), visible)
    off = np.abs(np.asarray(found.lse)[visible] - lse[visible]).max()
    assert off < (1e-5 if dtype == "float32" else 1e-2)
