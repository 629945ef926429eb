"""Rows of packed documents: nothing lost, nothing twice, and the same from any place on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.runtime.errors import UserError
from lsjax.training.documents import Corpus, Document
from lsjax.training.packing import DataPosition, Packer, first_tokens
from lsjax.training.pose import gapped_positions


def corpus_of(lengths):
    """Documents in which no token is like another, of weights that name the token."""
    ends = np.cumsum([0, *lengths])
    ids = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]
    return Corpus([[Document(i, i + np.float32(0.5)) for i in ids]])


def flat(batch):
    """The batch's arrays, row by row, as one long row each."""
    return {name: getattr(batch, name).reshape(-1) for name in batch.__dataclass_fields__}


@st.composite
def packers(draw):
    lengths = draw(st.lists(st.integers(0, 17), min_size=1, max_size=8).filter(any))
    return Packer(
        corpus_of(lengths),
        length=2 * draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 100)),
        span=draw(st.sampled_from([0, 1000])),
    )


@settings(max_examples=60, deadline=None)
@given(packers(), st.integers(1, 2), st.integers(1, 3))
def test_an_epoch_holds_every_token_once_and_in_order(packer, parts, rows):
    packer.span = packer.span or packer.length
    total = sum(len(packer.corpus[i].ids) for i in range(len(packer.corpus)))
    data_position, taken = DataPosition(), []
    while data_position.epoch < 3:
        batch, data_position = packer.take(data_position, parts, rows)
        assert batch.tokens.shape == (parts, rows, packer.length)
        taken.append(flat(batch)["tokens"])
    stream = np.concatenate(taken)
    for epoch in range(3):
        tokens = stream[epoch * total : (epoch + 1) * total]
        assert sorted(tokens) == list(range(total))
        for i in range(len(packer.corpus)):
            ids = packer.corpus[i].ids
            assert np.array_equal(tokens[np.isin(tokens, ids)], ids)


@settings(max_examples=60, deadline=None)
@given(packers())
def test_each_token_sees_its_own_piece_and_foresees_its_own_document(packer):
    packer.span = packer.span or packer.length
    documents = [packer.corpus[i] for i in range(len(packer.corpus))]
    of = {t: i for i, d in enumerate(documents) for t in d.ids.tolist()}
    batch, _ = packer.take(DataPosition(), 1, 4)
    for row in range(4):
        tokens, begin = batch.tokens[0, row], batch.begin[0, row]
        positions = batch.positions[0, row]
        for i, token in enumerate(tokens.tolist()):
            seen = tokens[begin[i] : i + 1]
            assert np.array_equal(seen, np.arange(token - len(seen) + 1, token + 1))
            assert {of[t] for t in seen.tolist()} == {of[token]}
            # A piece begins where its document does, or where the row does.
            assert begin[i] == 0 or seen[0] == documents[of[token]].ids[0]
            steps = np.diff(positions[begin[i] : i + 1])
            assert positions[begin[i]] == 0 and np.all(steps >= 1) and np.sum(steps > 1) <= 1
            assert positions[i] < packer.span
            if packer.span == packer.length:
                assert positions[i] == i - begin[i]
            if of.get(token + 1) == of[token]:
                assert batch.targets[0, row, i] == token + 1
                assert batch.weights[0, row, i] == token + 1.5
            else:
                assert batch.weights[0, row, i] == 0


@settings(max_examples=40, deadline=None)
@given(packers(), st.integers(0, 6), st.integers(1, 3))
def test_from_any_place_on_the_rest_is_the_same(packer, before, rows):
    packer.span = packer.span or packer.length
    data_position = DataPosition()
    for _ in range(before):
        _, data_position = packer.take(data_position, 1, rows)
    again = Packer(packer.corpus, packer.length, packer.seed, packer.span)
    resumed = data_position
    for _ in range(3):
        (expected, data_position), (found, resumed) = (
            packer.take(data_position, 1, rows), again.take(resumed, 1, rows)
        )  # fmt: skip
        assert data_position == resumed
        for name, values in flat(expected).items():
            assert np.array_equal(values, flat(found)[name]), name


def test_epochs_and_seeds_come_in_orders_of_their_own():
    def order(seed, epoch):
        batch, _ = Packer(corpus_of([1] * 20), 20, seed, 20).take(DataPosition(epoch), 1, 1)
        return tuple(batch.tokens[0, 0].tolist())

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_documents_that_are_all_empty_are_refused():
    with pytest.raises(UserError, match="every document is empty"):
        Packer(corpus_of([0, 0]), 4, 0, 4).take(DataPosition(), 1, 1)


def test_the_beginnings_of_documents_are_rows_of_their_own():
    corpus = corpus_of([3, 9])
    batch = first_tokens([corpus[0], corpus[1]], 3, 3)
    assert batch.tokens[:2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch.targets[:2].tolist() == [[1, 2, 0], [4, 5, 6]]
    assert batch.weights.tolist() == [[1.5, 2.5, 0], [4.5, 5.5, 6.5], [0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2]] * 3 and not batch.begin.any()


@pytest.mark.parametrize("factor", [1, 4])
def test_positions_have_one_gap_within_the_span(factor):
    span = 512 * factor
    positions = gapped_positions(np.random.default_rng(0), 200, 512, span)
    steps = np.diff(positions, axis=1)
    assert np.all(positions[:, 0] == 0) and np.all(steps >= 1)
    assert np.all((steps > 1).sum(axis=1) <= 1)
    assert positions.max() < span
    assert factor == 1 or positions.max() > 0.9 * span
