"""A layer's compressed cache against its definition in float64: what is kept, what is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.kv_array import empty_kv_array
from lsjax.attention.partial import Partial, merge
from lsjax.cache import (
    BLOCK,
    CompensationToken,
    FloatBlock,
    FloatTail,
    FullCache,
    HeadSplit,
    WindowSpec,
    compress,
    update_and_attend,
)
from lsjax.cache.compensation_token import attend_to_compensation_token
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
SINKS, LAST = 3, 300


def attention_over_what_is_kept(q, k, v, position, length, spec):
    """[heads, head_dim] float64 of one query after a prompt, head by head from the definition.

    The compensation token is what the mean of the dropped keys and values would get if it stood
    there as often as tokens were dropped.
    """
    group = q.shape[0] // k.shape[1]
    kept = [p for p in range(position + 1) if p < spec.sinks or p > position - spec.last]
    gone = sorted({*range(position + 1)} - {*kept})
    out = []
    for head in range(q.shape[0]):
        keys, values = k[:, head // group], v[:, head // group]
        rows = [(keys[p], values[p], 1) for p in kept]
        if gone:
            rows.append((keys[gone].mean(axis=0), values[gone].mean(axis=0), len(gone)))
        scores = np.array([q[head] @ key / np.sqrt(len(key)) + np.log(n) for key, _, n in rows])
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ np.array([value for _, value, _ in rows]))
    return np.array(out)


def filled(k, v, dtype, capacity, context, lengths):
    """A layer's cache with [batch, length, kv_heads, head_dim] written, as prompts leave it."""
    batch, length = k.shape[:2]
    zigzag = zigzag_of(64, context)
    store = empty_kv_array((batch, KV_HEADS, capacity, HEAD_DIM), dtype)
    each = capacity // context
    position = np.concatenate([zigzag.position(d, np.arange(each)) for d in range(context)])

    def laid(x):
        x = np.pad(x, ((0, 0), (0, capacity - length), (0, 0), (0, 0)))
        return store.quantize(jnp.asarray(x[:, position].swapaxes(1, 2), jnp.float32))

    cache = FullCache(k=laid(k), v=laid(v), zigzag=zigzag)
    if store.scale is not None:
        k = np.asarray(hadamard_transform(jnp.asarray(k)))
        blocks = np.zeros((2, batch, KV_HEADS, BLOCK, HEAD_DIM), np.float32)
        for row, end in enumerate(lengths):
            first = end // BLOCK * BLOCK
            for block, x in zip(blocks, (k, v), strict=True):
                block[row, :, : end - first] = x[row, first:end].swapaxes(0, 1)
        cache = FloatTail(cache.replace(k=laid(k)), FloatBlock(*map(jnp.asarray, blocks)))
    return cache


def outputs(mesh_sizes, dtype, lengths, steps, kept, seed=0, last=LAST):
    """What `steps` tokens after prompts get, and what they should, [steps, batch, heads, ...]."""
    rng = np.random.default_rng(seed)
    mesh = make_mesh(dict(zip(("data", "context", "model"), mesh_sizes, strict=True)))
    _, context, shards = mesh_sizes
    total = max(lengths) + steps
    capacity = -(-total // (256 * context)) * 256 * context
    shape = len(lengths), total, KV_HEADS, HEAD_DIM
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((*shape[:2], HEADS, HEAD_DIM)).astype(np.float32)
    spec = WindowSpec(SINKS, last)
    cache = filled(k[:, : max(lengths)], v[:, : max(lengths)], dtype, capacity, context, lengths)
    with jax.set_mesh(mesh):
        parts = HeadSplit(kept, ((KV_HEADS // shards - kept, spec),))
        small = jax.jit(lambda c, n: compress(c, n, parts, shards))(cache, jnp.asarray(lengths))
    step = jax.jit(lambda q, k, v, at, c: update_and_attend(mesh, q, k, v, at, None, c, True))
    found, wanted = [], []
    per_shard = KV_HEADS // shards
    whole = [h for h in range(KV_HEADS) if h % per_shard < kept]
    for n in range(steps):
        at = np.asarray(lengths) + n
        rows = np.arange(len(lengths))
        new = [x[rows, at][:, None] for x in (q, k, v)]
        out, small = step(*map(jnp.asarray, new), jnp.asarray(at)[:, None], small)
        found.append(np.asarray(out)[:, 0])
        for row, position in enumerate(at):
            apart = attention_over_what_is_kept(
                q[row, position], k[row], v[row], position, lengths[row], spec
            )
            every = oracle.attention(
                q[row, position][None, None], k[row][None], v[row][None], [[position]]
            )[0][0, 0]
            of_whole = np.isin(np.arange(HEADS) // (HEADS // KV_HEADS), whole)
            wanted.append(np.where(of_whole[:, None], every, apart))
    return np.array(found), np.array(wanted).reshape(np.array(found).shape), small


slow = pytest.mark.slow("one device and all axes together are quick, and each format once")
MESHES = ((1, 8, 1), (1, 1, 4))


@pytest.mark.parametrize(
    "mesh, lengths",
    [
        ((1, 1, 1), (700, 350)),
        ((1, 1, 1), (20, 2)),
        ((2, 2, 2), (700, 350)),
        pytest.param((1, 4, 1), (301, 305), marks=slow),
        *(pytest.param(mesh, (700, 350), marks=slow) for mesh in MESHES),
    ],
)
def test_tokens_see_what_is_kept_and_what_was_dropped_as_one(mesh, lengths):
    kept = 1 if mesh[2] < 4 else 0
    found, wanted, _ = outputs(mesh, "float32", lengths, 12, kept)
    np.testing.assert_allclose(found, wanted, atol=3e-6)


@pytest.mark.parametrize(
    "mesh, dtype, error",
    [
        ((1, 1, 1), "int8", 3e-2),
        ((1, 4, 2), "bfloat16", 2e-2),
        pytest.param((1, 1, 1), "int4", 0.3, marks=slow),
        pytest.param((1, 4, 2), "int8", 3e-2, marks=slow),
    ],
)
def test_in_every_format(mesh, dtype, error):
    found, wanted, _ = outputs(mesh, dtype, (BLOCK + 200, 350), 4, 1)
    assert np.abs(found - wanted).max() < error


def test_a_window_rolls_for_more_than_its_own_length():
    found, wanted, small = outputs((1, 1, 1), "float32", (70, 60), 60, 0, last=40)
    np.testing.assert_allclose(found[-3:], wanted[-3:], atol=3e-6)
    assert small.groups[0].compensation_token.count.tolist() == [70 + 20 - SINKS, 60 + 20 - SINKS]


numbers = st.floats(-3, 3, width=32)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 104_821), st.lists(numbers, min_size=8, max_size=8), st.integers(0, 99))
def test_compensation_is_exact_where_dropped_keys_are_equal(count, key, seed):
    rng = np.random.default_rng(seed)
    key = np.array(key)
    q, near_k, near_v = rng.standard_normal((3, 8))
    values = rng.standard_normal((min(count, 50), 8))
    mean = values.mean(axis=0)
    scale = 8**-0.5
    dropped = CompensationToken(*(jnp.asarray(x, jnp.float32)[None, None] for x in (key, mean)),
                      jnp.asarray([count]))  # fmt: skip
    scaled = jnp.asarray(q * scale, jnp.float32)[None, None, None, None]
    lse = jnp.asarray([[[[q @ near_k * scale]]]], jnp.float32)
    near = Partial(jnp.asarray(near_v, jnp.float32)[None, None, None, None], lse)
    found = merge(near, attend_to_compensation_token(scaled, dropped)).values[0, 0, 0, 0]
    # `count` tokens with one key, whose values have this mean.
    weights = np.array([np.exp(q @ near_k * scale), count * np.exp(q @ key * scale)])
    wanted = weights / weights.sum() @ np.array([near_v, mean])
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_heads_that_keep_everything_are_those_of_the_whole_cache():
    rng = np.random.default_rng(0)
    mesh = make_mesh("")
    k, v = (rng.standard_normal((1, 400, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in "kv")
    cache = filled(k, v, "float32", 512, 1, [400])
    parts = HeadSplit(KV_HEADS, ())
    small = jax.jit(lambda c, n: compress(c, n, parts, 1))(cache, jnp.array([400]))
    q = jnp.asarray(rng.standard_normal((1, 1, HEADS, HEAD_DIM)), jnp.float32)
    new = jnp.asarray(k[:, :1]), jnp.asarray(v[:, :1])
    at = jnp.array([[400]])
    one, _ = jax.jit(lambda c: update_and_attend(mesh, q, *new, at, None, c, True))(small)
    other, _ = jax.jit(lambda c: update_and_attend(mesh, q, *new, at, None, c, True))(cache)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_third_of_the_bytes_are_left_at_131072_tokens(dtype):
    """28 layers of 4 KV heads, of which 15% keep everything; the arrays' own sizes."""
    length, layers, chosen = 131_072, 28, 17
    capacity = length + 256
    spec = WindowSpec(4, max(4000, -(-length // 5)))
    kept = [1] * chosen + [0] * (layers - chosen)
    shape = 1, KV_HEADS, capacity, 128
    empty = lambda: empty_kv_array(shape, dtype)  # noqa: E731
    full = jax.eval_shape(lambda: FullCache(empty(), empty()))
    rows = jax.ShapeDtypeStruct((1,), "int32")

    def kept_by(heads):
        parts = HeadSplit(heads, ((KV_HEADS - heads, spec),))
        return jax.eval_shape(lambda c, n: compress(c, n, parts, 1), full, rows)

    small = [kept_by(heads) for heads in kept]

    def nbytes(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert nbytes(small) / (layers * nbytes(full)) <= 0.34
    floats = 2 * layers * KV_HEADS * capacity * 128 * 2  # in bfloat16
    assert nbytes(small) / floats <= (0.34 if dtype == "bfloat16" else 0.34 * 0.52)
