"""The shipped folder: complete, small, and able to find a pass key."""

import pathlib

import pytest
from tokenizers import Tokenizer

from lsjax.checkpoint import load_parameters
from lsjax.families import read_config
from lsjax.sharding import make_mesh, parse_mesh
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import held_out_passages, scaling_for, share_right
from lsjax.shipped.model import END, END_TEXT, TRAINED_LENGTH, byte_tokenizer, tokens_of
from lsjax.shipped.passages import QUESTION, Passage

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "passkey_2048.txt"


@pytest.fixture(scope="module")
def config():
    return read_config(shipped_model_path())


@pytest.fixture(scope="module")
def params(config):
    return load_parameters(shipped_model_path(), config, make_mesh(parse_mesh("")), "float32")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(shipped_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def example():
    prompt = EXAMPLE.read_text(encoding="utf-8")
    return Passage(prompt, prompt.split("The pass key is ")[1][:5])


def test_the_folder_is_complete_and_small():
    sizes = {file.name: file.stat().st_size for file in shipped_model_path().iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) < 4_000_000


def test_the_config_says_what_was_trained(config, tokenizer):
    assert config.architecture == "Qwen2ForCausalLM"
    assert config.trained_length == TRAINED_LENGTH == 512
    assert config.eos_token_ids == (END,) == (tokenizer.token_to_id(END_TEXT),)
    assert config.rope_scaling.kind == "default"
    assert tokenizer.get_vocab_size() <= config.vocab_size


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


def test_the_tokenizer_is_the_one_that_is_exported(tokenizer):
    assert tokenizer.to_str() == byte_tokenizer().to_str()


def test_passages_are_tokenised_as_the_tokenizer_does(tokenizer):
    passage = held_out_passages(512, 1)[0]
    assert [*tokenizer.encode(passage.prompt + passage.answer).ids, END] == [*tokens_of(passage)]


def test_it_reads_keys_at_the_length_it_was_trained_at(config, params):
    passages = held_out_passages(512, 20)
    assert share_right(config, params, passages, scaling_for("default", 512)) == 1.0


def test_it_does_not_read_keys_that_are_wrong(config, params):
    wrong = [
        Passage(p.prompt, f"{(int(p.answer) + 1) % 100_000:05d}") for p in held_out_passages(512, 5)
    ]
    assert share_right(config, params, wrong, scaling_for("default", 512)) == 0.0


def test_the_example_is_four_times_as_long_and_ends_with_the_question(example, tokenizer):
    assert len(tokenizer.encode(example.prompt).ids) == 2048
    assert example.prompt.count(example.answer) == 1
    assert example.prompt.endswith(QUESTION + "\n")


def test_the_example_is_read_with_yarn_and_not_without(config, params, example):
    assert share_right(config, params, [example], scaling_for("yarn", 2048)) == 1.0
    assert share_right(config, params, [example], scaling_for("default", 2048)) == 0.0
