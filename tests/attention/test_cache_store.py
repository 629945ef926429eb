"""The cache's storage: what a byte and half a byte keep, and where tokens land."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle import dequantised

from lsjax.attention.kv_array import empty_kv_array, write, write_tokens
from lsjax.cache import CACHE_DTYPES, CacheSpec, empty_cache
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.families import parse_config

QWEN2 = pathlib.Path(__file__).parents[1] / "golden" / "models" / "qwen2" / "config.json"
LEVELS = {"int8": 127, "int4": 7.5}


def empty(dtype, batch=2, kv_heads=2, capacity=64, head_dim=16):
    return empty_kv_array((batch, kv_heads, capacity, head_dim), dtype)


@jax.jit
def encode(store, x):
    return store.quantize(x)


def kept(dtype, x):
    """Returns x as a KVArray holds it, in x's layout."""
    store = encode(empty(dtype, *x.shape), jnp.asarray(x))
    found = dequantised(store).swapaxes(1, 2)
    np.testing.assert_allclose(store.dequantize(), found, rtol=1e-6)
    return found


def normal(seed=0, head_dim=16):
    return np.random.default_rng(seed).standard_normal((2, 2, 64, head_dim)).astype("f4")


INPUTS = {
    "normal": normal(),
    "wide": normal(head_dim=80),
    "tiny": 1e-20 * normal(),
    "huge": 1e20 * normal(),
    "equal": np.full((2, 2, 64, 16), -3.0, "f4"),
    "whole numbers": np.round(100 * normal()),
}


@pytest.mark.parametrize("quantised", LEVELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INPUTS)
def test_how_far_off_an_entry_is(name, dtype, quantised):
    """In steps that just reach the largest entry: rounding to them is off by 0.29 in the mean
    square and by 0.5 at most; what is cut off of the largest may cost int4 more."""
    x = jnp.asarray(INPUTS[name], dtype)
    error = kept(quantised, x) - np.asarray(x, np.float64)
    x = np.asarray(x, np.float64)
    if quantised == "int4":  # a scale for each 16 of 16, 20 of 80 channels
        group = 16 if x.shape[-1] == 16 else 20
        x, error = (a.reshape(*a.shape[:-1], -1, group) for a in (x, error))
    error /= np.abs(x).max(axis=-1, keepdims=True) / LEVELS[quantised]
    assert np.sqrt(np.mean(error**2)) < 0.3
    assert np.abs(error).max() < {"int8": 0.57, "int4": 1.3}[quantised]


def test_zeros_stay_zeros():
    x = normal()
    x[:, :, ::2] = 0
    for dtype in LEVELS:
        found = kept(dtype, x)
        np.testing.assert_array_equal(found[:, :, ::2], 0)
        assert np.all(np.any(found[:, :, 1::2] != 0, axis=-1))
        assert not np.any(dequantised(empty(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("length", [2, 23, 40])
def test_a_chunk_lands_where_it_is_put_or_nowhere(dtype, length):
    x = jnp.asarray(normal()[:, :, :length])
    encoded = encode(empty(dtype), x)
    put = jax.jit(functools.partial(write, empty(dtype)))
    for start in (-64, -5, 0, 1, 31, 64 - length, 65 - length, 64):
        held = put(encoded, start)
        for x, new in zip(*map(jax.tree.leaves, [held, encoded]), strict=True):
            expected = np.zeros_like(x)
            if 0 <= start <= 64 - length:
                expected[:, :, start : start + length] = new
            np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_what_stood_before_stays(dtype):
    before = encode(empty(dtype), jnp.asarray(normal(1)))
    new = encode(empty(dtype), jnp.asarray(normal(2)[:, :, :5]))
    after = jax.jit(write)(before, new, 10)
    changed = np.isin(np.arange(64), 10 + np.arange(5))
    held, old = dequantised(after), dequantised(before)
    np.testing.assert_array_equal(held[:, ~changed], old[:, ~changed])
    np.testing.assert_array_equal(held[:, changed], dequantised(new))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_few_tokens_of_each_row_land_in_the_shards_that_hold_their_positions(dtype, length):
    new = encode(empty(dtype), jnp.asarray(normal()[:, :, :length]))
    encoded = dequantised(new)
    zigzag = Zigzag(devices=2, block_length=16)
    before = empty(dtype, capacity=32)

    @jax.jit
    def put(device, first):
        position_of = functools.partial(zigzag.position, device)
        slots = zigzag.num_local_slots_before(device, first)
        return write_tokens(before, new, first, slots, position_of=position_of)

    for first in ([3, 40], [59, 0], [12, 63 - length]):
        shards = [dequantised(put(device, np.asarray(first))) for device in range(2)]
        held = np.concatenate(shards, axis=1)[:, np.argsort(zigzag.permutation(64))]
        expected = np.zeros_like(held)
        for row, at in enumerate(first):
            expected[row, at : at + length] = encoded[row]
        np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_bytes_as_announced(dtype):
    config = parse_config(json.loads(QWEN2.read_text()))
    spec = CacheSpec(batch=3, capacity=40, dtype=dtype, compute_dtype="float32")
    leaves = jax.tree.leaves(jax.jit(lambda: empty_cache(config, spec))())
    assert spec.nbytes(config) == sum(x.nbytes for x in leaves)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.52), ("int4", 0.29)])
def test_bytes_of_a_token_against_bfloat16(dtype, most):
    used = [
        sum(x.nbytes for x in jax.tree.leaves(empty(d, head_dim=128))) for d in (dtype, "bfloat16")
    ]
    assert used[0] <= most * used[1]
