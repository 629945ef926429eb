"""Document and question of a chat have the tokens of the whole message."""

import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from lsjax.documents import chat_frame
from lsjax.tokenizer import load_tokenizer

# Llama 3 and Qwen keep a full stop and the line feeds after it together; GPT-2 does not.
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama 3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r"( ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+)", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("document", ["The end.", "The end.\n"])
def test_tokens_of_a_document_and_a_question_are_those_of_the_message(tmp_path, split, document):
    letters = sorted(ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, "ĊĊ", ".ĊĊ"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), (".", "ĊĊ")]))
    made.pre_tokenizer, made.decoder = SPLITS[split], decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = dataclasses.replace(
        load_tokenizer(tmp_path), chat_template="[{{ messages[0].content }}]"
    )
    frame = chat_frame(tokenizer, document)
    apart = [
        *tokenizer.encode(frame.document, add_special_tokens=False),
        *tokenizer.encode(frame.ask("Who is it?"), add_special_tokens=False),
    ]
    chat = [{"role": "user", "content": f"{document}\n\nWho is it?"}]
    assert apart == tokenizer.encode_chat(chat)
