"""The int8 cache against the float one, on the shipped model."""

import numpy as np
import pytest
from helpers.caches import cache_bytes

import lsjax
from lsjax.shipped.evaluation import held_out_passages


@pytest.fixture(scope="module")
def pair():
    """The model over a float and over an int8 cache."""
    return [lsjax.load(rope_scaling="auto", kv_cache_dtype=d) for d in ("float32", "int8")]


def prompts(length, count):
    return [passage.prompt for passage in held_out_passages(length, count)]


def test_the_likeliest_token_is_nearly_always_the_same(pair):
    exact, small = pair
    ids = [exact.tokenizer.encode(prompt) for prompt in prompts(1200, 2)]
    same = exact.logits(ids).argmax(-1) == small.logits(ids).argmax(-1)
    assert same.mean() >= 0.99


@pytest.mark.slow("the likeliest tokens of such texts are quick")
@pytest.mark.runs_long
def test_every_key_that_is_read_is_still_read(pair):
    answers = [[c.text for c in lm.generate(prompts(1200, 1), 8)] for lm in pair]
    assert answers[0] == answers[1]


def test_it_takes_less_than_a_third_of_the_memory(pair):
    used = [cache_bytes(lm, 40_000) for lm in pair]
    # (32 + 2) / (4 * 32) for heads of 32, and 1,024 positions in floats.
    assert np.divide(used[1], used[0]) < 0.30
