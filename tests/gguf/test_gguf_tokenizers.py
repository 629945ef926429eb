"""The tokenizers in GGUF files give the ids of those that they were made of."""

import json

import pytest
import sentencepiece
from helpers.gguf_files import GOLDEN, write_metadata

from lsjax.checkpoint.gguf.file import open_gguf
from lsjax.checkpoint.gguf.sidecar_files import sidecar_files
from lsjax.runtime.errors import UserError
from lsjax.tokenizer import load_tokenizer

EXPECTED = json.loads((GOLDEN / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(pre, **more):
    """The metadata of the golden byte-level vocabulary, which ends with unused tokens."""
    spec = json.loads((GOLDEN / "tokenizer" / "byte_level_json" / "tokenizer.json").read_text())
    added = {t["id"]: t["content"] for t in spec["added_tokens"]}
    tokens = {i: text for text, i in spec["model"]["vocab"].items()} | added
    types = [CONTROL if i in added else NORMAL for i in range(len(tokens))]
    types[603] = USER_DEFINED  # <think>
    unused = [f"[PAD{i}]" for i in range(len(tokens), len(tokens) + 8)]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokens[i] for i in range(len(tokens))] + unused,
        "token_type": types + [UNUSED] * len(unused),
        "merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "eos_token_id": 600,
        "bos_token_id": 602,
        "padding_token_id": 601,
        "add_bos_token": False,
    } | more


def sentencepieces(**more):
    file = GOLDEN / "tokenizer" / "sentencepiece" / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    kinds = {
        UNKNOWN: model.is_unknown,
        CONTROL: model.is_control,
        UNUSED: model.is_unused,
        BYTE: model.is_byte,
    }
    ids = range(model.get_piece_size())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((k for k, is_k in kinds.items() if is_k(i)), NORMAL) for i in ids],
    } | more


def convert(tmp_path, keys, other=None):
    """Returns the tokenizer of the files beside the weights."""
    metadata = {f"tokenizer.ggml.{key}": v for key, v in keys.items()} | (other or {})
    file = open_gguf(write_metadata(tmp_path / "model.gguf", metadata))
    files, _ = sidecar_files(file.metadata, 612)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return load_tokenizer(tmp_path)


def words(tokenizer, text):
    """The texts of the tokens of a text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


@pytest.mark.parametrize(
    ("pre", "other"),
    # Qwen2 takes digits one by one. Llama and GLM keep the accent that NFC would join.
    [("qwen2", "1234567 10:45 0x12"), ("llama-bpe", "e\u0301"), ("glm4", "e\u0301")],
)
def test_ids_equal_the_reference(tmp_path, pre, other):
    tokenizer = convert(tmp_path, byte_level(pre))
    cases = EXPECTED["byte_level_json"]
    told = [
        (text, ids)
        for text, ids in zip(cases["texts"], cases["ids"], strict=True)
        if not any(part in text for part in other.split())
    ]
    assert len(told) >= 10
    assert [tokenizer.encode(text) for text, _ in told] == [ids for _, ids in told]
    assert tokenizer.vocab_size == 604
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((600,), 602)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["12", "3", "4", "  ", " ", "5"]),
        ("qwen2", ["1", "2", "3", "4", "  ", " ", "5"]),
        ("gpt-2", ["12", "3", "4", "  ", " ", "5"]),
        ("smollm", ["1", "2", "3", "4", "   ", "5"]),
    ],
)
def test_digits_and_spaces_are_split_as_the_family_does(tmp_path, pre, pieces):
    assert words(convert(tmp_path, byte_level(pre)), "1234   5") == pieces


def test_special_tokens_around_prompts_are_those_of_the_file(tmp_path):
    for i, (pre, flags, prefix, suffix) in enumerate(
        [
            ("qwen2", {}, (), ()),
            ("qwen2", {"add_bos_token": True, "add_eos_token": True}, (602,), (600,)),
            ("llama-bpe", {"add_bos_token": False}, (), ()),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        tokenizer = convert(tmp_path / str(i), byte_level(pre, **flags))
        assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    keys = byte_level("llama-bpe")
    del keys["add_bos_token"]  # llama.cpp adds it then
    assert convert(tmp_path, keys).prefix == (602,)


def test_glm_begins_every_prompt_as_its_publisher_does(tmp_path):
    keys = byte_level("glm4")
    keys["tokens"][604:606] = ["[gMASK]", "<sop>"]
    keys["token_type"][604:606] = [CONTROL, CONTROL]
    assert convert(tmp_path, keys).prefix == (604, 605)


def test_sentencepiece_ids_and_text_equal_the_reference(tmp_path):
    tokenizer = convert(tmp_path, sentencepieces())
    cases = EXPECTED["sentencepiece"]
    assert (tmp_path / "tokenizer.model").exists()
    told = [
        (text, ids, decoded)
        for text, ids, decoded in zip(cases["texts"], cases["ids"], cases["decoded"], strict=True)
        if not any(token in text for token in ("<s>", "</s>", "<unk>"))
    ]
    assert len(told) >= 10
    assert [tokenizer.encode(text) for text, _, _ in told] == [ids for _, ids, _ in told]
    assert [tokenizer.decode(ids) for _, ids, _ in told] == [text for _, _, text in told]


def test_a_sentencepiece_file_says_whether_bos_and_a_space_come_first(tmp_path):
    flags = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    tokenizer = convert(tmp_path, sentencepieces(**flags))
    assert (tokenizer.prefix, tokenizer.suffix) == ((), (2,))
    assert "".join(words(tokenizer, "boat")) == "boat"
    assert tokenizer.encode("boat") != tokenizer.encode(" boat")


def test_chat_templates_and_ends_of_answers_are_carried(tmp_path):
    ends = {"eot_token_id": 602}
    other = {
        "tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    tokenizer = convert(tmp_path, byte_level("qwen2", **ends), other)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {t["name"]: t["template"] for t in settings["chat_template"]}["tool_use"] == "tools"
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 602,
        "pad_token_id": 601,
        "eos_token_id": [600, 602],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
    }


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pre": "tekken"}, "splits text as 'tekken' does"),
        ({"eos_token_id": 5000}, "eos_token_id must be a token id below 612"),
        ({"strange": 1}, "sets tokenizer.ggml.strange"),
        ({"token_type": [1]}, "each of which has its"),
        ({"add_space_prefix": True}, "add_space_prefix = True"),
        ({"merges": ["w a", "sea weed"]}, "do not fit together"),
        ({"merges": ["wa"]}, "do not fit together"),
        ({"tokens": [str(i) for i in range(613)]}, "each of which has its"),
    ],
)
def test_what_is_not_known_of_a_tokenizer_is_refused(tmp_path, keys, said):
    with pytest.raises(UserError) as caught:
        convert(tmp_path, byte_level("qwen2") | keys)
    assert said in str(caught.value)


def test_a_file_must_say_how_it_splits_text(tmp_path):
    keys = byte_level("qwen2")
    del keys["pre"]
    with pytest.raises(UserError, match=r"lacks tokenizer\.ggml\.pre"):
        convert(tmp_path, keys)
