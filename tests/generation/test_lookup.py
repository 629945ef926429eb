"""Prompt lookup: what is drafted, how much of it stands, and what it saves."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax import Sampling, UserError
from lsjax.inference.prompt_lookup import MAX_DRAFT_TOKENS, draft, num_accepted

jitted_draft, jitted_agreed = jax.jit(draft, static_argnums=2), jax.jit(num_accepted)


def drafted(text, count, room=32):
    row = np.full(room, 99)  # what stands after the last token means nothing
    row[: len(text)] = text
    return jitted_draft(row[None], np.array([len(text) - 1]), count)[0].tolist()


@pytest.mark.parametrize(
    ("text", "count", "follows"),
    [
        ([1, 2, 3, 4, 5, 2, 3], 2, [4, 5]),
        # the latest place of several, but rather one where more agrees
        ([7, 1, 5, 7, 1, 6, 7, 1], 1, [6]),
        ([4, 7, 1, 5, 3, 7, 1, 6, 4, 7, 1], 1, [5]),
        # a repetition goes on
        ([9, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),
        ([8, 8], 3, [8, 8, 8]),
    ],
)
def test_what_followed_the_last_tokens_before(text, count, follows):
    assert drafted(text, count) == follows


def of_tokens(most):
    return st.lists(st.integers(0, 3), min_size=1, max_size=most)


@settings(deadline=None, max_examples=30)
@given(of_tokens(30), st.sampled_from([1, 2, 5, MAX_DRAFT_TOKENS]))
def test_a_draft_holds_only_what_the_text_does(text, count):
    assert set(drafted(text, count)) <= set(text) or len(text) == 1


@settings(deadline=None)
@given(of_tokens(6), st.data())
def test_as_much_stands_as_the_model_would_have_said(draft_ids, data):
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=len(draft_ids) + 1, max_size=7))
    chosen = chosen[: len(draft_ids) + 1]
    same = 0
    while same < len(draft_ids) and draft_ids[same] == chosen[same]:
        same += 1
    found = jitted_agreed(np.array([draft_ids]), np.array([chosen]))
    assert found.tolist() == [same + 1]


def test_text_that_repeats_itself_takes_fewer_steps(model):
    """This model goes on to say one token for ever."""
    prompt = np.random.default_rng(1).integers(0, 64, 20).tolist()
    (usual,), (fast,) = (
        model("qwen3").generate(
            [prompt * 10], 200, allow_untrained_length=True, prompt_lookup_num_tokens=n
        )
        for n in (0, 7)
    )
    assert fast.token_ids == usual.token_ids
    assert fast.stats.decode_steps < usual.stats.decode_steps / 2


@pytest.mark.parametrize(
    ("number", "sampling", "words"),
    [(16, Sampling(), "from 0"), (-1, Sampling(), "from 0"), (4, Sampling(0.5), "temperature")],
)
def test_what_cannot_be_drafted_is_refused(model, number, sampling, words):
    with pytest.raises(UserError, match=words):
        model("qwen3").generate([[1, 2]], 4, sampling=sampling, prompt_lookup_num_tokens=number)
