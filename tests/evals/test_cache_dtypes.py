"""Scores of a text over two caches, side by side."""

import dataclasses

import pytest

from lsjax.evals.cache_dtypes import Scores, difference


def test_differences_are_those_of_losses_and_most_likely_tokens():
    reference = Scores([1.0, 2.0, 3.0, 2.0], [5, 6, 7, 8])
    found = difference(Scores([1.5, 1.5, 3.0, 2.4], [5, 6, 0, 8]), reference)
    wanted = {"loss": 2.1, "change": 0.05, "per_token": 0.35, "agreement": 0.75}
    assert dataclasses.asdict(found) == pytest.approx(wanted)
