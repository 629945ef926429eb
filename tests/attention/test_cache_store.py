"""The cache's storage: what int8 keeps, and where tokens land."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import dequantised

from lsjax.cache import CACHE_DTYPES, CacheSpec, Store, empty_cache, write
from lsjax.families import parse_config

QWEN2 = pathlib.Path(__file__).parents[1] / "golden" / "models" / "qwen2" / "config.json"


def empty(dtype, batch=2, kv_heads=2, capacity=64, head_dim=16):
    shape = (batch, kv_heads, capacity, head_dim)
    beside = [None, None]
    if dtype == "int8":
        beside = [jnp.zeros(shape[:-1], d) for d in ("bfloat16", "int16")]
    return Store(jnp.zeros(shape, dtype), *beside)


encode = jax.jit(Store.encode)


def normal(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 2, 64, 16)).astype("f4")


def with_outlier(size):
    x = normal()
    x[..., 5] = size
    return x


INPUTS = {
    "normal": normal(),
    "tiny": 1e-20 * normal(),
    "huge": 1e20 * normal(),
    "outlier": with_outlier(100.0),
    "negative outlier": with_outlier(-300.0),
    "outlier past 16 bits": with_outlier(1e6),
    "equal": np.full((2, 2, 64, 16), -3.0, "f4"),
    "whole numbers": np.round(100 * normal()),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INPUTS)
def test_int8_is_within_half_a_step(name, dtype):
    x = jnp.asarray(INPUTS[name], dtype)
    store = encode(empty("int8"), x)
    x = np.asarray(x, np.float64)
    step = np.asarray(store.scale, np.float64)
    error = np.abs(dequantised(store).swapaxes(1, 2) - x)
    # Dividing by the step in float32 may move a tie.
    assert np.all(error <= step[..., None] * (0.5 + 1e-4))
    # The step fits all entries but the largest, which has 16 bits.
    ordered = np.sort(np.abs(x), axis=-1)
    finest = np.maximum(ordered[..., -2] / 127, ordered[..., -1] / 32767)
    assert np.all(step >= finest) and np.all(step <= finest * (1 + 2**-6))


def test_one_large_channel_costs_the_others_nothing():
    others = np.arange(16) != 5
    for x in (normal(), with_outlier(100.0)):
        kept = dequantised(encode(empty("int8"), x)).swapaxes(1, 2)
        assert np.abs(kept - x)[..., others].max() < normal().max() / 127


def test_zeros_stay_zeros():
    x = jnp.asarray(normal()).at[:, :, ::2].set(0)
    kept = dequantised(encode(empty("int8"), x)).swapaxes(1, 2)
    np.testing.assert_array_equal(kept[:, :, ::2], 0)
    assert np.all(np.any(kept[:, :, 1::2] != 0, axis=-1))
    assert not np.any(dequantised(empty("int8")))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("length", [2, 23, 40])
def test_a_chunk_lands_where_it_belongs_on_every_shard(dtype, length):
    """Shards of 16 slots, so that chunks straddle them, cover them, and end past the last."""
    shard = jax.jit(functools.partial(write, empty(dtype, capacity=16)))
    x = jnp.asarray(normal()[:, :, :length])
    encoded = jax.tree.leaves(encode(empty(dtype), x))
    for start in (0, 1, 15, 16, 20, 47, 63):
        positions = np.tile(start + np.arange(length), (2, 1))
        shards = [shard(x, positions, first) for first in range(0, 64, 16)]
        for *parts, new in zip(*map(jax.tree.leaves, shards), encoded, strict=True):
            held = np.concatenate(parts, axis=2)
            expected = np.zeros_like(held)
            expected[:, :, start : start + length] = new[:, :, : 64 - start]
            np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_what_stood_before_stays(dtype):
    before = encode(empty(dtype), jnp.asarray(normal(1)))
    x = jnp.asarray(normal(2)[:, :, :5])
    after = jax.jit(write)(before, x, np.tile(10 + np.arange(5), (2, 1)), 0)
    changed = np.isin(np.arange(64), 10 + np.arange(5))
    held, old = dequantised(after), dequantised(before)
    np.testing.assert_array_equal(held[:, ~changed], old[:, ~changed])
    np.testing.assert_array_equal(held[:, changed], dequantised(encode(empty(dtype), x)))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_single_tokens_of_each_row(dtype):
    x = jnp.asarray(normal()[:, :, :1])
    encoded = dequantised(encode(empty(dtype), x))
    shard = jax.jit(functools.partial(write, empty(dtype, capacity=32)))
    shards = [shard(x, np.asarray([[3], [40]]), first) for first in (0, 32)]
    held = np.concatenate([dequantised(s) for s in shards], axis=1)
    expected = np.zeros_like(held)
    expected[0, 3], expected[1, 40] = encoded[0, 0], encoded[1, 0]
    np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_bytes_as_announced(dtype):
    config = parse_config(json.loads(QWEN2.read_text()))
    spec = CacheSpec(batch=3, capacity=40, dtype=dtype)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, spec)))
    assert spec.nbytes(config) == sum(x.size * x.dtype.itemsize for x in leaves)
