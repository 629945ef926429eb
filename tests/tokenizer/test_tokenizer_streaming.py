"""Text that arrives token by token is the text of all tokens at once."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsjax.tokenizer import load_tokenizer


@pytest.fixture(
    scope="module", params=["byte_level_json", "metaspace_json", "sentencepiece", "tiktoken"]
)
def tokenizer(request, golden):
    return load_tokenizer(golden / request.param)


@given(chunks=st.lists(st.lists(st.integers(0, 650), max_size=6), max_size=12))
@settings(max_examples=80, deadline=None)
def test_streamed_text_joins_to_the_decoded_text(tokenizer, chunks):
    stream = tokenizer.stream_decoder()
    streamed = "".join(stream.push(chunk) for chunk in chunks) + stream.flush()
    assert streamed == tokenizer.decode(list(chain(*chunks)))


@given(text=st.text(max_size=20))
@settings(max_examples=80, deadline=None)
def test_no_half_character_is_shown(tokenizer, text):
    ids = tokenizer.encode(text.replace("\ufffd", ""))
    whole = tokenizer.decode(ids)
    stream = tokenizer.stream_decoder()
    shown = ""
    for token_id in ids:
        shown += stream.push([token_id])
        assert whole.startswith(shown)
    assert shown == whole


def test_characters_are_shown_as_soon_as_they_are_whole(tokenizer):
    ids = tokenizer.encode("🙂🙂", add_special_tokens=False)
    stream = tokenizer.stream_decoder()
    parts = list(filter(None, (stream.push([token_id]) for token_id in ids)))
    assert len(ids) > 2
    assert parts[-2:] == ["🙂", "🙂"]


def test_a_cut_off_character_is_shown_when_the_text_ends(tokenizer):
    stream = tokenizer.stream_decoder()
    shown = stream.push(tokenizer.encode("boat🙂", add_special_tokens=False)[:-1])
    assert shown == "boat"
    assert set(stream.flush()) == {"\ufffd"}


def test_a_stream_can_be_used_again_after_its_end(tokenizer):
    ids = tokenizer.encode("The boat")
    stream = tokenizer.stream_decoder()
    first = stream.push(ids) + stream.flush()
    assert stream.push(ids) + stream.flush() == first == "The boat"
