"""Sparse prefill against its definition in float64: what is chosen, what stands for the rest."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sparse_oracle
from helpers.oracle import attention, dequantised

from lsjax.attention import blockwise, dispatch
from lsjax.attention.blockwise import Blocks, KeyRange
from lsjax.attention.hadamard import hadamard_matrix
from lsjax.attention.kv_array import KVArray
from lsjax.attention.sparse.rule import TILE, SparsePrefill
from lsjax.cache import CacheSpec, FloatTail, cache_shapes, empty_layer, update_and_attend
from lsjax.config import ModelConfig, RopeScaling
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh
from lsjax.families import parse_config
from lsjax.nn.attention import LayerInputs
from lsjax.positions.rotary import rotary_tables, rotate
from lsjax.shipped.model import HF_CONFIGS

HEAD_DIM, KV_HEADS, GROUP = 16, 2, 2


def rule_of(alpha, last_tokens=0, dense_length=0):
    return SparsePrefill(alpha, 0, last_tokens, dense_length)


RULE = rule_of(0.1)


def config() -> ModelConfig:
    sizes = {"num_attention_heads": KV_HEADS * GROUP, "num_key_value_heads": KV_HEADS}
    sizes["hidden_size"] = KV_HEADS * GROUP * HEAD_DIM
    return parse_config(HF_CONFIGS["rotary"] | sizes)


def topics(length, batch=1, seed=0):
    """Queries, keys and values of which each block has a topic, so that few blocks matter."""
    rng = np.random.default_rng(seed)
    blocks = -(-length // TILE)
    of_block = rng.standard_normal((batch, blocks, 1, HEAD_DIM))
    asked = rng.integers(0, np.arange(1, blocks + 1), (2, blocks))

    def draw(topic, heads, weight):
        noise = rng.standard_normal((batch, blocks * TILE, heads, HEAD_DIM))
        return (noise + weight * np.repeat(topic, TILE, axis=1))[:, :length].astype("f4")

    k = draw(of_block, KV_HEADS, 1.0)
    q = draw(of_block[:, asked].sum(axis=1), KV_HEADS * GROUP, 1.0)
    return q, k, rng.standard_normal(k.shape).astype("f4")


@functools.partial(jax.jit, static_argnames="mesh")
def step(mesh, q, k, v, positions, lengths, cache, tables):
    """Writes a chunk to the cache and attends to it, after rotation if there are tables."""
    if tables is not None:
        inputs = LayerInputs(tables=tables).at(positions)
        q, k = inputs.rotated(q, False), rotate(k, *inputs.angles, False)
    return update_and_attend(mesh, q, k, v, positions, lengths, cache, False, tables=tables)


def prefill(q, k, v, rule, chunk, mesh="", dtype="float32", lengths=None, tables=None):
    """Runs a prompt in chunks, the last one padded; returns the result and the cache."""
    batch, length = q.shape[:2]
    mesh = make_mesh(mesh)
    devices = mesh.shape["context"]
    zigzag = zigzag_of(chunk, devices)
    capacity = math.ceil(length / chunk) * chunk
    spec = CacheSpec(
        batch=batch,
        capacity=math.ceil(capacity / 256 / devices) * 256 * devices,
        dtype=dtype,
        compute_dtype="float32",
        zigzag=zigzag,
        block=256,
        chunk=chunk,
        sparse=rule,
    )
    shardings = jax.tree.map(lambda x: x.sharding, cache_shapes(config(), mesh, spec, "cpu")[0])
    cache = jax.device_put(empty_layer(config(), spec), shardings)
    lengths = jnp.full(batch, length) if lengths is None else jnp.asarray(lengths)
    found = np.zeros(q.shape)
    for start in range(0, length, chunk):
        at = start + zigzag.permutation(chunk)
        new = (np.pad(x, ((0, 0), (0, chunk), (0, 0), (0, 0)))[:, at] for x in (q, k, v))
        positions = np.broadcast_to(at, (batch, chunk))
        out, cache = step(mesh, *new, positions, lengths, cache, tables)
        here = at < length
        found[:, at[here]] = out[:, here]
    return found, cache


def sampled(length, chunk, capacity):
    """Queries that also attend to everything: 64 in a prompt that fills the cache."""
    of_chunk = math.ceil(64 * chunk / capacity)
    ends = np.arange(1, of_chunk + 1) * chunk // of_chunk
    at = (np.arange(0, capacity, chunk)[:, None] + ends - 1).ravel()
    return at[at < length]


def counts(cache):
    return (cache.inner if isinstance(cache, FloatTail) else cache).counts


def test_the_softmax_is_over_kept_tokens_and_a_token_for_each_other_block():
    q, k, v = topics(12 * TILE)
    rule = dataclasses.replace(RULE, sink_blocks=1, near_blocks=2)
    keep = sparse_oracle.chosen(q, k, RULE.alpha, sinks=1, before=2)
    wanted, mass = sparse_oracle.attention(q, k, v, keep)
    found, cache = prefill(q, k, v, rule, 4 * TILE)
    assert 0.3 < keep.sum() / keep.size * 2 < 0.9
    assert np.abs(found - wanted).max() < 1e-5
    assert np.array_equal(cache.counts.blocks, keep.sum(axis=(2, 3)))
    at = sampled(12 * TILE, 4 * TILE, 12 * TILE)
    assert cache.counts.samples.tolist() == [len(at)] and len(at) >= 64
    mass = mass[:, at].sum(axis=1).reshape(1, KV_HEADS, GROUP)
    np.testing.assert_allclose(cache.counts.mass, mass, rtol=1e-5)


def dual_chunk_tables(size, local, length):
    scaling = RopeScaling("dual_chunk", chunk_size=size, local_size=local, original_length=size)
    rotary = {"rotary_dim": HEAD_DIM, "rope_theta": 1e4, "rope_scaling": scaling}
    return rotary_tables(dataclasses.replace(config(), **rotary), [length])


@pytest.mark.parametrize(
    ("chunk", "mesh"),
    [
        (4 * TILE, ""),
        pytest.param(8 * TILE, "context=2", marks=pytest.mark.slow("dense ones do as much")),
    ],
)
def test_with_dual_chunk_attention_blocks_are_chosen_by_distances_without_a_limit(chunk, mesh):
    """Chunks of positions of 3 blocks; the largest distance that attention shows is 3.5 blocks."""
    size, local, length = 448, 64, 16 * TILE
    q, k, v = topics(length)
    tables = dual_chunk_tables(size, local, length)
    grown = q * (0.1 * np.log(length / size) + 1) ** 2
    choosing, attending, rotated_k = sparse_oracle.dual_chunk_views(grown, k, size, local)
    stride = size - local
    keep = sparse_oracle.chosen(choosing, rotated_k, RULE.alpha, stride=stride)
    limited = sparse_oracle.chosen(attending, rotated_k, RULE.alpha, stride=stride)
    assert (keep != limited).sum() > 5 and 0.3 < keep.sum() / keep.size * 2 < 0.95
    wanted, mass = sparse_oracle.attention(attending, rotated_k, v, keep, stride=stride)
    found, cache = prefill(q, k, v, RULE, chunk, mesh, tables=tables)
    assert np.array_equal(cache.counts.blocks, keep.sum(axis=(2, 3)))
    assert np.abs(found - wanted).max() < 1e-5
    if not mesh:
        at = sampled(length, chunk, length)
        mass = mass[:, at].sum(axis=1).reshape(1, KV_HEADS, GROUP)
        np.testing.assert_allclose(cache.counts.mass, mass, rtol=1e-5)


def test_alpha_0_is_dense_attention_to_the_last_bit():
    q, k, v = topics(12 * TILE)
    found, _ = prefill(q, k, v, rule_of(0.0), 4 * TILE)
    assert np.abs(found - attention(q, k, v, np.arange(12 * TILE)[None])[0]).max() < 1e-5
    queries = jnp.asarray(q.reshape(1, -1, KV_HEADS, GROUP, HEAD_DIM).transpose(0, 2, 3, 1, 4))
    stores = [KVArray(jnp.asarray(x.swapaxes(1, 2)), None) for x in (k, v)]
    stop = jnp.arange(1, 12 * TILE + 1)[None]
    blocks = Blocks(GROUP * TILE, ((GROUP * TILE, 2 * TILE),))
    key_range = KeyRange(None, stop, stop - 1)
    in_order = blockwise.attend(queries, *stores, key_range, blocks=blocks)
    keep = jnp.ones((1, KV_HEADS, 12, 12), bool)
    partial = dispatch.attend_to_kept("cpu", queries, *stores, keep, stop)
    assert jax.tree.all(jax.tree.map(np.array_equal, partial, in_order))


@pytest.mark.slow("the choice is quick, and views over a float block are tested without it")
@pytest.mark.parametrize("mesh", ["", "context=2"])
def test_with_dual_chunk_attention_alpha_0_is_dense(mesh):
    """The block in floats begins within a chunk of positions, whose stride is 1.5 blocks."""
    length = 15 * TILE + 20
    tables = dual_chunk_tables(448, 64, length)
    found, dense = (
        prefill(*topics(length), rule, 4 * TILE, mesh, "int8", tables=tables)[0]
        for rule in (rule_of(0.0), None)
    )
    assert np.abs(found - dense).max() < 1e-5


slow = functools.partial(pytest.param, marks=pytest.mark.slow("int8 in chunks of a tile is quick"))


@pytest.mark.parametrize(
    ("dtype", "tiles", "dual_chunk"),
    [
        ("int8", 1, False),
        slow("float32", 4, False),
        slow("int8", 4, False),
        slow("int4", 1, False),
        slow("int8", 1, True),
    ],
)
def test_the_chunk_makes_no_difference(dtype, tiles, dual_chunk):
    """A prompt that ends within a block, in chunks of some tiles, and at once."""
    q, k, v = topics(11 * TILE + 50)
    rule = rule_of(0.2, TILE, 3 * TILE)
    tables = dual_chunk_tables(448, 64, len(q[0])) if dual_chunk else None
    (found, some), (whole, once) = (
        prefill(q, k, v, rule, n * TILE, dtype=dtype, tables=tables) for n in (tiles, 12)
    )
    assert np.abs(found - whole).max() < 1e-5
    assert np.array_equal(counts(some).blocks, counts(once).blocks)


@pytest.mark.parametrize(
    ("mesh", "dtype"), [("context=2,model=2", "int8"), slow("data=2,context=4", "float32")]
)
def test_devices_make_no_difference(mesh, dtype):
    q, k, v = topics(15 * TILE + 20, batch=2)
    lengths = [15 * TILE + 20, 9 * TILE + 7]
    rule = rule_of(0.2, TILE)
    chunk = 1024 if "4" in mesh else 512
    (alone, one), (found, many) = (
        prefill(q, k, v, rule, chunk, on, dtype, lengths) for on in ("", mesh)
    )
    for row, length in enumerate(lengths):
        assert np.abs(found[row, :length] - alone[row, :length]).max() < 1e-5
    assert np.array_equal(counts(one).blocks, counts(many).blocks)


def test_means_are_of_the_quantized_keys_of_full_blocks():
    q, k, v = topics(5 * TILE + 3)
    _, cache = prefill(q, k, v, RULE, 2 * TILE, dtype="int8")
    means = cache.inner.means
    assert means.known.tolist() == [5 * TILE]
    for store, mean in ((cache.inner.k, means.k), (cache.inner.v, means.v)):
        wanted = sparse_oracle.block_means(dequantised(store)).swapaxes(1, 2)
        np.testing.assert_allclose(mean[:, :, :5], wanted[:, :, :5], atol=1e-6)
    turned = sparse_oracle.block_means(k) @ hadamard_matrix(HEAD_DIM) / np.sqrt(HEAD_DIM)
    np.testing.assert_allclose(means.k[:, :, :5], turned.swapaxes(1, 2)[:, :, :5], atol=0.02)


@pytest.mark.slow("what the rule itself cannot see; that the code follows the rule is quick")
@pytest.mark.parametrize("needle", [False, True])
def test_a_token_alone_in_a_block_of_noise_is_lost_with_its_block(needle):
    """The weak point of means, with the tokens that stand for blocks and without; told as such.

    Without the one token they make up for most of what is not attended to.
    """
    rng, length, at = np.random.default_rng(0), 16 * TILE, 7 * TILE + 60
    q, k, v = (0.1 * rng.standard_normal((1, length, n, HEAD_DIM)).astype("f4") for n in (4, 2, 2))
    v += np.repeat(rng.standard_normal((1, 16, 1, HEAD_DIM)).astype("f4"), TILE, axis=1)
    q[:, -TILE:, :, 0] += 4.0
    k[:, 3 * TILE : 4 * TILE, :, 0] += 3.2  # by this block the others are judged
    if needle:
        k[:, at, :, 0] += 10.0
        v[:, at] = 10.0
    keep = sparse_oracle.chosen(q, k, RULE.alpha)
    assert not keep[0, :, -1, 7].any() and keep[0, :, -1, 3].all()
    dense = attention(q, k, v, np.arange(length)[None])[0][:, -1]
    found, cache = prefill(q, k, v, RULE, length)
    corrected, mass = sparse_oracle.attention(q, k, v, keep)
    bare, _ = sparse_oracle.attention(q, k, v, keep, corrected=False)
    assert np.abs(found - corrected).max() < 1e-5
    off, bare_off = (np.abs(x[:, -1] - dense).max() for x in (found, bare))
    at = sampled(length, length, length)
    np.testing.assert_allclose(counts(cache).mass.ravel(), mass[0, at].sum(axis=0), rtol=1e-4)
    if needle:
        assert off > 5 and bare_off > 5 and mass[0, -1].max() < 0.3
    else:
        assert off < bare_off / 100
