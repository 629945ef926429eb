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
from helpers.oracle import attention, dequantised
from helpers.plain_attention import causal_attention

from lsjax.attention.blockwise import KeyRange, attend
from lsjax.attention.hadamard import hadamard_matrix
from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.cache import (
    DocumentCache,
    FloatBlock,
    FloatTail,
    FullCache,
    RollingCache,
    attach,
    detach,
    update_and_attend,
)
from lsjax.distributed.sequence_layout import Zigzag, round_up_to_blocks
from lsjax.distributed.sharding import make_mesh, sharding

HEAD_DIM = 32
MESHES = {
    name: dict(zip(("data", "context", "model"), map(int, name), strict=True))
    for name in ("111", "121", "141", "181", "142", "212", "222")
}

BLOCK = 16  # positions in a quantized cache's block, which its own queries attend to as floats


class Case(NamedTuple):
    """Tokens, slots of the cache, tokens a chunk; the last chunk is what remains. A chunk is one
    zigzag block unless `zigzag_block` says otherwise."""

    length: int
    capacity: int
    chunk: int
    window: int | None = None
    group: int = 2
    cache: str = "float32"
    mesh: str = "111"
    dtype: str = "float32"
    zigzag_block: int | None = None


def empty(case, batch, kv_heads):
    store = empty_kv_array((batch, kv_heads, case.capacity, HEAD_DIM), case.cache)
    kind = FullCache if case.window is None or case.capacity >= case.length else RollingCache
    cache = kind(store, store, zigzag(case), case.chunk if case.chunk > 1 else 0)
    if quantised(case):
        zeros = empty_kv_array((batch, kv_heads, BLOCK, HEAD_DIM), case.dtype).data
        cache = FloatTail(cache, FloatBlock(zeros, zeros))
    mesh = make_mesh(MESHES[case.mesh])
    specs = jax.tree.map(lambda s: sharding(mesh, s), cache.partition_specs())
    return jax.device_put(cache, specs)


def zigzag(case):
    """Returns the layout; single tokens work with any block length."""
    devices = MESHES[case.mesh]["context"]
    return Zigzag(devices, case.zigzag_block or round_up_to_blocks(case.chunk, devices))


def quantised(case):
    return case.cache in ("int8", "int4")


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
    return jax.jit(
        functools.partial(update_and_attend, mesh, window=case.window, decode=case.chunk == 1)
    )


def turned(x, dtype):
    """Returns queries or keys Hadamard-transformed, as for a quantized cache, in `dtype`."""
    matrix = hadamard_matrix(HEAD_DIM).astype(dtype)
    return np.asarray(x, dtype) @ matrix * dtype(HEAD_DIM**-0.5)


def in_chunks(case, q, k, v):
    """Outputs of all tokens, and the cache after them."""
    step, cache, outputs = stepper(case), empty(case, q.shape[0], k.shape[2]), []
    for start in range(0, case.length, case.chunk):
        y, cache = step_of(case, step, cache, q, k, v, start, np.full(q.shape[0], case.length))
        outputs.append(y)
        assert arrays(cache).k.capacity == case.capacity
    return np.concatenate(outputs, axis=1).astype(np.float64), cache


def step_of(case, step, cache, q, k, v, start, lengths):
    """Runs one chunk; a context axis gets it padded and in zigzag order."""
    end = min(start + case.chunk, case.length)
    order = np.arange(end - start)
    if zigzag(case).devices > 1 and case.chunk > 1:
        order = zigzag(case).permutation(round_up_to_blocks(case.chunk, zigzag(case).devices))
    given = [np.pad(x[:, start:end], ((0, 0), (0, len(order)), (0, 0), (0, 0))) for x in (q, k, v)]
    positions = np.tile(start + order, (q.shape[0], 1))
    y, cache = step(*(x[:, order] for x in given), positions, lengths, cache)
    return np.asarray(y)[:, np.argsort(order)][:, : end - start], cache


def arrays(cache):
    """The cache of all blocks."""
    return cache.inner if isinstance(cache, FloatTail) else cache


def in_order(case, cache):
    """Keys and values with slots in the order of positions, device after device no longer."""
    where = np.argsort(zigzag(case).permutation(case.capacity))
    return jax.tree.map(lambda x: np.asarray(x)[:, :, where], arrays(cache))


# Each format of the cache meets chunks, single tokens, a window, a mesh and a narrow dtype.
CASES = [
    Case(1, 1, 1, group=1),
    Case(49, 64, 7, group=8),
    # More than one block of queries, padded, and more than one of keys.
    Case(700, 1024, 300, window=100),
    Case(49, 64, 7, window=8, cache="bfloat16", dtype="bfloat16", group=4),
    Case(49, 64, 7, cache="int8", dtype="bfloat16"),
    Case(49, 64, 16, cache="int4", group=4),
    # A few tokens over many keys, in one block and in several.
    Case(60, 300, 1, group=7),
    Case(60, 9300, 1, group=7, cache="int8", dtype="bfloat16"),
    # Sharded over the context axis: in one chunk and in many, not multiples of a block.
    Case(50, 64, 64, mesh="181"),
    Case(49, 64, 16, mesh="142"),
    Case(61, 64, 1, mesh="121"),
    Case(49, 96, 24, window=12, cache="int8", dtype="bfloat16", mesh="212"),
    Case(61, 64, 32, cache="int4", mesh="181"),
    # More than one block on its way.
    Case(700, 2 * 4352, 256, window=300, group=1, mesh="121"),
]
MORE = [
    Case(5, 37, 5),
    Case(50, 64, 1),
    Case(80, 8192, 79, group=1),
    Case(700, 1024, 700, group=1),
    Case(600, 4608, 600, window=512, group=1),
    Case(49, 64, 7, window=1),
    Case(700, 1024, 350, cache="bfloat16", dtype="bfloat16"),
    Case(200, 1024, 100, cache="int8", window=90),
    Case(70, 128, 70, cache="int4", window=30),
    Case(60, 9300, 5, group=3, cache="bfloat16"),
    Case(60, 600, 1, group=7, cache="int8", mesh="212"),
    Case(60, 5000, 6, group=2, cache="int4"),
    Case(49, 64, 16, mesh="222"),
    Case(49, 96, 24, window=12, cache="int8", mesh="141"),
    Case(49, 64, 8, group=4, cache="bfloat16", dtype="bfloat16", mesh="142"),
    Case(120, 2 * 4352, 64, cache="int8", group=1, mesh="121"),
]
slow = pytest.mark.slow("the quick cases have each format, chunk, window and axis, in pairs")
MORE = [pytest.param(case, marks=slow) for case in MORE]


def truth_and_plain(case, q, k, v, cache):
    """Attention to what the cache holds: in float64, and plainly in the case's dtype.

    In a quantized cache a query attends to its own block as it was given, and to the blocks
    before it as they were quantized.
    """
    plain = jax.jit(causal_attention, static_argnums=3)
    cache = in_order(case, cache)
    if not quantised(case):
        k, v = (dequantised(store)[:, : case.length] for store in (cache.k, cache.v))
        truth, _ = attention(q, k, v, np.arange(case.length)[None], case.window)
        k, v = (x.astype(jnp.dtype(case.dtype)) for x in (k, v))
        return truth, np.asarray(plain(q, k, v, case.window))
    held = [dequantised(store) for store in (cache.k, cache.v)]

    def block(start, end, q, *given):
        """The block's queries at their positions, and the keys and values that they see; what
        stands after these is of no account, and makes all blocks one shape."""
        queries = np.zeros_like(q)
        queries[:, start:end] = q[:, start:end]
        key_range = (
            np.concatenate([h[:, :start], np.asarray(g[:, start:], np.float64)], axis=1)
            for h, g in zip(held, given, strict=True)
        )
        return queries, *key_range

    truths, plains = [], []
    for start in range(0, case.length, BLOCK):
        end = min(start + BLOCK, case.length)
        exact = block(start, end, turned(q, np.float64), turned(k, np.float64), v)
        truth, _ = attention(*exact, np.arange(case.length)[None], case.window)
        truths.append(truth[:, start:end])
        rounded = block(start, end, turned(q, np.float32), turned(k, np.float32), v)
        rounded = (np.asarray(x, jnp.dtype(case.dtype)) for x in rounded)
        plains.append(np.asarray(plain(*rounded, case.window))[:, start:end])
    return np.concatenate(truths, axis=1), np.concatenate(plains, axis=1)


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_as_near_the_truth_as_plain_attention(case):
    q, k, v = queries_keys_values(case)
    got, cache = in_chunks(case, q, k, v)
    truth, plain = truth_and_plain(case, q, k, v, cache)
    error, plain_error = (np.max(np.abs(np.asarray(x, np.float64) - truth)) for x in (got, plain))
    assert error <= 2 * plain_error + 1e-7


def on_gpu(length, chunk, cache, mesh="111", **more):
    return Case(length, 256, chunk, cache=cache, mesh=mesh, dtype="bfloat16", **more)


# Chunks are of several blocks, of one, of half a block, and begin within one; the last is short.
ON_GPU = [on_gpu(128, 64, "int8")]
MORE_ON_GPU = [
    on_gpu(150, 48, "bfloat16"),
    on_gpu(70, 32, "bfloat16", "121"),
    *(on_gpu(150, chunk, "int8") for chunk in (8, 16, 24)),
    on_gpu(150, 64, "bfloat16", window=20),
    on_gpu(150, 32, "int8", window=20),
    *(on_gpu(128, chunk, "int8", mesh) for chunk, mesh in ((32, "141"), (64, "181"))),
    on_gpu(128, 64, "int8", "121", zigzag_block=8),
    on_gpu(70, 32, "int4", "222"),
]
MORE_ON_GPU = [pytest.param(case, marks=slow) for case in MORE_ON_GPU]


@pytest.mark.parametrize("case", [*ON_GPU, *MORE_ON_GPU], ids=str)
def test_on_a_gpu_as_near_the_truth_as_plain_attention(gpu, case):
    q, k, v = queries_keys_values(case)
    got, cache = in_chunks(case, q, k, v)
    truth, plain = truth_and_plain(case, q, k, v, cache)
    error, plain_error = (np.max(np.abs(np.asarray(x, np.float64) - truth)) for x in (got, plain))
    assert error <= 2 * plain_error + 1e-7


DOCUMENT = 3 * BLOCK  # positions of a document that all rows begin with


def after_a_document(case, q, k, v):
    """Outputs of the tokens after the document, which is kept once on each device."""
    rows = MESHES[case.mesh]["data"]
    whole = case._replace(length=DOCUMENT, chunk=DOCUMENT)
    _, document = in_chunks(whole, *(x[:rows, :DOCUMENT] for x in (q, k, v)))
    own = empty(case, q.shape[0], k.shape[2])
    if quantised(case):
        own = own.replace(inner=own.inner.replace(chunk=0))
    held = DocumentCache((arrays(document),), np.int32(DOCUMENT), ())
    mesh = make_mesh(MESHES[case.mesh])

    @jax.jit
    def step(q, k, v, positions, lengths, own):
        (cache,) = attach((own,), held)
        y, cache = update_and_attend(mesh, q, k, v, positions, lengths, cache, case.chunk == 1)
        return y, detach((cache,))[0]

    outputs, lengths = [], np.full(q.shape[0], case.length)
    for start in range(DOCUMENT, case.length, case.chunk):
        y, own = step_of(case, step, own, q, k, v, start, lengths)
        outputs.append(y)
    return np.concatenate(outputs, axis=1).astype(np.float64)


def check_after_a_document(case):
    q, k, v = queries_keys_values(case)
    for x in (q, k, v):
        x[1, :DOCUMENT] = x[0, :DOCUMENT]
    _, cache = in_chunks(case, q, k, v)
    truth, plain = (x[:, DOCUMENT:] for x in truth_and_plain(case, q, k, v, cache))
    got = after_a_document(case, q, k, v)
    error, plain_error = (np.max(np.abs(np.asarray(x, np.float64) - truth)) for x in (got, plain))
    assert error <= 2 * plain_error + 1e-7


@pytest.mark.parametrize(
    "case",
    [
        # A chunk is run in several pieces.
        Case(79, 128, 10, cache="int8", group=16),
        *(
            pytest.param(case, marks=slow)
            for case in (
                Case(79, 128, 1, cache="int8", group=16),
                Case(79, 128, 16, mesh="222"),
                Case(70, 128, 1, cache="int4", mesh="121"),
            )
        ),
    ],
    ids=str,
)
def test_after_a_document_as_near_the_truth_as_plain_attention(case):
    check_after_a_document(case)


@pytest.mark.slow("a document's Partial is quick on a CPU, and GPU prefill of other caches")
@pytest.mark.parametrize(
    "case",
    [
        on_gpu(79, 31, "int8"),
        on_gpu(80, 16, "int8", "222"),
    ],
    ids=str,
)
def test_after_a_document_on_a_gpu(gpu, case):
    check_after_a_document(case)


@pytest.mark.parametrize(
    "cache", ["int8", *(pytest.param(c, marks=slow) for c in ("float32", "int4"))]
)
def test_the_cache_holds_the_same_bits_however_the_text_is_cut(cache):
    base = Case(50, 64, 50, cache=cache)
    inputs = queries_keys_values(base)
    outputs, whole = in_chunks(base, *inputs)
    for change in ({"chunk": 10}, {"chunk": 1}, {"chunk": 32, "mesh": "181"}):
        case = base._replace(**change)
        again, cut = in_chunks(case, *inputs)
        tails, cut = (whole, cut), in_order(case, cut)
        np.testing.assert_allclose(again, outputs, atol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (in_order(base, whole), cut)), strict=True):
            a, b = a[:, :, :50], b[:, :, :50]
            different = np.mean(np.asarray(a) != np.asarray(b))
            # The Hadamard transform is a product: its last bits may depend on size and break a tie.
            assert different <= (1e-3 if quantised(base) else 0)
        if quantised(base):  # only the filled part of the float tail counts
            for a, b in zip(*(jax.tree.leaves(x.tail) for x in tails), strict=True):
                a, b = (x[:, :, : 50 % BLOCK] for x in (a, b))
                np.testing.assert_allclose(a, b, atol=1e-5)


FEW = [
    ("111", None, 1, "float32"),
    ("212", 5, 2, "float32"),
    ("141", 40, 7, "int8"),
]
MORE_FEW = [
    ("111", None, 7, "int4"),
    ("141", None, 1, "int4"),
    ("141", None, 7, "float32"),
    ("141", 5, 2, "float32"),
    ("212", 40, 1, "int8"),
]


@pytest.mark.parametrize(
    "mesh, window, few, cache", [*FEW, *(pytest.param(*case, marks=slow) for case in MORE_FEW)]
)
def test_a_few_tokens_at_different_positions_in_each_row(mesh, window, few, cache):
    """Prompts of different lengths, run together in chunks; then some tokens more of each, a few
    at a time. What a step before has written past a row's end is written again."""
    lengths = np.asarray([3, 40, 48, 16])
    case = Case(64, 96, 24, window, mesh=mesh, cache=cache)
    q, k, v = queries_keys_values(case, batch=4)
    step, together = stepper(case), empty(case, 4, 2)
    for start in range(0, 60, 24):
        _, together = step_of(case, step, together, q, k, v, start, lengths)
    alone = in_chunks(case._replace(mesh="111", chunk=64), q, k, v)[0]
    decode = stepper(case._replace(chunk=1))
    rejected = jnp.ones((4, few, 1, 1))
    for _ in range(0, 14, few):
        positions = lengths[:, None] + np.arange(few)
        at = (np.arange(4)[:, None], positions)
        wrong = (x[at] + rejected for x in (q, k, v))
        _, together = decode(*wrong, positions, None, together)
        got, together = decode(q[at], k[at], v[at], positions, None, together)
        stand = np.full(4, few)
        if quantised(case):  # answers beyond the block mean nothing
            stand = np.minimum(few, BLOCK - lengths % BLOCK)
        answered = np.arange(few) < stand[:, None]
        np.testing.assert_allclose(np.asarray(got)[answered], alone[at][answered], atol=1e-5)
        lengths = lengths + stand


@pytest.mark.parametrize(
    "length, capacity, before_or_after",
    [(1, 8, "before"), (4, 8, "after"), (300, 1024, "before"), (300, 1024, "after")],
)
def test_queries_that_see_no_key(length, capacity, before_or_after):
    """A shard may hold only later positions, or only ones before the window."""
    keys = np.random.default_rng(0).standard_normal((1, 2, capacity, HEAD_DIM)).astype("f4")
    store, at = KVArray(keys, None), np.arange(length)[None]
    q = np.ones((1, 2, 3, length, HEAD_DIM), "f4")
    key_range = KeyRange(None, at - 5000, at - 5000)
    if before_or_after == "before":
        key_range = KeyRange(at + 4998, at + 5001, at + 5000)
    partial = jax.jit(attend)(q, store, store, key_range)
    np.testing.assert_array_equal(partial.values, np.zeros(q.shape))
    np.testing.assert_array_equal(partial.lse, np.full(q.shape[:-1], -np.inf))


def test_log_sum_exp_of_a_shard():
    """The second of two shards, where some queries see nothing."""
    case = Case(64, 64, 64)
    q, k, v = queries_keys_values(case, batch=1)
    grouped = (q * HEAD_DIM**-0.5).reshape(1, 64, 2, 2, HEAD_DIM).transpose(0, 2, 3, 1, 4)
    half = [KVArray(x[:, 32:].swapaxes(1, 2), None) for x in (k, v)]
    at = np.arange(64)[None] - 32
    partial = jax.jit(attend)(grouped, *half, KeyRange(None, at + 1, at))
    assert np.all(partial.lse[..., :32] == -np.inf)
    values, lse = attention(q[:, 32:], k[:, 32:], v[:, 32:], np.arange(32)[None])
    got = np.moveaxis(partial.lse[..., 32:], 3, 1).reshape(lse.shape)
    np.testing.assert_allclose(got, lse, atol=1e-5)
    got = np.moveaxis(partial.values[..., 32:, :], 3, 1).reshape(values.shape)
    np.testing.assert_allclose(got, values, atol=1e-5)


ROLLING = [
    Case(110, 48, 1, window=20, cache="int8"),
    pytest.param(Case(200, 64, 32, window=30, cache="int8", mesh="121"), marks=slow),
    pytest.param(Case(200, 48, 16, window=20), marks=slow),
    pytest.param(Case(110, 64, 1, window=30, mesh="141"), marks=slow),
]


@pytest.mark.parametrize("case", ROLLING, ids=str)
def test_a_window_in_a_rolling_cache_sees_what_it_sees_in_a_whole_one(case):
    inputs = queries_keys_values(case)
    rolling, _ = in_chunks(case, *inputs)
    whole, _ = in_chunks(case._replace(capacity=256), *inputs)
    np.testing.assert_allclose(rolling, whole, atol=1e-5)


def test_a_row_that_has_ended_keeps_its_window_while_longer_ones_go_on():
    case = Case(96, 48, 16, window=20)
    q, k, v = queries_keys_values(case)
    lengths = np.array([30, 96])
    found = []
    for capacity in (48, 256):
        roomy = case._replace(capacity=capacity)
        step, cache = stepper(roomy), empty(roomy, 2, 2)
        for start in range(0, 96, 16):
            _, cache = step_of(roomy, step, cache, q, k, v, start, lengths)
        decode = jax.jit(
            functools.partial(update_and_attend, make_mesh(""), window=20, decode=True)
        )
        new = [x[:, :3] for x in (q, k, v)]  # three drafted tokens; the second row wraps around
        positions = np.array([[30, 31, 32], [95, 96, 97]])
        y, _ = decode(*new, positions, lengths + 3, cache)
        found.append(np.asarray(y))
    np.testing.assert_allclose(*found, atol=1e-5)
