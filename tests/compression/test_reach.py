"""How far the heads of a model with ALiBi reach, and that what they drop has no weight."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.caches import cache_bytes
from helpers.intermediates import queries_and_keys

import lsjax
from lsjax.compression import HEAD_FILE, RazorConfig, write_bounds
from lsjax.compression.alibi_span import alibi_spans, score_bounds
from lsjax.compression.scores import read_bounds
from lsjax.inference.options import resolve_options
from lsjax.positions.alibi import alibi_slopes
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import held_out_passages

ALIBI = str(shipped_model_path("alibi"))
LENGTHS = 1300, 500
PROMPTS = [held_out_passages(length, 1)[0].prompt for length in LENGTHS]


def twin(compression="razor", **options):
    return lsjax.load(ALIBI, kv_compression=compression, **options)


def tokens(lm):
    room = {"max_input_length": 1400, "allow_untrained_length": True}
    rows = lm.generate(PROMPTS, 24, max_batch_size=len(PROMPTS), **room)
    return [row.token_ids for row in rows]


@pytest.fixture(scope="module")
def whole():
    return twin("none")


@pytest.fixture(scope="module")
def seen(whole):
    """[layers] of queries and keys, [length, heads, head_dim] float64 each, of a text."""
    ids = whole.tokenizer.encode(PROMPTS[0])[:600]
    return queries_and_keys(whole, ids)


def test_no_score_is_beyond_its_bound(whole, seen):
    bounds = score_bounds(whole.config, whole.params)
    for (q, k), bound in zip(seen, bounds, strict=True):
        scores = np.abs(np.einsum("thd,shd->hts", q, k)).max(axis=(1, 2)) / np.sqrt(q.shape[-1])
        assert (scores <= bound).all()
        assert (scores > 0.05 * bound).all()  # a bound that says something


def test_a_bound_is_reached_by_the_worst_pair_of_tokens(whole):
    """The singular vectors are what no two tokens' norms can exceed, and could be."""
    c = whole.config
    layer = jax.device_get(whole.params["layers_1"])
    norm = layer["attn_norm"]["weight"].astype(np.float64)
    q, k = (layer["attn"][n]["weight"].reshape(4, c.head_dim, -1) * norm for n in ("q", "k"))
    largest = [np.linalg.norm(a.T @ b, 2) for a, b in zip(q, k, strict=True)]
    wanted = np.array(largest) * c.hidden_size / np.sqrt(c.head_dim)
    np.testing.assert_allclose(score_bounds(c, whole.params)[1], wanted, rtol=1e-3)


@pytest.mark.parametrize("epsilon", [1e-4, 0.03])
def test_what_is_dropped_weighs_less_than_epsilon(whole, seen, epsilon):
    c = whole.config
    alibi_span = alibi_spans(c, score_bounds(c, whole.params), epsilon)
    distance = np.subtract.outer(np.arange(600), np.arange(600))
    checked = 0
    for (q, k), far in zip(seen, alibi_span, strict=True):
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores -= alibi_slopes(c.num_heads)[:, None, None] * distance
        weights = np.exp(np.where(distance < 0, -np.inf, scores))
        weights /= weights.sum(axis=-1, keepdims=True)
        for head, tokens in enumerate(far):
            dropped = np.where(distance >= tokens, weights[head], 0).sum(axis=-1)
            assert dropped.max() < epsilon
            checked += (distance >= tokens).any()
    assert checked >= 3  # heads whose reach ends within the text


@pytest.mark.slow("the bound on what is dropped is quick")
def test_tokens_are_those_of_the_whole_cache(whole):
    assert tokens(twin()) == tokens(whole)


def test_heads_keep_what_they_reach_and_no_more(whole):
    used = [cache_bytes(lm, 8000) for lm in (whole, twin())]
    alibi_span = alibi_spans(whole.config, read_bounds(f"{ALIBI}/{HEAD_FILE}", whole.config), 1e-4)
    least = np.minimum(alibi_span, 8000).mean() / 8000
    assert least < used[1] / used[0] < least + 0.1


def test_heads_on_the_same_place_of_different_devices_keep_as_much():
    lm = twin()
    for shards in (1, 2, 4):
        found = RazorConfig(heads=f"{ALIBI}/{HEAD_FILE}").estimate(lm.config, shards)
        alibi_span = alibi_spans(lm.config, read_bounds(f"{ALIBI}/{HEAD_FILE}", lm.config), 1e-4)
        for order, places, needed in zip(found.order, found.alibi_span, alibi_span, strict=True):
            assert sorted(order) == [0, 1, 2, 3]
            assert (np.tile(places, shards) >= needed[list(order)]).all()


@pytest.mark.parametrize(
    "given, says",
    [
        ({"window": 300}, "window goes with rotary positions"),
        ({"induction": 0.5}, "induction goes with rotary positions"),
        ({"epsilon": 0}, "between 0 and 1"),
        ({"epsilon": "1"}, "between 0 and 1"),
        ({"heads": "/nowhere/heads.json"}, "find_retrieval_heads.py"),
        ({"heads": str(shipped_model_path() / HEAD_FILE)}, "not a file of head scores"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        resolve_options(ALIBI, kv_compression=given)


def test_epsilon_means_nothing_without_alibi():
    with pytest.raises(UserError, match="epsilon goes with ALiBi"):
        resolve_options(shipped_model_path(), kv_compression={"epsilon": 0.01})


def test_bounds_of_another_model_are_refused(whole, tmp_path):
    path = str(tmp_path / HEAD_FILE)
    write_bounds(path, dataclasses.replace(whole.config, vocab_size=9), np.ones((2, 4)))
    with pytest.raises(UserError, match="of another model"):
        resolve_options(ALIBI, kv_compression={"heads": path})


def test_a_plan_needs_the_file():
    with pytest.raises(UserError, match="name the file"):
        RazorConfig().estimate(twin("none").config, 1)
