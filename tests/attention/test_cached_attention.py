"""Attention over the cache against the float64 oracle, on every kind of mesh and cache.

The measure is the plain implementation in the same dtype: attending block by block, over shards
and in chunks may be at most twice as far from the truth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import attention, dequantised

from lsjax.attention.blockwise import attend
from lsjax.attention.cached import write_and_attend
from lsjax.attention.plain import causal_attention
from lsjax.cache import LayerCache, Store
from lsjax.sharding import layer_cache_spec, make_mesh, sharding

HEAD_DIM = 32
MESHES = {
    name: dict(zip(("data", "context", "model"), map(int, name), strict=True))
    for name in ("111", "121", "141", "181", "142", "212")
}

encode = jax.jit(Store.encode)


class Case(NamedTuple):
    """Tokens, slots of the cache, tokens a chunk; the last chunk is what remains."""

    length: int
    capacity: int
    chunk: int
    window: int | None = None
    group: int = 2
    cache: str = "float32"
    mesh: str = "111"
    dtype: str = "float32"


def empty(case, batch, kv_heads):
    shape = (batch, kv_heads, case.capacity, HEAD_DIM)

    def store():
        beside = [None, None]
        if case.cache == "int8":
            beside = [jnp.zeros(shape[:-1], d) for d in ("bfloat16", "int16")]
        return Store(jnp.zeros(shape, case.cache), *beside)

    mesh = make_mesh(MESHES[case.mesh])
    specs = jax.tree.map(lambda s: sharding(mesh, s), layer_cache_spec(case.cache == "int8"))
    return jax.device_put(LayerCache(k=store(), v=store()), specs)


def queries_keys_values(case, batch=2, kv_heads=2):
    """Attention is peaked, and one channel of the keys is far larger than the others."""
    rng = np.random.default_rng(case.length)

    def draw(heads):
        return rng.standard_normal((batch, case.length, heads, HEAD_DIM))

    q, k, v = 1.5 * draw(kv_heads * case.group), 1.5 * draw(kv_heads), draw(kv_heads)
    k[..., 3] *= 8
    q[..., 3] /= 8
    return tuple(x.astype(jnp.dtype(case.dtype)) for x in (q, k, v))


def stepper(case):
    mesh = make_mesh(MESHES[case.mesh])
    return jax.jit(functools.partial(write_and_attend, mesh, window=case.window))


def in_chunks(case, q, k, v):
    """Outputs of all tokens, and the cache after them."""
    step, cache, outputs = stepper(case), empty(case, q.shape[0], k.shape[2]), []
    for start in range(0, case.length, case.chunk):
        part = slice(start, min(start + case.chunk, case.length))
        positions = np.tile(np.arange(case.length)[part], (q.shape[0], 1))
        y, cache = step(q[:, part], k[:, part], v[:, part], positions, cache)
        outputs.append(np.asarray(y))
    return np.concatenate(outputs, axis=1).astype(np.float64), cache


CASES = [
    Case(1, 1, 1, group=1),
    Case(5, 37, 5),
    Case(64, 64, 64, group=4),
    Case(49, 64, 7, group=8),
    Case(50, 64, 1),
    Case(80, 8192, 79, group=1),
    # More than one block of queries, padded, and more than one of keys.
    Case(700, 1024, 700, group=1),
    Case(700, 1024, 300, window=100),
    Case(600, 4608, 600, window=512, group=1),
    Case(49, 64, 7, window=1),
    Case(49, 64, 7, window=8, cache="bfloat16", dtype="bfloat16", group=4),
    Case(700, 1024, 350, cache="bfloat16", dtype="bfloat16"),
    Case(49, 64, 7, cache="int8"),
    Case(700, 1024, 350, cache="int8", window=300),
    Case(49, 64, 7, cache="int8", dtype="bfloat16"),
    # Chunks longer than a shard, and shorter ones that straddle two.
    *(Case(50, 64, 50, mesh=mesh) for mesh in ("121", "181")),
    *(Case(49, 64, 7, mesh=mesh) for mesh in MESHES if mesh != "111"),
    *(Case(49, 64, 7, window=12, cache="int8", mesh=mesh) for mesh in ("141", "212")),
    Case(49, 64, 7, group=4, cache="bfloat16", dtype="bfloat16", mesh="142"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_near_the_truth_as_plain_attention(case):
    q, k, v = queries_keys_values(case)
    got, cache = in_chunks(case, q, k, v)
    # What is attended to is what the cache holds.
    k, v = (dequantised(store)[:, : case.length] for store in (cache.k, cache.v))
    truth, _ = attention(q, k, v, np.arange(case.length)[None], case.window)
    k, v = (x.astype(jnp.dtype(case.dtype)) for x in (k, v))
    plain = jax.jit(causal_attention, static_argnums=3)(q, k, v, case.window)
    error, plain_error = (np.max(np.abs(np.asarray(x, np.float64) - truth)) for x in (got, plain))
    assert error <= 2 * plain_error + 1e-7


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_the_cache_holds_the_same_bits_however_the_text_is_cut(cache):
    base = Case(50, 64, 50, cache=cache)
    inputs = queries_keys_values(base)
    _, whole = in_chunks(base, *inputs)
    for change in ({"chunk": 10}, {"chunk": 1}, {"chunk": 25, "mesh": "181"}, {"mesh": "212"}):
        _, cut = in_chunks(base._replace(**change), *inputs)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mesh", ["111", "141", "212"])
@pytest.mark.parametrize("window, cache", [(None, "float32"), (5, "int8")])
def test_single_tokens_at_a_different_position_in_each_row(mesh, window, cache):
    case = Case(64, 64, 64, window, mesh=mesh, cache=cache)
    q, k, v = queries_keys_values(case, batch=4)
    filled = empty(case, 4, 2)
    filled = jax.device_put(
        LayerCache(encode(filled.k, k.swapaxes(1, 2)), encode(filled.v, v.swapaxes(1, 2))),
        jax.tree.map(lambda x: x.sharding, filled),
    )
    positions = np.asarray([[3], [40], [63], [16]])
    rows = np.arange(4)
    at = (rows[:, None], (positions + 7) % 64)  # new tokens, unlike what stood there
    got, after = stepper(case)(q[at], k[at], v[at], positions, filled)
    truth, _ = attention(q[at], dequantised(after.k), dequantised(after.v), positions, window)
    assert np.max(np.abs(got - truth)) < 1e-5
    before, written = dequantised(filled.k), dequantised(after.k)
    others = np.arange(64) != positions
    np.testing.assert_array_equal(written[others], before[others])
    np.testing.assert_array_equal(written[rows, positions[:, 0]], before[rows, at[1][:, 0]])


@pytest.mark.parametrize("length, capacity", [(1, 8), (4, 8), (300, 1024)])
@pytest.mark.parametrize("window, first", [(None, 5000), (3, -5000)])
def test_queries_that_see_no_key(length, capacity, window, first):
    """A shard may hold only later positions, or only ones before the window."""
    keys = jax.random.normal(jax.random.key(0), (1, 2, capacity, HEAD_DIM))
    store = Store(keys, None, None)
    q = jnp.ones((1, 2, 3, length, HEAD_DIM))
    partial = attend(q, LayerCache(store, store), jnp.arange(length)[None], first, window)
    np.testing.assert_array_equal(partial.values, np.zeros(q.shape))
    np.testing.assert_array_equal(partial.lse, np.full(q.shape[:-1], -np.inf))


def test_log_sum_exp_of_a_shard():
    """The second of two shards, where some queries see nothing."""
    case = Case(64, 64, 64)
    q, k, v = queries_keys_values(case, batch=1)
    grouped = (q * HEAD_DIM**-0.5).reshape(1, 64, 2, 2, HEAD_DIM).transpose(0, 2, 3, 1, 4)
    half = LayerCache(*(Store(jnp.asarray(x[:, 32:].swapaxes(1, 2)), None, None) for x in (k, v)))
    partial = attend(grouped, half, jnp.arange(64)[None], 32, None)
    assert np.all(partial.lse[..., :32] == -np.inf)
    values, lse = attention(q[:, 32:], k[:, 32:], v[:, 32:], np.arange(32)[None])
    got = np.moveaxis(partial.lse[..., 32:], 3, 1).reshape(lse.shape)
    np.testing.assert_allclose(got, lse, atol=1e-5)
    got = np.moveaxis(partial.values[..., 32:, :], 3, 1).reshape(values.shape)
    np.testing.assert_allclose(got, values, atol=1e-5)
