"""Keys with outlying channels, Hadamard-transformed so that int8 keeps the scores."""

import jax
import numpy as np
import pytest
from helpers.oracle import dequantised

from lsjax.attention.hadamard import hadamard_matrix, hadamard_transform
from lsjax.attention.kv_array import empty_kv_array

turn = jax.jit(hadamard_transform)


@jax.jit
def encode(turned):
    return empty_kv_array(turned.shape, "int8").quantize(turned)


@pytest.mark.parametrize("width", [1, 2, 6, 8, 12, 16, 20, 40, 64, 80, 96, 100, 112, 128, 192, 256])
def test_turning_changes_no_score(width):
    matrix = hadamard_matrix(width).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, width * np.eye(width), atol=1e-4)
    q, k = np.random.default_rng(width).standard_normal((2, 50, width)).astype("f4")
    turned_q, turned_k = np.asarray(turn(np.stack([q, k])))
    np.testing.assert_allclose(turned_q @ turned_k.T, q @ k.T, atol=1e-4)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_an_outlier_is_shared_by_all_channels(width):
    assert np.all(np.abs(hadamard_matrix(width)) == 1)


def log_softmax(scores):
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("seed", [0])
def test_weights_with_two_outlying_channels_stay_what_they_were(head_dim, seed):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((64, head_dim)), rng.standard_normal((2048, head_dim))
    k[:, rng.choice(head_dim, 2, replace=False)] *= 30
    store = encode(turn(k.astype("f4")[None, None]))
    turned_q = np.asarray(turn(q.astype("f4")), np.float64)
    exact = log_softmax(q @ k.T / np.sqrt(head_dim))
    found = log_softmax(turned_q @ dequantised(store)[0, :, 0].T / np.sqrt(head_dim))
    assert (np.exp(exact) * (exact - found)).sum(-1).mean() < 5e-4
