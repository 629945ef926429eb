"""Head scores against the whole attention matrix in float64."""

import numpy as np
import pytest
from helpers.golden_models import build
from helpers.intermediates import queries_and_keys

import lsjax
from lsjax.evals.retrieval_heads import REPEATS, find_heads, repeated_text
from lsjax.runtime.errors import UserError


def whole_matrix(lm, text):
    """[2, layers, heads] echo and induction from the definition, and from queries and keys."""
    n, group = (len(text) - 1) // REPEATS, lm.config.num_heads // lm.config.num_kv_heads
    rows = []
    for q, k in queries_and_keys(lm, text):
        scores = np.einsum("thd,shd->hts", q, np.repeat(k, group, axis=1)) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        later = range(1 + n, len(text))
        echo = sum(weights[:, t, s] for t in later for s in range(t - n, 0, -n))
        induction = sum(weights[:, t, s + 1] for t in later for s in range(t - n, 0, -n))
        rows.append([echo / len(later), induction / len(later)])
    return np.array(rows).swapaxes(0, 1)


@pytest.mark.parametrize(
    "mesh", ["", pytest.param("model=2", marks=pytest.mark.slow("heads do not meet each other"))]
)
def test_scores_are_those_of_the_whole_attention_matrix(mesh):
    lm = lsjax.load(mesh=mesh)
    text = repeated_text(256, 48, 57, 37, seed=3)
    layers = []
    found = find_heads(lm.engine, lm.params, text, layers.append)
    wanted = whole_matrix(lsjax.load(), text)
    np.testing.assert_allclose([found.echo, found.induction], wanted, rtol=1e-4, atol=1e-7)
    assert layers == [1] * lm.config.num_layers


@pytest.mark.slow("attention is quick; recurrent layers are but run and passed over")
def test_recurrent_layers_have_no_scores():
    lm = build("qwen3_5")
    text = repeated_text(1, 48, 57, 37, seed=3)
    layers = []
    found = find_heads(lm.engine, lm.params, text, layers.append)
    np.testing.assert_allclose(
        [found.echo, found.induction], whole_matrix(lm, text), rtol=1e-4, atol=1e-7
    )
    assert found.echo.shape == (1, 8) and layers == [1, 1]


def test_a_text_that_is_dealt_out_is_refused():
    lm = lsjax.load(mesh="context=2")
    with pytest.raises(UserError, match="model axis only"):
        find_heads(lm.engine, lm.params, repeated_text(256, 48, 57, 9, 0), print)


def test_a_model_that_is_not_compressed_so_is_refused():
    lm = lsjax.load(lsjax.shipped_model_path("alibi"))
    with pytest.raises(UserError, match="slope"):
        find_heads(lm.engine, lm.params, repeated_text(256, 48, 57, 9, 0), print)
