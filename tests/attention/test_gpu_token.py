"""A decode step of one token on a GPU, its kernels interpreted, against the same step on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.attention import gpu, gpu_token
from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.head_layout import by_head, by_token
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.cache import update_and_attend
from lsjax.cache.float_tail import FloatBlock, FloatTail
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import Step
from lsjax.distributed.sharding import make_mesh

BLOCK, CAPACITY, KV_HEADS, GROUP = 64, 256, 1, 3


def drawn_cache(rng, batch, head_dim, dtype, platform):
    """A cache of random tokens, and the floats of every row's block."""
    rows = batch, KV_HEADS
    x = jnp.asarray(rng.standard_normal((4, *rows, CAPACITY, head_dim)), jnp.float32)
    like = empty_kv_array((*rows, CAPACITY, head_dim), "int8", platform)
    k, v = like.quantize(x[0]), like.quantize(x[1])
    tail = FloatBlock(*x[2:, :, :, :BLOCK].astype(dtype))
    return FloatTail(FullCache(k, v), tail)


def floats(x: KVArray):
    return np.asarray(x.dequantize())


@pytest.mark.parametrize("head_dim", [16, 160])
def test_a_token_is_quantized_and_written_to_its_slots_alone(head_dim):
    rng = np.random.default_rng(0)
    held = drawn_cache(rng, 1, head_dim, "float32", "gpu")
    stores = gpu_token.Stores(*jax.tree.leaves((held.inner.k, held.inner.v, held.tail)))
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, KV_HEADS, *shape, 1, head_dim)), jnp.float32)
        for shape in ((GROUP,), (), ())
    )
    slots = jnp.asarray([[70], [6]])
    q_rotated, written = gpu_token.write_token(q, k, v, stores, *slots, interpret=True)
    np.testing.assert_allclose(q_rotated, hadamard_transform(q), atol=1e-6)
    k = hadamard_transform(k)
    new = *jax.tree.leaves((held.inner.k.quantize(k), held.inner.v.quantize(v))), k, v
    for old, store, x, slot in zip(stores, written, new, (70,) * 4 + (6,) * 2, strict=True):
        expected = np.array(old, np.float32)
        expected[:, :, slot] = np.asarray(x, np.float32)[:, :, 0]
        np.testing.assert_allclose(np.asarray(store, np.float32), expected, atol=1e-6)


@pytest.mark.slow("the kernels are tested alone; here they are interpreted in a whole step")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"),
    [
        (128, "bfloat16", None),
        (80, "bfloat16", 150),
        (96, "float32", 20),
    ],
)
def test_one_token_is_written_and_attended_to_as_on_a_cpu(monkeypatch, head_dim, dtype, window):
    positions = jnp.asarray([[5], [3 * BLOCK + 7], [BLOCK - 1], [BLOCK]])
    batch = len(positions)
    rng = np.random.default_rng(head_dim)
    q, k, v = (
        jnp.asarray(3 * rng.standard_normal((batch, 1, heads, head_dim)), dtype)
        for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    seed = int(rng.integers(1000))
    make = functools.partial(drawn_cache, batch=batch, head_dim=head_dim, dtype=dtype)
    expected, there = update_and_attend(
        *(make_mesh(""), q, k, v, positions, None),
        *(make(np.random.default_rng(seed), platform="cpu"), True, window),
    )
    begin = None if window is None else jnp.maximum(positions + 1 - window, 0)
    step = Step(
        *(positions, None, begin, positions + 1, None, None),
        decode=True,
        blocks=None,
        rope_interleaved=False,
        platform="gpu",
    )
    for module, name in ((gpu, "decode"), (gpu_token, "write_token")):
        interpreted = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, interpreted)
    held = make(np.random.default_rng(seed), platform="gpu")
    partial, here = jax.jit(type(held).update_and_attend)(held, *by_head(q, k, v), step)
    got = np.asarray(by_token(partial.values).astype(dtype), np.float32)
    near = 2e-5 if dtype == "float32" else 2**-6
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), atol=near, rtol=near)
    for a, b in ((here.tail.k, there.tail.k), (here.tail.v, there.tail.v)):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=near, rtol=near)
    for a, b in ((here.inner.k, there.inner.k), (here.inner.v, there.inner.v)):
        # Sums in another order may round to the next step.
        assert np.all(np.abs(floats(a) - floats(b)) <= 1.01 * np.float32(a.scale)[..., None])
        changed = np.any(np.asarray(a.data) != np.asarray(held.inner.k.data), axis=-1)
        assert a is not here.inner.k or np.all(changed.sum(axis=-1) == 1)
