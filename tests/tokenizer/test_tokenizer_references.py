"""Ids, text and chats are those of the reference libraries."""

import pytest

from lsjax.tokenizer import load_tokenizer

KINDS = ["byte_level_json", "metaspace_json", "sentencepiece", "tiktoken"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, golden):
    return load_tokenizer(golden / kind)


@pytest.fixture(scope="module")
def cases(kind, expected):
    return expected[kind]


def test_ids_equal_the_reference(tokenizer, cases):
    assert [tokenizer.encode(text) for text in cases["texts"]] == cases["ids"]


def test_special_tokens_around_a_prompt_can_be_left_out(tokenizer, cases):
    start = len(tokenizer.prefix)
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in cases["texts"]]
    assert bare == [ids[start:] for ids in cases["ids"]]


def test_text_of_ids_equals_the_reference(tokenizer, cases):
    assert [tokenizer.decode(ids) for ids in cases["ids"]] == cases["decoded"]


def test_text_of_ids_with_special_tokens_equals_the_reference(tokenizer, cases):
    found = [tokenizer.decode(ids, skip_special_tokens=False) for ids in cases["ids"]]
    assert found == cases["decoded_with_special_tokens"]


def test_rendered_chats_equal_the_reference(tokenizer, cases):
    prompts = [tokenizer.render_chat(m) for m in cases["messages"]]
    chats = [tokenizer.render_chat(m, add_generation_prompt=False) for m in cases["messages"]]
    assert (prompts, chats) == (cases["prompts"], cases["chats"])


@pytest.mark.parametrize("name", ["tiktoken", "sentencepiece"])
def test_a_chat_has_its_first_tokens_once(name, golden, expected):
    tokenizer = load_tokenizer(golden / name)
    ids = tokenizer.encode_chat(expected[name]["messages"][0])
    start = len(tokenizer.prefix)
    assert tuple(ids[:start]) == tokenizer.prefix
    assert not set(ids[start:]) & set(tokenizer.prefix)


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    ids = tokenizer.encode("boat", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == tokenizer.decode(ids)


def test_ids_are_below_the_vocabulary_size(tokenizer, cases):
    assert max(max(ids, default=0) for ids in cases["ids"]) < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.vocab_size - 1], skip_special_tokens=False)
