"""Answers about a document are those to the plain prompt, document and question."""

import functools

import numpy as np
import pytest
from helpers.golden_models import build

import lsjax
from lsjax import Sampling, UserError

slow = functools.partial(
    pytest.param,
    marks=pytest.mark.slow(
        "the tokens of a shared int8 cache are quick, and attention to one on a mesh"
    ),
)
OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
OUTPUT = 12


def ids(seed, length):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


# Not whole blocks of a quantized cache, nor whole chunks.
DOCUMENT = ids(0, 150)
QUESTIONS = [ids(1, 9), ids(2, 30), ids(3, 1)]


def plain(lm, questions=QUESTIONS, **options):
    prompts = [DOCUMENT + question for question in questions]
    return [c.token_ids for c in lm.generate(prompts, OUTPUT, **OPTIONS, **options)]


def asked(lm, document, questions=QUESTIONS, **options):
    done = lm.generate(questions, OUTPUT, document=document, **OPTIONS, **options)
    return [c.token_ids for c in done]


@pytest.mark.parametrize(
    ("name", "kv", "mesh"),
    [
        ("glm4", "int8", ""),
        slow("qwen2_window", "int8", ""),
        slow("glm4", "int8", "data=2,context=2,model=2"),
        slow("glm4", "int8", "data=2,model=2"),
        slow("qwen2_window", "float32", "context=2,model=2"),
        slow("alibi_8_heads", "int4", ""),
    ],
)
def test_they_are_those_to_the_plain_prompt(name, kv, mesh):
    lm = build(name, kv=kv, mesh=mesh, layers=2)
    document = lm.read(DOCUMENT, allow_untrained_length=True)
    assert asked(lm, document) == plain(lm)


@pytest.mark.slow("tables for one length are quick in test_request_decides, and so is int8")
@pytest.mark.parametrize(
    ("name", "scaling", "kv", "mesh"),
    [
        ("glm_yarn", None, "int8", "context=8"),
        ("glm_yarn", "auto", "int8", "context=4"),
        ("qwen3_dynamic", None, "float32", "data=2"),
    ],
)
def test_they_are_those_of_prompts_settled_for_the_same_length(name, scaling, kv, mesh):
    """Questions and answers of several lengths that come to one length together."""
    lm = build(name, kv=kv, mesh=mesh, rope_scaling=scaling, layers=1)
    reserve = max(map(len, QUESTIONS)) + OUTPUT
    total = len(DOCUMENT) + reserve
    document = lm.read(DOCUMENT, reserve=reserve, allow_untrained_length=True)
    assert document.settled_length in (None, max(total, lm.config.trained_length))
    for question, found in zip(QUESTIONS, asked(lm, document), strict=True):
        prompt = [*DOCUMENT, *question]
        (whole,) = lm.generate(prompt, total - len(prompt), **OPTIONS)
        assert found == whole.token_ids[:OUTPUT]


@pytest.mark.slow("it takes a document, and no quick one has scaling by length")
def test_more_than_the_reserve_is_refused():
    lm = build("qwen3_dynamic", layers=1)
    document = lm.read(DOCUMENT, reserve=32)
    assert document.settled_length == len(DOCUMENT) + 32 > lm.config.trained_length
    with pytest.raises(UserError, match="read the document again with reserve 33"):
        lm.generate([1] * 21, OUTPUT, document=document)


@pytest.mark.slow("drafts and samples are quick without a document")
def test_drafts_and_samples_go_with_a_document():
    lm = build("glm4", kv="int8", layers=2)
    document = lm.read(DOCUMENT, allow_untrained_length=True)
    assert asked(lm, document, prompt_lookup_num_tokens=5) == plain(lm)
    options = {"sampling": Sampling(temperature=1.0), "num_samples": 2, "max_batch_size": 2}
    assert asked(lm, document, **options) == plain(lm, **options)


def test_streamed_text_is_that_of_generate():
    lm = lsjax.load()
    document = lm.read("The grass is green. " * 8)
    (whole,) = lm.generate("The sky", 8, document=document)
    assert "".join(lm.stream("The sky", 8, document=document)) == whole.text
    (again,) = lm.generate("The grass is green. " * 8 + "The sky", 8)
    assert again.token_ids == whole.token_ids


def test_a_document_of_another_model_and_an_empty_question_are_refused():
    lm = build("glm4", layers=2)
    document = lm.read(DOCUMENT, allow_untrained_length=True)
    other = build("glm4", layers=2, kv="int8")
    with pytest.raises(UserError, match="another kv_cache_dtype"):
        other.generate([1], 4, document=document)
    with pytest.raises(UserError, match="prompt 1 has no token after the document"):
        lm.generate([[1], []], 4, document=document)


@pytest.mark.slow("questions whose chunks end within the capacity of the prompt are quick")
def test_padding_of_a_question_has_room_behind_the_end_of_the_document():
    """The chunk of 1,024 that a question of 700 tokens takes begins in the middle of a block."""
    lm = build("glm4", kv="int8", chunk=1024, layers=1)
    document = lm.read(ids(0, 2 * lm.options.cache_block + 63), allow_untrained_length=True)
    question = ids(5, 700)
    prompt = [*document.token_ids, *question]
    (expected,) = lm.generate(prompt, OUTPUT, **OPTIONS)
    assert lm.generate(question, OUTPUT, document=document, **OPTIONS)[0].token_ids == (
        expected.token_ids
    )
