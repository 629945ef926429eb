"""Answers of a model with dual chunk attention are those of its definition, however it is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import BLOCK, build
from helpers.oracle import dual_chunk_attention

import lsjax
from lsjax import UserError
from lsjax.config import MAX_POSITIONS, RopeScaling
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import rotary_tables

SIZE, LOCAL = 64, 16  # chunks of 48 positions
SCALING = {"rope_type": "dual_chunk", "chunk_size": SIZE, "local_size": LOCAL}
GROWING = SCALING | {"original_max_position_embeddings": SIZE}
OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
LONGEST = 320


def model(scaling=GROWING, **options):
    return build("qwen3", rope_scaling=scaling, layers=1, **options)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


def tokens(lm, prompts, output, **options):
    return [c.token_ids for c in lm.generate(prompts, output, **OPTIONS, **options)]


def by_definition(lm, ids, total):
    """[length, vocab] logits of a text, in which each layer's attention is that of the oracle.

    At position 0 nothing is rotated: the oracle gets queries and keys as they are.
    """
    config = lm.config
    original = config.rope_scaling.original_length

    def attend(mesh, q, k, v, *_):
        def in_float64(q, k, v):
            sizes = SIZE, LOCAL, original, total, config.rope_theta
            return dual_chunk_attention(q, k, v, *sizes).astype(np.float32)

        return jax.pure_callback(in_float64, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v)

    plain = dataclasses.replace(config, rope_scaling=RopeScaling())
    decoder = Decoder(plain, lm.options.mesh, jnp.float32, self_attention=attend)
    # Texts of one length share what is compiled; what stands behind the end is seen by no token.
    params, given = {"params": lm.params}, np.pad(ids, (0, LONGEST - len(ids)))[None]
    hidden, _ = decoder.apply(params, given, np.zeros_like(given), rotary_tables(plain, [1]), None)
    return np.asarray(decoder.apply(params, hidden, method="logits"))[0, : len(ids)]


def check_answer(lm, ids, answer):
    """The tokens are the likeliest by definition, or as likely but for rounding."""
    total = len(ids) + len(answer)
    scores = by_definition(lm, [*ids, *answer[:-1]], total)[len(ids) - 1 :]
    chosen = scores[np.arange(len(answer)), list(answer)]
    assert (scores.max(axis=1) - chosen).max() < 1e-4


slow = functools.partial(
    pytest.param,
    marks=pytest.mark.slow("the quick case has every range of keys, and attention every mesh"),
)


@pytest.mark.parametrize(
    ("lengths", "output", "options"),
    [
        ((150, 94, 46), 4, {}),
        slow((300, 170), 20, {"mesh": "context=2"}),
    ],
)
def test_answers_are_those_of_the_definition(lengths, output, options):
    lm = model(**options)
    prompts = [prompt(i, n) for i, n in enumerate(lengths)]
    alone = model()
    for ids, answer in zip(prompts, tokens(lm, prompts, output), strict=True):
        check_answer(alone, ids, answer)


@pytest.mark.slow("attention to an int8 cache is quick, and so are the tokens of a float cache")
def test_a_quantized_cache_gives_the_same_tokens_however_it_is_filled():
    prompts = [prompt(1, 3 * BLOCK + 5), prompt(3, 20) * 4]
    usual = tokens(model(kv="int4"), prompts, 24)
    drafted = tokens(model(kv="int4", chunk=48), prompts, 24, prompt_lookup_num_tokens=5)
    assert drafted == usual


@pytest.mark.slow("logits of decode are those of the definition in a quick test")
def test_prompts_are_scored_by_the_definition():
    lm, ids = model(), prompt(0, 200)
    found, wanted = lm.logits([ids])[0], by_definition(lm, ids, 200)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


DOCUMENT = prompt(5, 150)


def after(document, lm, question, output):
    (found,) = lm.generate(question, output, document=document, **OPTIONS)
    return found.token_ids


@pytest.mark.slow("documents and dual chunk attention are quick, one by one")
def test_a_saved_document_serves_questions_of_the_length_it_was_settled_for(tmp_path):
    """It was read on one device, and is opened on several."""
    lm = model(kv="int8")
    settled = len(DOCUMENT) + 50
    lm.read(DOCUMENT, reserve=50, save_to=tmp_path / "saved", allow_untrained_length=True)
    there = model(kv="int8", mesh="data=2,context=2")
    document = there.open_document(tmp_path / "saved")
    assert document.settled_length == settled
    question = prompt(6, 33)
    (whole,) = lm.generate([*DOCUMENT, *question], settled - 183, **OPTIONS)
    assert after(document, there, question, 9) == whole.token_ids[:9]
    with pytest.raises(UserError, match="read the document again with reserve 51"):
        there.generate(question, 18, document=document, **OPTIONS)


@pytest.mark.slow("documents are quick with a length that they are settled for")
def test_a_short_document_serves_any_question_up_to_the_original_length():
    lm = model()
    document = lm.read(DOCUMENT[:40], reserve=2, allow_untrained_length=True)
    assert document.settled_length == SIZE
    question = prompt(7, 14)
    assert [after(document, lm, question, 10)] == tokens(lm, [DOCUMENT[:40] + question], 10)
    with pytest.raises(UserError, match="reserve 25"):
        lm.generate(question, 11, document=document, **OPTIONS)


@pytest.mark.slow("documents are quick with a length that they are settled for")
def test_without_the_growing_factor_a_document_serves_any_question():
    lm = model(SCALING)
    document = lm.read(DOCUMENT, reserve=2, allow_untrained_length=True)
    assert document.settled_length == MAX_POSITIONS
    question = prompt(8, 100)
    assert [after(document, lm, question, 10)] == tokens(lm, [DOCUMENT + question], 10)


@pytest.mark.slow("two models, to show two sentences")
def test_a_cache_that_forgets_while_it_reads_is_refused_past_the_chunk_size():
    lm = lsjax.load(rope_scaling=SCALING, kv_compression={"streaming": True})
    lm.generate([[5] * 50], 4)
    with pytest.raises(UserError, match="at most 64 tokens"):
        lm.generate([[5] * 61], 4, allow_untrained_length=True)
    lm = lsjax.load(rope_scaling=SCALING, kv_compression="streaming_llm")
    assert len(lm.generate([[5] * 300], 4, ignore_eos=True)[0].token_ids) == 4
