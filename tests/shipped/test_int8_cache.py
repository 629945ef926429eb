"""The int8 cache against the float one, on the shipped model."""

import numpy as np
import pytest

import lsjax
from lsjax.shipped.evaluation import held_out_passages

pytestmark = pytest.mark.runs_long


LENGTHS = [1600, pytest.param(4000, marks=pytest.mark.slow("less than half of it is quick"))]


@pytest.fixture(scope="module", params=LENGTHS)
def pair(request):
    """The model over a float and over an int8 cache, and a length."""
    models = [lsjax.load(rope_scaling="auto", kv_cache_dtype=d) for d in ("float32", "int8")]
    return *models, request.param


def test_the_likeliest_token_is_nearly_always_the_same(pair):
    exact, small, length = pair
    prompts = [exact.tokenizer.encode(p.prompt) for p in held_out_passages(length, 4)]
    same = exact.logits(prompts).argmax(-1) == small.logits(prompts).argmax(-1)
    assert same.mean() >= 0.99


def test_every_key_that_is_read_is_still_read(pair):
    exact, small, length = pair
    prompts = [p.prompt for p in held_out_passages(length, 10)]
    answers = [[c.text for c in lm.generate(prompts, 8)] for lm in (exact, small)]
    assert answers[0] == answers[1]


def test_it_takes_less_than_a_third_of_the_memory(pair):
    exact, small, _ = pair
    used = [
        lm.generate([[1, 2, 3]], 4, max_input_length=40_000)[0].stats.cache_bytes
        for lm in (exact, small)
    ]
    # (32 + 2) / (4 * 32) for heads of 32, and 1,024 positions in floats.
    assert np.divide(used[1], used[0]) < 0.30
