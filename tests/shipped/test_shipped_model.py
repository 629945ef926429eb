"""The shipped folders: complete, small, and able to find a pass key."""

import json
import pathlib

import numpy as np
import pytest
from tokenizers import Tokenizer

import lsjax
from lsjax.evals.passkey import QUESTION, Passage
from lsjax.families import read_config
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import held_out_passages, scaling_for
from lsjax.shipped.model import (
    END,
    END_TEXT,
    HF_CONFIGS,
    TRAINED_LENGTH,
    byte_tokenizer,
    tokens_of,
)

pytestmark = pytest.mark.runs_long

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "passkey_2048.txt"


@pytest.fixture(scope="module")
def lm():
    return lsjax.load()


def share_right(lm, passages):
    """The share of passages answered with the key and nothing else, to the end of the answer."""
    answers = lm.generate([p.prompt for p in passages], 16, allow_untrained_length=True)
    return np.mean([a.text == f" {p.answer}" for a, p in zip(answers, passages, strict=True)])


def yarn(lm, length):
    return lm.with_rope_scaling(scaling_for("yarn", length))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(shipped_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def example():
    prompt = EXAMPLE.read_text(encoding="utf-8")
    return Passage(prompt, prompt.split("The pass key is ")[1][:5])


def test_the_folders_are_complete_and_small():
    total = 0
    for positions in HF_CONFIGS:
        sizes = {file.name: file.stat().st_size for file in shipped_model_path(positions).iterdir()}
        assert set(sizes) == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "retrieval_heads.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        total += sum(sizes.values())
    assert total < 4_000_000


@pytest.mark.parametrize("positions", HF_CONFIGS)
def test_the_config_says_what_was_trained(positions):
    folder = shipped_model_path(positions)
    config, tokenizer = read_config(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert json.loads((folder / "config.json").read_text()) == HF_CONFIGS[positions]
    assert config.trained_length == TRAINED_LENGTH == 512
    assert config.alibi == (positions == "alibi")
    assert config.rope_scaling.kind == "default"
    assert config.eos_token_ids == (END,) == (tokenizer.token_to_id(END_TEXT),)
    assert tokenizer.get_vocab_size() <= config.vocab_size
    assert tokenizer.to_str() == byte_tokenizer().to_str()


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(128))),
        "  two spaces, a\ttab,\r\na new line  and an end ",
        "Grüße, 世界 🌍!",
        "",
    ],
)
def test_tokens_are_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_end_is_one_token_that_is_left_out_of_texts(tokenizer):
    assert tokenizer.encode("48213" + END_TEXT).ids == [*b"48213", END]
    assert tokenizer.decode([*b"48213", END]) == "48213"


def test_passages_are_tokenised_as_the_tokenizer_does(tokenizer):
    passage = held_out_passages(512, 1)[0]
    assert [
        *tokenizer.encode(f"{passage.prompt} {passage.answer}").ids,
        END,
    ] == [*tokens_of(passage)]


def test_it_reads_keys_at_the_length_it_was_trained_at(lm):
    assert share_right(lm, held_out_passages(505, 8)) == 1.0


@pytest.mark.slow("the logits of a model with ALiBi are quick")
def test_so_does_its_twin_with_alibi():
    twin = lsjax.load(shipped_model_path("alibi"))
    assert share_right(twin, held_out_passages(505, 8)) >= 0.8


@pytest.mark.parametrize(
    ("length", "count", "least"),
    [
        pytest.param(2048, 20, 0.95, marks=pytest.mark.slow("the example, one of them, is quick")),
        pytest.param(8192, 2, 1.0, marks=pytest.mark.slow("a quarter of the length is quick")),
    ],
)
def test_yarn_reads_keys_past_that_length(lm, length, count, least):
    assert share_right(yarn(lm, length), held_out_passages(length - 7, count)) >= least


def test_the_example_is_four_times_as_long_and_ends_with_the_question(example, tokenizer):
    assert len(tokenizer.encode(example.prompt).ids) == 2048
    assert example.prompt.count(example.answer) == 1
    assert example.prompt.endswith(QUESTION)


def test_the_example_is_read_with_yarn_and_not_without(lm, example):
    assert share_right(yarn(lm, 2304), [example]) == 1.0
    assert share_right(lm, [example]) == 0.0
