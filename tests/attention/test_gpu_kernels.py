"""Attention on a GPU against float64: decode interpreted, prefill with a stand-in for cuDNN.

The measure is the plain implementation in the same dtype: both may be at most twice as far from
the truth.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cudnn import dot_product_attention
from helpers.mosaic_gpu import interpreter

from lsjax.attention import cudnn, dispatch, gpu, gpu_mosaic
from lsjax.attention.blockwise import KeyRange, QueryBlocks
from lsjax.attention.gpu import Slots
from lsjax.attention.gpu import decode as decode_on_gpu
from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial


@jax.jit
def decode(q, *slots):
    return decode_on_gpu(q, Slots(*slots), interpret=True)


ALIGNED = 256  # a capacity is a multiple of this, and no block that is read is longer


class Case(NamedTuple):
    """Shapes and dtypes; `slots` are (begin, end) of each row, the same for all its queries."""

    slots: tuple[tuple[int, int], ...]
    head_dim: int
    group: int
    cache: str
    dtype: str
    capacity: int = 1024
    kv_heads: int = 2
    length: int = 1


def drawn(seed):
    """A case at random, whose rows see all, nothing and something."""
    rng = np.random.default_rng(seed)
    capacity = ALIGNED * int(rng.integers(1, 7))
    some = sorted(int(x) for x in rng.integers(-100, capacity + 100, 2))
    everything, nothing = (-7, capacity + 9), (int(rng.integers(capacity)),) * 2
    cache, dtype = [
        ("int8", "float32"),
        ("int8", "bfloat16"),
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
    ][seed % 4]
    return Case(
        slots=(everything, nothing, tuple(some), (capacity - 3, 5))[: int(rng.integers(1, 5))][
            ::-1
        ],
        head_dim=(64, 80, 96, 128, 256)[seed % 5],
        group=seed % 8 + 1,
        cache=cache,
        dtype=dtype,
        capacity=capacity,
        kv_heads=int(rng.integers(1, 4)),
    )


def inputs(case):
    """Peaked attention: q, k, v, k_scale, v_scale, begin, end."""
    rng = np.random.default_rng(case.capacity + case.group)
    rows = (len(case.slots), case.kv_heads)

    def draw(*shape):
        return rng.standard_normal((*rows, *shape)).astype(np.float32)

    def store(x):
        if case.cache != "int8":
            return x.astype(jnp.dtype(case.cache)), None
        scale = (np.abs(x).max(axis=-1) / 127).astype(jnp.bfloat16)
        steps = np.round(x / scale.astype(np.float32)[..., None])
        return steps.clip(-127, 127).astype(np.int8), scale

    q = 4 * draw(case.group, case.length, case.head_dim) / case.head_dim**0.5
    k, k_scale = store(draw(case.capacity, case.head_dim))
    v, v_scale = store(draw(case.capacity, case.head_dim))
    begin, end = np.asarray(case.slots, np.int32).T[:, :, None].repeat(case.length, axis=2)
    return q.astype(jnp.dtype(case.dtype)), k, v, k_scale, v_scale, begin, end


def visible(k, begin, end):
    slots = np.arange(k.shape[2])
    return (slots >= begin[..., None]) & (slots < end[..., None])


def oracle(q, k, v, k_scale, v_scale, begin, end):
    """Values and log-sum-exps in float64, of queries that see something; else 0 and -inf."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    if k_scale is not None:
        k, v = (
            x * np.asarray(s).astype(np.float64)[..., None] for x, s in ((k, k_scale), (v, v_scale))
        )
    key_range = visible(k, begin, end)[:, None, None]
    scores = np.where(key_range, np.einsum("bkgld,bksd->bkgls", q, k), -np.inf)
    highest = np.where(key_range.any(-1), scores.max(axis=-1), 0.0)
    weights = np.exp(scores - highest[..., None])
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = highest + np.log(total)
    values = np.einsum("bkgls,bksd->bkgld", weights, v) / np.where(total > 0, total, 1)[..., None]
    return values, lse


@jax.jit
def plain(q, k, v, k_scale, v_scale, begin, end):
    """Attention with all scores at once, in q's dtype where a model would."""
    if k_scale is not None:
        k, v = (x * s.astype(jnp.float32)[..., None] for x, s in ((k, k_scale), (v, v_scale)))
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    slots = jnp.arange(k.shape[2])
    key_range = (slots >= begin[..., None]) & (slots < end[..., None])
    scores = jnp.where(key_range[:, None, None], dot("bkgld,bksd->bkgls", q, k), -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    return Partial(dot("bkgls,bksd->bkgld", weights.astype(q.dtype), v), lse)


def assert_as_near(got, reference, args):
    """`got` is at most twice as far from the truth as `reference`."""
    values, lse = oracle(*args)
    np.testing.assert_array_equal(got.lse == -np.inf, lse == -np.inf)
    np.testing.assert_array_equal(got.values[lse == -np.inf], 0)
    key_range = lse > -np.inf

    def error(partial):
        far = np.abs(np.asarray(partial.lse, np.float64)[key_range] - lse[key_range])
        return np.linalg.norm(partial.values - values, axis=-1).max(), np.max(far, initial=0.0)

    for far, reference_far in zip(error(got), error(reference), strict=True):
        assert far <= 2 * reference_far + 2e-6


def spoiled_where_unseen(k, v, k_scale, v_scale, begin, end):
    """Returns the KV arrays with NaN wherever no block of keys that is needed can reach."""
    first, last = begin // ALIGNED * ALIGNED, -(-end // ALIGNED) * ALIGNED
    needed = visible(k, first, last)[:, 0, None] & (begin < end)[:, None]

    def spoil(x, scale):
        if scale is None:
            return np.where(needed[..., None], x, np.nan).astype(x.dtype), None
        return x, np.where(needed, scale, np.nan).astype(scale.dtype)

    (k, k_scale), (v, v_scale) = spoil(k, k_scale), spoil(v, v_scale)
    return k, v, k_scale, v_scale, begin, end


# Each dtype of queries; the interpreter takes seconds for a large head.
SEEDS = (0, 1, 3)
slow = pytest.mark.slow("the interpreter takes up to ten seconds; SEEDS has each dtype of queries")


@pytest.mark.parametrize(
    "seed", [seed if seed in SEEDS else pytest.param(seed, marks=slow) for seed in range(10)]
)
def test_decode_reads_what_each_row_holds_and_is_as_near_the_truth_as_plain_attention(seed):
    args = inputs(drawn(seed))
    q, *stores = args
    got = decode(q, *spoiled_where_unseen(*stores))
    assert got.values.shape == q.shape and got.lse.shape == q.shape[:-1]
    assert_as_near(got, plain(*args), args)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=slow) for seed in (1, 2, 3))])
def test_decode_of_a_few_tokens_that_see_one_more_each(seed):
    """Also where they begin to see at all, or where a window moves on."""
    case = drawn(seed)._replace(length=5)
    q, *stores, begin, end = inputs(case)
    args = q, *stores, begin + np.arange(5, dtype="i4") * (seed % 2), end + np.arange(5, dtype="i4")
    assert_as_near(decode(*args), plain(*args), args)


def test_decode_over_a_store_of_a_few_slots():
    args = inputs(Case(((0, 30), (3, 5)), 64, 3, "int8", "float32", capacity=32))
    assert_as_near(decode(*args), plain(*args), args)


def executed(ptx, word):
    """Runs the few instructions that widen int8, which no interpreter of Pallas knows."""
    registers = {"$1": word}

    def halves(x):
        return np.array([x & 0xFFFF, x >> 16], np.uint16).view(jnp.bfloat16).astype(np.float64)

    for line in ptx.partition("\n")[2].rstrip(" }").splitlines():
        op, to, *operands = line.replace(",", " ").rstrip("; }").split()
        values = [registers[x] if x in registers else int(x, 0) for x in operands]
        match op:
            case "shr.u32":
                registers[to] = values[0] >> values[1]
            case "lop3.b32":
                assert values.pop() == 0xEA  # the truth table of a & b | c
                registers[to] = values[0] & values[1] | values[2]
            case "mov.b32":
                registers[to] = values[0]
            case "fma.rn.bf16x2":
                a, b, c = map(halves, values)
                registers[to] = a * b + c
    return registers["$0"]


def test_the_instructions_that_widen_int8_are_exact():
    values = np.arange(-128, 128, dtype=np.int8)
    for low, high in itertools.product(values, values[:: 255 // 5]):
        pairs = np.array([low, high, high, low], np.int8)
        (word,) = pairs.view(np.uint32).tolist()
        assert executed(gpu._WIDEN_LOW, word).tolist() == [low, high]
        assert executed(gpu._WIDEN_HIGH, word).tolist() == [high, low]


def test_int8_keys_that_the_kernel_could_not_address_are_refused():
    of = jax.ShapeDtypeStruct
    store, scale = of((5, 4, 2**20, 128), "int8"), of((5, 4, 2**20), "bfloat16")
    q, bound = of((5, 4, 8, 1, 128), "bfloat16"), of((5, 1), "int32")
    with pytest.raises(ValueError, match="split the cache"):
        jax.eval_shape(decode_on_gpu, q, Slots(store, store, scale, scale, bound, bound))


@pytest.fixture
def without_triton(monkeypatch):
    """Decode on an H100 in a JAX without Triton, interpreted."""
    with interpreter() as interpret:
        monkeypatch.setattr(dispatch, "HAS_TRITON", False)
        monkeypatch.setattr(gpu_mosaic, "on_hopper", lambda: True)
        monkeypatch.setattr(gpu_mosaic, "_PROGRAMS", 4)  # splits of more blocks than one
        interpreted = functools.partial(gpu_mosaic.decode, interpret=interpret)
        monkeypatch.setattr(gpu_mosaic, "decode", interpreted)
        yield


ROWS = (-7, 700), (3, 3), (100, 300)
OTHERS = pytest.mark.slow("the interpreter takes seconds; the first case has each of its steps")


@pytest.mark.parametrize(
    "case",
    [
        Case(((300, 500), (3, 3)), 64, 7, "int8", "bfloat16", capacity=512, kv_heads=1),
        *(
            pytest.param(case, marks=OTHERS)
            for case in (
                Case(ROWS, 64, 4, "bfloat16", "bfloat16", capacity=512, kv_heads=1, length=16),
                Case(ROWS[2:], 128, 8, "int8", "bfloat16", capacity=512, length=5),
                Case(ROWS[2:], 128, 1, "bfloat16", "bfloat16", capacity=512),
            )
        ),
    ],
    ids=lambda case: f"{case.cache}-{case.head_dim}-{case.group}x{case.length}",
)
def test_decode_without_triton_is_as_near_the_truth(without_triton, case):
    q, *stores, begin, end = inputs(case)
    later = np.arange(case.length, dtype="i4")
    args = q, *stores, begin + later, end + later
    k, v, k_scale, v_scale, *_ = spoiled_where_unseen(*stores, begin[:, :1], args[-1][:, -1:])

    @jax.jit
    def decode(*stores_of_each, begin, end):
        k, v = (KVArray(*x) for x in stores_of_each)
        return dispatch.attend("gpu", q, k, v, KeyRange(begin, end, end), None)

    got = decode((k, k_scale), (v, v_scale), begin=args[-2], end=args[-1])
    assert_as_near(got, plain(*args), args)


@jax.jit
def prefill(q, k, v, k_scale, v_scale, begin, end):
    """On the stand-in, with plain attention at the edges."""
    stores = k, v, k_scale, v_scale
    arrays = KVArray(k, k_scale), KVArray(v, v_scale)
    return cudnn.in_general(q, *arrays, begin, end, lambda b, e: plain(q, *stores, b, e))


def in_bfloat16(*args):
    """Plain attention that returns bfloat16, as cuDNN's does."""
    partial = plain(*args)
    return Partial(np.asarray(partial.values).astype(jnp.bfloat16).astype("f4"), partial.lse)


CHUNK = np.arange(48)[None]
PREFILLS = {
    "nothing yet": (0 * CHUNK, 0 * CHUNK),
    "one slot": (0 * CHUNK, 1 + 0 * CHUNK),
    "a prefix of more than one piece": (0 * CHUNK - 5, 0 * CHUNK + 33000),
    "whole pieces": (0 * CHUNK, 0 * CHUNK + 32768),
    "beyond the capacity": (0 * CHUNK, 0 * CHUNK + 99999),
    "causal": (0 * CHUNK, 33001 + CHUNK),
    "causal, the first queries see nothing": (0 * CHUNK, CHUNK - 20),
    "a window": (1000 + CHUNK, 1700 + CHUNK),
    "a window at the end of the store": (33000 + CHUNK, 33100 + CHUNK),
    "a window beyond the store": (99000 + CHUNK, 99100 + CHUNK),
    "rows that differ": (np.concatenate([CHUNK, 0 * CHUNK]), np.concatenate([CHUNK + 90, CHUNK])),
}


FLOATS = "bfloat16", pytest.mark.slow("int8 is widened to it; edges and rows are the same")


@pytest.mark.parametrize("cache", ["int8", pytest.param(FLOATS[0], marks=FLOATS[1])])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_is_as_near_the_truth_as_plain_attention(monkeypatch, name, cache):
    begin, end = (np.asarray(x, np.int32) for x in PREFILLS[name])
    monkeypatch.setattr(cudnn, "dot_product_attention", dot_product_attention)
    rows = ((0, 0),) * len(begin)
    case = Case(rows, 16, 2, cache, "bfloat16", capacity=33024, kv_heads=1, length=48)
    q, *stores, _, _ = inputs(case)
    args = (q, *stores, begin, end)
    assert_as_near(prefill(*args), in_bfloat16(*args), args)


@pytest.mark.slow("the planned path is quick, from the same function; others of cuDNN's are narrow")
@pytest.mark.parametrize("hopper", [True, False])
def test_heads_of_256_channels_are_left_to_cudnn_on_a_hopper(monkeypatch, hopper):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return dot_product_attention(*args, **options)

    monkeypatch.setattr(cudnn, "dot_product_attention", counted)
    monkeypatch.setattr(dispatch, "_has_capability_9", lambda: hopper)
    case = Case(((0, 0),), 256, 2, "int8", "bfloat16", capacity=512, kv_heads=1, length=80)
    q, k, v, k_scale, v_scale, _, _ = inputs(case)
    begin = np.zeros((1, 80), np.int32)
    end = 300 + np.arange(80, dtype=np.int32)[None]
    key_range = KeyRange(begin, end, end)
    run = jax.jit(
        lambda: dispatch.attend("gpu", q, KVArray(k, k_scale), KVArray(v, v_scale), key_range, None)
    )
    args = q, k, v, k_scale, v_scale, begin, end
    assert_as_near(run(), in_bfloat16(*args), args)
    assert bool(calls) == hopper


def test_what_all_queries_see_is_left_to_cudnn(monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", dot_product_attention)
    q, *stores, begin, end = args = inputs(
        Case(((0, 300), (0, 300)), 16, 2, "int8", "bfloat16", capacity=512, length=8)
    )

    def edges(begin, end):
        assert np.all(begin >= end)
        return plain(q, *stores, begin, end)

    k, v, k_scale, v_scale = stores
    arrays = KVArray(k, k_scale), KVArray(v, v_scale)
    got = cudnn.in_general(q, *arrays, begin, end, edges)
    assert_as_near(got, in_bfloat16(*args), args)


LENGTH, CAPACITY = 32, 256
# What each block sees of the slots before it: all, its own alone, some, or what a window shows.
BLOCKS = [
    QueryBlocks(8, causal=True),
    QueryBlocks(8, causal=True, window=21),
    *(
        pytest.param(blocks, marks=slow)
        for blocks in (
            QueryBlocks(32, causal=True),
            QueryBlocks(32, causal=False),
            QueryBlocks(8, causal=False),
            QueryBlocks(8, causal=True, before=0),
            QueryBlocks(32, causal=True, before=16),
            QueryBlocks(8, causal=False, before=16),
            QueryBlocks(8, causal=False, window=21),
            QueryBlocks(8, causal=True, window=9),
            QueryBlocks(8, causal=True, window=10),
            QueryBlocks(16, causal=True, window=60),
        )
    ),
]


def ranges(blocks, at):
    """Slots that queries from slot `at` on see, in two rows that differ where they may."""
    queries = np.tile(np.arange(at, at + LENGTH), (2, 1))
    own = queries - (queries - at) % blocks.size
    stop = queries + 1 if blocks.causal else own
    if blocks.window is not None:
        return np.maximum(queries + 1 - blocks.window, 0), stop
    if blocks.before is not None:
        return own - np.minimum(own, blocks.before), stop
    return None, np.maximum(stop - [[0], [at // 2]], 0)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_prefill_in_blocks_is_as_near_the_truth_from_every_start(monkeypatch, blocks):
    monkeypatch.setattr(cudnn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(cudnn, "PIECE", 64)  # the blocks of a window are more than one piece
    case = Case(((0, 0),) * 2, 16, 2, "int8", "bfloat16", CAPACITY, kv_heads=1, length=LENGTH)
    q, k, v, k_scale, v_scale, _, _ = inputs(case)
    arrays = KVArray(k, k_scale), KVArray(v, v_scale)
    run = jax.jit(lambda key_range: cudnn.in_blocks(q, *arrays, key_range, blocks))
    for at in (0, 1, 8, 13, 32, 64, 100, CAPACITY - LENGTH):
        start, stop = ranges(blocks, at)
        got = run(KeyRange(start, stop, stop))
        args = q, k, v, k_scale, v_scale, np.zeros_like(stop) if start is None else start, stop
        assert_as_near(got, in_bfloat16(*args), args)


@pytest.mark.parametrize(
    "blocks", [BLOCKS[0], pytest.param(QueryBlocks(32, causal=False), marks=slow)]
)
def test_blocks_may_all_see_from_one_slot_on(monkeypatch, blocks):
    monkeypatch.setattr(cudnn, "dot_product_attention", dot_product_attention)
    monkeypatch.setattr(cudnn, "PIECE", 128)
    case = Case(((0, 0),) * 2, 16, 2, "int8", "bfloat16", CAPACITY, kv_heads=1, length=LENGTH)
    q, k, v, k_scale, v_scale, _, _ = inputs(case)
    arrays = KVArray(k, k_scale), KVArray(v, v_scale)
    run = jax.jit(lambda key_range: cudnn.in_blocks(q, *arrays, key_range, blocks))
    # A piece from slot 200 on would be past the capacity.
    for first, at in ((0, 40), (40, 40), (33, 210), (200, CAPACITY - LENGTH)):
        _, stop = ranges(blocks, at)
        stop, start = np.tile(stop[:1], (2, 1)), np.full_like(stop, first)
        args = q, k, v, k_scale, v_scale, start, stop
        assert_as_near(run(KeyRange(start, stop, stop)), in_bfloat16(*args), args)
