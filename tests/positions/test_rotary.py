"""Angles that stay exact at any position, and the rotation itself."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.families import parse_config
from lsjax.positions import rotary
from lsjax.positions.rotary import MAX_POSITIONS, rotary_tables

LLAMA = pathlib.Path(__file__).parents[1] / "golden" / "models" / "llama" / "config.json"


cos_sin, rotate = jax.jit(rotary.cos_sin), jax.jit(rotary.rotate, static_argnums=3)


def config(**changes):
    raw = json.loads(LLAMA.read_text()) | {"head_dim": 128, "max_position_embeddings": 32768}
    return parse_config(raw | changes)


def exact_angles(theta, positions):
    """Angles of 128 channels, reduced modulo 2 pi in extended precision."""
    exponent = -np.arange(0, 128, 2, dtype=np.longdouble) / 128
    angle = positions[..., None].astype(np.longdouble) * np.longdouble(theta) ** exponent
    return (angle % (2 * np.longdouble("3.14159265358979323846264338327950288"))).astype(float)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 1e7, 1e8])
def test_angles_are_exact_up_to_two_million_tokens(theta):
    positions = np.random.default_rng(0).integers(0, 2**21, 1000, endpoint=True)
    positions = np.concatenate([positions, [0, 1, 2047, 2048, 2**20, 2**21, MAX_POSITIONS - 1]])
    cos, sin = cos_sin(
        rotary_tables(config(rope_theta=theta), [1]), positions[None].astype(np.int32)
    )
    angle = exact_angles(theta, positions)
    assert np.max(np.abs(cos[0] - np.cos(angle))) < 1e-6
    assert np.max(np.abs(sin[0] - np.sin(angle))) < 1e-6


def test_attention_factor_multiplies_both():
    plain = rotary_tables(config(), [1])
    block = {"type": "yarn", "factor": 1.0, "attention_factor": 1.25}
    scaled = rotary_tables(config(rope_scaling=block), [1])
    positions = np.array([[0, 5, 3000, 2**20]], np.int32)
    for a, b in zip(cos_sin(plain, positions), cos_sin(scaled, positions), strict=True):
        np.testing.assert_allclose(b, 1.25 * a, atol=1e-6)


def test_rows_of_a_batch_have_their_own_dynamic_frequencies():
    dynamic = config(rope_scaling={"type": "dynamic", "factor": 4.0})
    lengths, positions = [1000, 100_000], np.array([[7, 30_000], [40_000, 99_999]], np.int32)
    together = cos_sin(rotary_tables(dynamic, lengths), positions)
    for row, length in enumerate(lengths):
        alone = cos_sin(rotary_tables(dynamic, [length]), positions[row : row + 1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a[row], b[0])


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_rows_share_frequencies_that_no_request_changes(kind):
    tables = rotary_tables(config(rope_scaling={"type": kind, "factor": 2.0}), [10, 10**6])
    assert tables.high.shape[0] == tables.low.shape[0] == 1


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_tables_take_the_same_memory_whatever_length_is_served(kind):
    def nbytes(length):
        scaling = {"rope_type": kind, "factor": length / 32768}
        tables = rotary_tables(config(rope_scaling=scaling), [length])
        return tables.high.nbytes + tables.low.nbytes

    # cos and sin of 64 pairs of channels, for 2,048 rows of either part of a position.
    assert nbytes(32768) == nbytes(2**21) == 2 * 2048 * 2 * 64 * 4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_rotation_is_a_complex_product(interleaved, rotary_dim, dtype, tolerance):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, 3, 16)).astype(jnp.dtype(dtype))
    angle = rng.uniform(0, 6, (2, 5, rotary_dim // 2))
    cos, sin = np.cos(angle).astype("f4"), np.sin(angle).astype("f4")
    y = rotate(x, cos, sin, interleaved)
    assert y.dtype == x.dtype

    first, second = np.arange(rotary_dim // 2), np.arange(rotary_dim // 2) + rotary_dim // 2
    if interleaved:
        first, second = 2 * first, 2 * first + 1
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[:, :, None]
    size = np.abs(turned)
    assert np.all(np.abs(y[..., first] - turned.real) <= tolerance * size)
    assert np.all(np.abs(y[..., second] - turned.imag) <= tolerance * size)
    np.testing.assert_array_equal(y[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    tables = rotary_tables(config(rope_theta=1e6), [1])
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 128)).astype("f4")

    def score(at):
        query = rotate(q, *cos_sin(tables, np.array([[at + 1000]])), interleaved)
        key = rotate(k, *cos_sin(tables, np.array([[at]])), interleaved)
        return np.sum(np.asarray(query) * np.asarray(key))

    near = score(0)
    for at in (12_345, 2**20, 2**21 - 1):
        assert score(at) == pytest.approx(near, abs=1e-4)
