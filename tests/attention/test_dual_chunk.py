"""Dual chunk attention against its definition in float64, on every kind of cache and mesh."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import changed_config
from helpers.oracle import attention, dequantised, dual_chunk_attention, rotated

from lsjax.attention.hadamard import hadamard_matrix
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import FloatBlock, FloatTail, FullCache, update_and_attend
from lsjax.config import RopeScaling
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import make_mesh, sharding
from lsjax.nn.attention import LayerInputs
from lsjax.positions.rotary import rotary_tables, rotate

SIZE, LOCAL = 64, 16
STRIDE = SIZE - LOCAL
HEAD_DIM, CAPACITY = 16, 512


def config(size=SIZE, local=LOCAL, original=SIZE, head_dim=HEAD_DIM):
    scaling = RopeScaling("dual_chunk", chunk_size=size, local_size=local, original_length=original)
    changes = {"head_dim": head_dim, "rotary_dim": head_dim, "rope_theta": 1e4}
    return dataclasses.replace(changed_config("qwen2", 1), rope_scaling=scaling, **changes)


class Case(NamedTuple):
    """Tokens of a prompt and of its answer, and how the prompt is read. The second row of the
    batch has a prompt that is `shorter`, so that rows decode at positions of their own. Of `block`
    positions in a quantized cache's floats, chunks of 48 begin within one, or not."""

    prompt: int
    output: int
    chunk: int = 32
    cache: str = "float32"
    mesh: str = "111"
    shorter: int = 0
    drafted: int = 0
    block: int = 32


def of_published_rows():
    """q, k and v of the published check values."""
    t, u = np.arange(40.0)[:, None], np.arange(4.0)
    q, k = np.sin(0.7 * t + 0.3 * u), np.cos(0.5 * t - 0.2 * u)
    return tuple(x[None, :, None] for x in (q, k, np.sin(0.11 * t * (u + 1))))


ROWS = {
    11: (0.479161984, 0.551630372, 0.259251051, 0.010553162),
    12: (0.559462917, 0.545255933, 0.102631100, -0.147403370),
    13: (0.653919459, 0.730664857, 0.306948673, -0.076508994),
    20: (0.664537797, 0.176801038, -0.377276640, -0.003409396),
    39: (0.274097948, 0.182347235, -0.044797666, -0.152693771),
}


def test_the_definition_gives_the_published_rows():
    found = dual_chunk_attention(*of_published_rows(), 12, 4, original=12)[0, :, 0]
    for row, values in ROWS.items():
        np.testing.assert_allclose(found[row], values, rtol=0, atol=1e-8)


def test_the_definition_is_plain_rotation_up_to_the_chunk_size():
    q, k, v = of_published_rows()
    found, at = dual_chunk_attention(q, k, v, 12, 4), np.arange(40)
    plain, _ = attention(rotated(q, at), rotated(k, at), v, at[None])
    np.testing.assert_allclose(found[:, :13], plain[:, :13], rtol=0, atol=1e-14)
    assert np.abs(found[:, 13] - plain[:, 13]).max() > 0.02


@functools.cache
def stepper(mesh, decode):
    """(config's tables, q, k, v, positions, lengths, cache) -> output and cache, compiled."""
    devices = make_mesh(dict(zip(("data", "context", "model"), map(int, mesh), strict=True)))

    @jax.jit
    def step(tables, q, k, v, positions, lengths, cache):
        inputs = LayerInputs(tables=tables).at(positions)
        q, k = inputs.rotated(q, False), rotate(k, *inputs.angles, False)
        return update_and_attend(devices, q, k, v, positions, lengths, cache, decode, tables=tables)

    return devices, step


def empty(case, kv_heads, head_dim):
    devices, _ = stepper(case.mesh, False)
    zigzag = Zigzag(devices.shape["context"], case.chunk)
    shape = 2, kv_heads, CAPACITY, head_dim
    store = empty_kv_array(shape, case.cache)
    cache = FullCache(store, store, zigzag, case.chunk)
    if case.cache == "int8":
        zeros = jnp.zeros((2, kv_heads, case.block, head_dim))
        cache = FloatTail(cache, FloatBlock(zeros, zeros))
    return jax.device_put(
        cache, jax.tree.map(lambda s: sharding(devices, s), cache.partition_specs())
    )


def read(case, config, q, k, v):
    """Reads both rows' prompts in chunks and their answers token by token.

    Returns:
      [2, length, heads, head_dim] outputs, 0 behind the second row's end; and the cache.
    """
    prompts = np.array([case.prompt, case.prompt - case.shorter])
    tables = rotary_tables(config, (prompts + case.output).tolist())
    cache = empty(case, k.shape[2], k.shape[3])
    found = np.zeros((2, case.prompt + case.output, *q.shape[2:]), np.float32)
    _, prefill = stepper(case.mesh, False)
    _, decode = stepper(case.mesh, True)
    order = cache.zigzag.permutation(case.chunk)
    for start in range(0, case.prompt, case.chunk):
        at = start + np.arange(case.chunk)
        given = [np.take(x, np.minimum(at, x.shape[1] - 1), axis=1) for x in (q, k, v)]
        given = [
            np.where((at < prompts[:, None])[..., None, None], x, 7.0)[:, order] for x in given
        ]  # what is behind a prompt's end must not matter
        given = [x.astype(np.float32) for x in given]
        y, cache = prefill(tables, *given, np.tile(at[order], (2, 1)), prompts, cache)
        part = found[:, start : start + case.chunk]
        part[:] = np.asarray(y)[:, np.argsort(order)][:, : part.shape[1]]
    for start in range(0, case.output, case.drafted + 1):
        at = (prompts + start)[:, None] + np.arange(case.drafted + 1)
        rows = np.arange(2)[:, None]
        given = (x[rows, at].astype(np.float32) for x in (q, k, v))
        y, cache = decode(tables, *given, at, prompts + case.output, cache)
        found[rows, at] = y
    found[1, prompts[1] + case.output :] = 0
    return found, cache


def truth(case, config, q, k, v, cache):
    """What `read` should give: of a quantized cache, from its keys and values as they are held."""
    scaling, total = config.rope_scaling, case.prompt + case.output
    sizes = scaling.chunk_size, scaling.local_size, scaling.original_length
    found = np.zeros((2, total, *q.shape[2:]))
    for row, length in enumerate((total, total - case.shorter)):
        own = [x[row : row + 1, :length] for x in (q, k, v)]
        if case.cache == "float32":
            found[row, :length] = dual_chunk_attention(*own, *sizes)[0]
            continue
        where = np.argsort(cache.zigzag.permutation(CAPACITY))[:length]
        held = jax.tree.map(lambda x, at=(row, where): np.asarray(x)[at[0], :, at[1]], cache.inner)
        held = jax.tree.map(lambda x: x.swapaxes(0, 1)[None], held)
        far_k, far_v = dequantised(held.k), dequantised(held.v)
        far_k = far_k @ hadamard_matrix(HEAD_DIM).astype(float).T * HEAD_DIM**-0.5
        stride = scaling.chunk_size - scaling.local_size
        far_k = rotated(far_k, -(np.arange(length) % stride))
        for start in range(0, length, case.block):
            stop = min(start + case.block, length)
            seen = (
                np.concatenate([far[:, :start], near[:, start:stop]], axis=1)
                for far, near in ((far_k, own[1]), (far_v, own[2]))
            )
            part = dual_chunk_attention(own[0][:, :stop], *seen, *sizes, length=length)
            found[row, start:stop] = part[0, start:]
    return found


slow = functools.partial(pytest.param, marks=pytest.mark.slow("the quick cases have each in pairs"))
CASES = [
    Case(46, 4, shorter=9),
    Case(48, 1),
    Case(110, 10, mesh="121", cache="int8", shorter=31, block=16),
    slow(Case(96, 1, chunk=96)),
    slow(Case(94, 4, cache="int8", shorter=50)),
    slow(Case(280, 20, chunk=64, mesh="142", shorter=3)),
    slow(Case(280, 20, chunk=48, mesh="212", cache="int8")),
    slow(Case(280, 20, drafted=9)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_and_answers_against_the_definition(case):
    rng = np.random.default_rng(case.prompt)
    shape = 2, case.prompt + case.output
    q, k, v = (rng.standard_normal((*shape, heads, HEAD_DIM)) for heads in (4, 2, 2))
    q, k = 1.5 * q, 1.5 * k
    found, cache = read(case, config(), q, k, v)
    expected = truth(case, config(), q, k, v, cache)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_published_rows_in_float32():
    q, k, v = (np.repeat(x, 2, axis=0) for x in of_published_rows())
    case = Case(40, 0, chunk=16)
    found, _ = read(case, config(12, 4, 12, head_dim=4), q, k, v)
    for row, values in ROWS.items():
        np.testing.assert_allclose(found[0, row, 0], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [SIZE, SIZE + 1, 4 * SIZE])
def test_all_scores_grow_past_the_original_length(length):
    tables = rotary_tables(config(), [length])
    if length == SIZE:
        assert tables.chunks is None and tables.score_factor is None
        return
    factor = (0.1 * np.log(length / SIZE) + 1) ** 2
    np.testing.assert_allclose(tables.score_factor, [factor], rtol=1e-7)
    without = rotary_tables(config(original=None), [length])
    np.testing.assert_allclose(without.score_factor, [1.0], rtol=0)


def test_requests_within_the_chunk_size_run_as_without():
    """Plain rotation, and the programs of it, until a row of the batch is longer."""
    plain = dataclasses.replace(config(), rope_scaling=RopeScaling())
    found, wanted = (rotary_tables(c, [SIZE, 3]) for c in (config(), plain))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert rotary_tables(config(), [SIZE + 1, 3]).chunks is not None
