"""Passages: what they promise, over many seeds and lengths."""

import random
import re

import numpy as np
import pytest

from lsjax.evals.passkey import QUESTION, SHORTEST, make_passage
from lsjax.evals.sentences import sentences
from lsjax.shipped.model import END, weighted

LENGTHS = (122, 200, 506, 512, 2048, 5001)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", range(5))
def test_a_passage_has_the_length_asked_for_one_key_and_the_question_at_its_end(length, seed):
    passage = make_passage(seed, length)
    assert len(passage.prompt.encode()) == length
    assert passage.prompt.isascii()
    assert re.findall(r"The pass key is (\d{5})\.", passage.prompt) == [passage.answer]
    assert re.findall(r"\d+", passage.prompt) == [passage.answer]
    assert passage.prompt.endswith(QUESTION)


def test_a_key_may_be_told_several_times_as_far_as_there_is_room():
    for length, most in ((505, 4), (121, 1)):
        times = set()
        for seed in range(40):
            passage = make_passage(seed, length, most_mentions=4)
            assert len(passage.prompt) == length
            assert set(re.findall(r"\d+", passage.prompt)) == {passage.answer}
            times.add(passage.prompt.count(passage.answer))
        assert times == set(range(1, most + 1))


def test_a_passage_depends_on_its_seed_alone():
    assert make_passage(3, 506) == make_passage(3, 506)
    texts = {make_passage(seed, 506).prompt for seed in range(50)}
    answers = {make_passage(seed, 506).answer for seed in range(50)}
    assert len(texts) == 50
    assert len(answers) > 45


@pytest.mark.parametrize(("depth", "low", "high"), [(0, 0, 0), (0.5, 900, 1100), (1, 1975, 2015)])
def test_depth_places_the_key(depth, low, high):
    at = make_passage(0, 2048, depth).prompt.index("The pass key is ")
    assert low <= at <= high


def test_random_depths_reach_the_whole_passage():
    places = [make_passage(s, 2048).prompt.index("The pass key is ") / 2048 for s in range(200)]
    for quarter in range(4):
        assert 20 < sum(quarter / 4 <= p < (quarter + 1) / 4 for p in places) < 80


def test_sentences_fill_a_length_or_say_that_they_cannot():
    for length in (0, *range(28, 200)):
        found = sentences(random.Random(length), length)
        assert sum(len(s) + 1 for s in found) == length
    with pytest.raises(ValueError, match="28 are the fewest"):
        sentences(random.Random(0), 27)
    with pytest.raises(ValueError, match="28 are the fewest"):
        sentences(random.Random(0), -5)


def test_the_shortest_passage_is_the_one_that_is_named():
    assert len(make_passage(0, SHORTEST).prompt) == SHORTEST
    with pytest.raises(ValueError, match="28 are the fewest"):
        make_passage(0, SHORTEST - 1)


def test_sentences_look_like_sentences():
    for s in sentences(random.Random(0), 20_000):
        assert re.fullmatch(r"[A-Z][A-Za-z, ]+[.]", s), s
        assert "  " not in s


def test_what_a_text_tells_again_counts_most():
    passage = make_passage(1, 505, most_mentions=4)
    document = weighted(passage, 5.0, 0.1)
    text = bytes(document.ids[:-1].tolist()).decode()
    assert text == f"{passage.prompt} {passage.answer}" and document.ids[-1] == END
    counted = np.flatnonzero(document.weights == 5)
    told = [m.start() for m in re.finditer(passage.answer, text)][1:]
    assert len(told) > 1
    assert counted.tolist() == [at + i for at in told for i in range(5)] + [len(text)]
    assert np.all(document.weights[document.weights != 5] == np.float32(0.1))
