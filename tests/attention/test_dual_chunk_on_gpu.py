"""Prefill of dual chunk attention on a GPU, with a stand-in for cuDNN, against its definition."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import changed_config
from helpers.oracle import dual_chunk_distance, rotated

from lsjax.attention import cudnn
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import FloatBlock, FloatTail, FullCache, update_and_attend
from lsjax.config import RopeScaling
from lsjax.distributed.sharding import make_mesh
from lsjax.nn.attention import LayerInputs
from lsjax.positions.rotary import rotary_tables, rotate

SIZE, LOCAL = 64, 16
STRIDE = SIZE - LOCAL
HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 16, 336


class Case(NamedTuple):
    """How the prompt is read: `block` positions of a quantized cache are in floats, and cuDNN sees
    pieces of as many slots of a row."""

    chunk: int
    cache: str = "bfloat16"
    block: int = 16
    piece: int = 12
    in_blocks: bool = True


def read(case, q, k, v):
    """[2, LENGTH, heads, head_dim] outputs of a prompt that is read in chunks."""
    mesh, store = make_mesh(""), empty_kv_array((2, KV_HEADS, LENGTH, HEAD_DIM), case.cache)
    cache = FullCache(store, store, chunk=case.chunk)
    if case.cache == "int8":
        zeros = jnp.zeros((2, KV_HEADS, case.block, HEAD_DIM), jnp.bfloat16)
        cache = FloatTail(cache, FloatBlock(zeros, zeros))
    config = dataclasses.replace(
        changed_config("qwen2", 1),
        rope_scaling=RopeScaling("dual_chunk", chunk_size=SIZE, local_size=LOCAL),
        **{"head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM, "rope_theta": 1e4},
    )
    tables = rotary_tables(config, [LENGTH, LENGTH])

    @jax.jit
    def step(q, k, v, positions, cache):
        inputs = LayerInputs(tables=tables).at(positions)
        q, k = inputs.rotated(q, False), rotate(k, *inputs.angles, False)
        args = mesh, q, k, v, positions, None, cache, False
        return update_and_attend(*args, tables=tables)

    outputs = []
    for start in range(0, LENGTH, case.chunk):
        at = start + np.arange(case.chunk)
        y, cache = step(*(x[:, at] for x in (q, k, v)), np.tile(at, (2, 1)), cache)
        outputs.append(np.asarray(y, np.float64))
    return np.concatenate(outputs, axis=1)


def truth(q, k, v):
    """The same from queries and keys that are rounded once they are rotated, as the layer's are."""

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(float)

    group, at = HEADS // KV_HEADS, np.arange(LENGTH)
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    k, v = (np.repeat(x, group, axis=2) for x in (rounded(rotated(k, at % STRIDE)), v))
    turned = dual_chunk_distance(at, SIZE, LOCAL) + at % STRIDE  # what each query is rotated to
    scores = np.full((2, HEADS, LENGTH, LENGTH), -np.inf)
    for i in at:
        queries = rotated(np.repeat(q[:, i : i + 1], i + 1, axis=1), turned[i, : i + 1])
        scores[:, :, i, : i + 1] = np.einsum("bshd,bshd->bhs", rounded(queries), k[:, : i + 1])
    weights = np.exp((scores - scores.max(axis=-1, keepdims=True)) / np.sqrt(HEAD_DIM))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.slow("blocks from one slot on are quick in test_gpu_kernels, views in test_dual_chunk")
@pytest.mark.parametrize(
    "case",
    [
        Case(24, "int8", block=8),
        Case(48, piece=20),
        Case(16, piece=64),  # a piece from the last chunk's start on is past the capacity
        Case(16, "int8", block=48, piece=64),
        Case(48, "int8"),
        Case(16, "int8", block=64, in_blocks=False),
        Case(28, in_blocks=False),
    ],
    ids=str,
)
def test_in_blocks_where_chunks_are_within_one_of_positions(gpu, monkeypatch, case):
    general, calls = cudnn.in_general, []
    monkeypatch.setattr(cudnn, "PIECE", 2 * case.piece)
    monkeypatch.setattr(cudnn, "in_general", lambda *args: calls.append(1) or general(*args))
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, LENGTH, heads, HEAD_DIM)).astype(jnp.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found, wanted = read(case, q, k, v), truth(q, k, v)
    assert bool(calls) != case.in_blocks
    monkeypatch.undo()  # the blockwise loop
    plain = read(case, q, k, v)
    error, plain_error = (np.abs(x - wanted).max() for x in (found, plain))
    assert error <= 2 * plain_error + 1e-7
    assert error < 0.03
