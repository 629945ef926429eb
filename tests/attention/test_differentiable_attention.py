"""Attention of whole rows and its gradients against the float64 oracle, on every kind of mesh.

The measure is plain float32 attention, differentiated by JAX: working block by block, over devices
and from what was kept may be at most twice as far from the truth, in root mean square.
"""

import functools
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cudnn import AttentionBackward
from helpers.oracle import attention_gradients
from helpers.plain_attention import causal_attention
from hypothesis import given, settings

from lsjax.attention import cudnn_gradients, differentiable, dispatch
from lsjax.attention.blockwise import Blocks
from lsjax.attention.differentiable import RingSizes, self_attention
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import make_mesh
from lsjax.positions.alibi import alibi_slopes

RESULTS = ("out", "q", "k", "v")


class Case(NamedTuple):
    """A mesh as digits for data, context and model; heads are 2 for keys, `group` times for q."""

    mesh: str
    length: int
    batch: int = 2
    group: int = 2
    head_dim: int = 16
    window: int | None = None
    alibi: bool = False
    dtype: str = "float32"


def mesh_of(case):
    return make_mesh(dict(zip(("data", "context", "model"), map(int, case.mesh), strict=True)))


def slopes_of(case):
    return jnp.asarray(alibi_slopes(2 * case.group)) if case.alibi else None


@functools.cache
def inputs(case):
    """q, k, v and the gradient of the result; attention is peaked."""
    rng = np.random.default_rng(case.length)

    def draw(heads, size):
        x = size * rng.standard_normal((case.batch, case.length, heads, case.head_dim))
        return x.astype(jnp.dtype(case.dtype))

    heads = 2 * case.group
    return draw(heads, 1.5), draw(2, 1.5), draw(2, 1), draw(heads, 1)


def with_gradients(attention):
    """(q, k, v, d_out, begin) -> the result, and the gradients of q, k and v."""

    @jax.jit
    def both(q, k, v, d_out, begin):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, begin), q, k, v)
        return out, *pull(d_out)

    return both


@functools.cache
def plain(case):
    return with_gradients(
        lambda q, k, v, begin: causal_attention(q, k, v, case.window, slopes_of(case), begin)
    )


def dealt(case, sizes=RingSizes()):  # noqa: B008 (frozen)
    """As `plain`, of arrays in plain order, through the mesh."""
    mesh, order = mesh_of(case), Zigzag(int(case.mesh[1]), case.length).permutation(case.length)
    both = with_gradients(
        lambda q, k, v, begin: self_attention(
            mesh, q, k, v, begin, case.window, slopes_of(case), sizes
        )
    )
    return lambda *x: [np.asarray(y)[:, np.argsort(order)] for y in both(*(y[:, order] for y in x))]


dealt_once = functools.cache(dealt)


def assert_near_the_truth(case, begin, got):
    *given, d_out = inputs(case)
    key_range = begin
    if case.window is not None:
        key_range = np.maximum(begin, np.arange(case.length) + 1 - case.window)
    truth = attention_gradients(*given, d_out, key_range, slopes_of(case))
    measure = plain(case)(*given, d_out, begin)
    for name, true, ours, theirs in zip(RESULTS, truth, got, measure, strict=True):
        error, allowed = (
            np.sqrt(np.mean((np.asarray(x, np.float64) - true) ** 2)) for x in (ours, theirs)
        )
        assert error <= 2 * allowed + 2.0**-26 * np.abs(true).max(), name


@st.composite
def packed(draw, batch, length):
    """[batch, length] where documents begin, each row cut at random."""
    rows = []
    for _ in range(batch):
        cuts = draw(st.lists(st.integers(1, max(1, length - 1)), max_size=6))
        starts = np.array(sorted({0, *(c for c in cuts if c < length)}))
        rows.append(starts[np.searchsorted(starts, np.arange(length), side="right") - 1])
    return np.array(rows, np.int32)


# Every axis of the mesh, windows, ALiBi, sizes of head and group that no vector divides.
CASES = [
    # More than one block of queries and of keys, the last ones reaching back.
    Case("111", 600, batch=1, group=2),
    Case("121", 64, window=9, head_dim=24),
    Case("142", 64, alibi=True, window=20),
    Case("212", 44, group=3, head_dim=5),
]
MORE = [
    Case("111", 300, group=4, window=70),
    Case("111", 520, batch=1, alibi=True),
    Case("141", 72, group=3, window=2),
    Case("181", 160),
]
SLOW = pytest.mark.slow("CASES has all of these, in pairs")
MORE = [pytest.param(c, marks=SLOW) for c in MORE]


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_as_near_the_truth_as_plain_attention_however_rows_are_packed(case):
    @settings(max_examples=4, deadline=None)
    @given(packed(case.batch, case.length))
    def check(begin):
        assert_near_the_truth(case, begin, dealt_once(case)(*inputs(case), begin))

    check()


@pytest.mark.parametrize("window", [None, pytest.param(40, marks=SLOW)])
def test_as_near_when_keys_travel_in_many_pieces(window):
    sizes = RingSizes(24, 32, Blocks(rows=40, keys=((40, 12),)))
    case = Case("141", 4 * 96, batch=2, window=window)
    begin = np.zeros((2, case.length), np.int32)
    begin[0, 150:], begin[0, 151:] = 150, 151
    assert_near_the_truth(case, begin, dealt(case, sizes)(*inputs(case), begin))


@pytest.mark.slow("cuDNN's edges are these loops in bfloat16")
def test_as_near_in_bfloat16():
    case = Case("142", 160, dtype="bfloat16", group=4)
    begin = np.zeros((case.batch, case.length), np.int32)
    assert_near_the_truth(case, begin, dealt(case)(*inputs(case), begin))


BY_CUDNN = [
    (Case("121", 192, group=3, dtype="bfloat16"), RingSizes(slots=48)),
    pytest.param(Case("111", 300, dtype="bfloat16"), RingSizes(), marks=SLOW),
    pytest.param(Case("142", 384, window=70, dtype="bfloat16"), RingSizes(slots=24), marks=SLOW),
]


@pytest.mark.parametrize(("case", "sizes"), BY_CUDNN, ids=str)
def test_gradients_by_cudnn_are_as_near(monkeypatch, case, sizes):
    """With a stand-in for its backward pass, over pieces that end within a block of slots."""

    def on_gpu(platform, *args, **options):
        return dispatch.add_gradients("gpu", *args, **options)

    monkeypatch.setattr(differentiable, "add_gradients", on_gpu)
    monkeypatch.setattr(cudnn_gradients, "_dot_product_attention_bwd_p_wrapper", AttentionBackward)
    monkeypatch.setattr(cudnn_gradients, "QUERIES", 16)
    monkeypatch.setattr(cudnn_gradients, "PIECE", 2 * 20)
    begin = np.zeros((case.batch, case.length), np.int32)
    begin[0, 101:], begin[0, 102:] = 101, 102
    assert_near_the_truth(case, begin, dealt(case, sizes)(*inputs(case), begin))
