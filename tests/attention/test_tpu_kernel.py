"""The TPU kernel, evaluated on the CPU, against its contract in float64.

The measure is the plain implementation in the same dtype, a softmax over the whole dequantized KV
array: the kernel may be at most twice as far from the truth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.attention.tpu import attend
from lsjax.runtime.precision import einsum

kernel = jax.jit(functools.partial(attend, interpret=True))


class Case(NamedTuple):
    """The KV array and its queries; dtype is the queries'."""

    batch: int
    kv_heads: int
    group: int
    length: int
    head_dim: int
    capacity: int
    store: str
    dtype: str
    window: int | None
    seed: int = 0


def any_case(seed):
    rng = np.random.default_rng(seed)

    def one_of(*options):
        return options[rng.integers(len(options))]

    store = one_of("int8", "int8", "bfloat16", "float32")
    return Case(
        batch=one_of(1, 3),
        kv_heads=one_of(1, 2, 3),
        group=one_of(1, 2, 7, 8),
        length=one_of(1, 1, 2, 23, 130),
        head_dim=one_of(8, 32, 64, 80, 96, 128, 256),
        capacity=one_of(1, 16, 256, 768, 1280),
        store=store,
        dtype=one_of("bfloat16", "float32") if store == "int8" else store,
        window=one_of(None, None, 1, 40, 300),
        seed=seed,
    )


CASES = [
    *map(any_case, (0, 1, 2, 3, 5, 6, 7)),
    pytest.param(any_case(4), marks=pytest.mark.slow("ten seconds for the widest heads")),
    # Several blocks of queries and of keys, the last of queries padded.
    Case(2, 1, 8, 150, 128, 1536, "int8", "bfloat16", None),
    Case(1, 1, 3, 400, 64, 2048, "float32", "float32", 600),
    # Blocks of some of the heads.
    Case(2, 16, 1, 1, 16, 768, "int8", "float32", None),
    # Decode far into a long KV array, each row at a position of its own.
    Case(4, 2, 7, 1, 64, 16384, "int8", "bfloat16", None),
]


def store_and_queries(case):
    rng = np.random.default_rng(case.seed)
    kept = (case.batch, case.kv_heads, case.capacity)
    q = rng.standard_normal((case.batch, case.kv_heads, case.group, case.length, case.head_dim))
    q = jnp.asarray(2 * q * case.head_dim**-0.5, case.dtype)
    if case.store == "int8":
        k, v = (jnp.asarray(rng.integers(-127, 128, (*kept, case.head_dim)), "int8") for _ in "kv")
        scales = [jnp.asarray(rng.uniform(0.005, 0.02, kept), "bfloat16") for _ in "kv"]
        return q, k, v, *scales
    k, v = (jnp.asarray(rng.standard_normal((*kept, case.head_dim)), case.store) for _ in "kv")
    return q, k, v, None, None


def ranges(case):
    """What causal queries see; rows are where they are, some before the first slot or past all."""
    rng = np.random.default_rng(case.seed)
    start = rng.integers(-case.length, case.capacity + case.length, (case.batch, 1))
    end = start + 1 + np.arange(case.length)
    begin = np.zeros_like(end) if case.window is None else end - case.window
    return begin.astype("int32"), end.astype("int32")


def contract(q, k, v, k_scale, v_scale, begin, end):
    """Values and log-sum-exp in float64, straight from the definition."""
    q, k, v = dequantised("float64", q, k, v, k_scale, v_scale)
    slots = np.arange(k.shape[2])
    visible = (begin[..., None] <= slots) & (slots < end[..., None])
    scores = np.where(visible[:, None, None], np.einsum("bkgld,bksd->bkgls", q, k), -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    values = np.einsum("bkgls,bksd->bkgld", weights / np.where(total > 0, total, 1.0), v)
    with np.errstate(divide="ignore"):
        return values, (highest + np.log(total))[..., 0]


@jax.jit
def plain(q, k, v, begin, end):
    """The same in the inputs' dtype, scores and softmax in float32; nan where nothing is seen."""
    slots = jnp.arange(k.shape[2])
    visible = (begin[..., None] <= slots) & (slots < end[..., None])
    scores = einsum("bkgld,bksd->bkgls", q, k)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return einsum("bkgls,bksd->bkgld", weights, v), jax.nn.logsumexp(scores, axis=-1)


def dequantised(dtype, q, k, v, k_scale, v_scale):
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    if k_scale is not None:
        k, v = (
            x * np.asarray(scale).astype(np.float64)[..., None]
            for x, scale in ((k, k_scale), (v, v_scale))
        )
    return tuple(x.astype(jnp.dtype(dtype)) for x in (q, k, v))


def check(case, begin, end):
    inputs = store_and_queries(case)
    got = kernel(*inputs, begin, end)
    truth = contract(*inputs, begin, end)
    reference = plain(*dequantised(case.dtype, *inputs), begin, end)
    key_range = np.isfinite(truth[1])
    for exact, ours, theirs in zip(truth, (got.values, got.lse), reference, strict=True):
        assert ours.dtype == jnp.float32
        error, plain_error = (
            np.max(np.abs(np.asarray(x)[key_range] - exact[key_range]), initial=0.0)
            for x in (ours, theirs)
        )
        assert error <= 2 * plain_error + 1e-6
    np.testing.assert_array_equal(got.values[~key_range], 0.0)
    np.testing.assert_array_equal(got.lse[~key_range], -np.inf)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_near_the_truth_as_plain_attention(case):
    check(case, *ranges(case))


def test_rows_that_see_nothing_beside_rows_that_see_all():
    case = Case(5, 2, 4, 1, 32, 768, "int8", "bfloat16", None)
    begin = np.asarray([[0], [-9], [700], [5000], [-5000]], "int32")
    end = np.asarray([[768], [0], [20], [6000], [5000]], "int32")
    check(case, begin, end)


def test_what_no_query_sees_is_not_read():
    """Neither a slot that is not yet written nor one that the window has left."""
    case = Case(2, 2, 4, 3, 32, 1280, "float32", "float32", None)
    q, k, v, *_ = store_and_queries(case)
    begin = np.asarray([[300, 301, 302], [520, 521, 522]], "int32")
    end = begin + 100
    blocks = np.arange(1280) // 256
    unread = np.stack([(blocks != 1), (blocks != 2)])[:, None, :, None]
    poisoned = (jnp.where(unread, jnp.nan, x) for x in (k, v))
    got, clean = (kernel(q, *kv, None, None, begin, end) for kv in (poisoned, (k, v)))
    np.testing.assert_array_equal(got.values, clean.values)
    np.testing.assert_array_equal(got.lse, clean.lse)
