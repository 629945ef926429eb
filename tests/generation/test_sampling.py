"""Drawing tokens: the filters, the seed, and the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax import Sampling, UserError
from lsjax.inference.sampling import next_token

ROWS = 4000


def draw(logits, rows=ROWS, **options):
    sampling = Sampling(**({"temperature": 1.0} | options))
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    arrays = sampling.arrays([(row, 0) for row in range(rows)])
    return np.asarray(jax.jit(next_token)(batch, arrays, jnp.int32(0)))


def share(tokens, vocab):
    return np.bincount(tokens, minlength=vocab) / len(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_scores_over_temperature(temperature):
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    deviation = np.sqrt(p * (1 - p) / ROWS)
    found = share(draw(logits, temperature=temperature), 4)
    assert (np.abs(found - p) < 4 * deviation).all()


@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=16), min_size=6, max_size=6, unique=True),
    top_k=st.integers(0, 7),
    top_p=st.floats(0.01, 1.0),
)
def test_only_what_the_filters_keep_is_drawn(logits, top_k, top_p):
    order = np.argsort(logits)[::-1]
    kept = order[: top_k or 6]
    p = np.exp(np.array(logits)[kept]) / np.exp(np.array(logits)[kept]).sum()
    before = np.cumsum(p) - p
    allowed = set(kept[before < top_p + 1e-6].tolist())
    assert set(draw(logits, rows=64, top_k=top_k, top_p=top_p).tolist()) <= allowed


def test_one_candidate_is_greedy(model):
    lm = model("qwen3")
    greedy = lm.generate([[1, 2, 3]], 20)[0].token_ids
    for one in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6)):
        assert lm.generate([[1, 2, 3]], 20, sampling=one)[0].token_ids == greedy


def test_the_seed_decides(model):
    lm = model("qwen3")

    def answer(seed):
        return lm.generate([[1, 2, 3]], 20, sampling=Sampling(temperature=1.0, seed=seed))[0]

    assert answer(5).token_ids == answer(5).token_ids
    assert answer(5).token_ids != answer(6).token_ids


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
