"""A chat about a document answers as plain prompts do, and runs only what is new."""

import dataclasses
import functools

import numpy as np
import pytest
from helpers.golden_models import build

import lsjax
from lsjax import UserError
from lsjax.documents.question import after_document
from lsjax.language_model import LanguageModel

OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
OUTPUT = 12
# Begins with the words before a document; earlier answers may be cut.
TEMPLATE = (
    "{%% for m in messages %%}{{ m.role[0] }}: {{ m.content if m.role == 'user' or not %s else "
    "m.content[:2] }}\n{%% endfor %%}a: "
)
TEXT = "The grass is green. " * 8


def ids(seed, length):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


@pytest.mark.slow("turns of a float cache are quick")
@pytest.mark.parametrize(
    ("name", "kv", "mesh", "again"),
    [
        ("glm4", "int8", "", 1),  # the last token of an answer, which no cache has seen yet
        ("glm4", "int8", "data=2,context=2", 64),  # and what is before it in a zigzag block
        ("qwen2_window", "int8", "", 64),  # or in a chunk
    ],
)
def test_turns_run_what_is_new(name, kv, mesh, again):
    """The second turn goes on within a block of a quantized cache, the third in the next."""
    lm = build(name, kv=kv, mesh=mesh, layers=2 if "window" in name else 1)
    prompt, told = ids(0, 150), []
    chat = lm.chat(lm.read(prompt, allow_untrained_length=True))
    for turn, question in enumerate([ids(1, 9), ids(2, 30), ids(3, 20)]):
        prompt = [*prompt, *question]
        (expected,) = lm.generate(prompt, OUTPUT, **OPTIONS)
        told.clear()
        answer = chat.ask(question, OUTPUT, on_prefill=told.append, **OPTIONS)
        assert answer.token_ids == expected.token_ids
        assert not turn or sum(told) <= len(question) + again
        prompt += answer.token_ids


@functools.cache
def load():
    return lsjax.load()


def with_template(cuts):
    lm = load()
    tokenizer = dataclasses.replace(lm.tokenizer, chat_template=TEMPLATE % cuts)
    return LanguageModel(dataclasses.replace(lm.options, tokenizer=tokenizer), lm.params)


def test_a_template_that_cuts_earlier_turns_is_noticed_once(caplog):
    lm = with_template("true")
    document = lm.read(TEXT, as_chat=True)
    chat = lm.chat(document)
    questions = ["The sky", "The sun", "Here"]
    texts = ["".join(chat.stream(question, 8)) for question in questions]
    assert [m["content"] for m in chat.messages] == [
        text for pair in zip(questions, texts, strict=True) for text in pair
    ]
    assert caplog.text.count("writes or splits earlier turns in another way") == 1
    messages = chat.messages[:-1]
    rendered = after_document(lm.tokenizer, document.token_ids, messages)
    first = {"role": "user", "content": f"{TEXT.rstrip()}\n\n{questions[0]}"}
    assert rendered.count("a: ") == 3 and texts[0][:2] in rendered and texts[0] not in rendered
    (expected,) = lm.generate(lm.tokenizer.encode_chat([first, *messages[1:]]), 8)
    assert texts[-1] == expected.text


def test_what_was_not_read_as_a_chat_goes_on_as_text(caplog):
    lm, told = with_template("false"), []
    document = lm.read(TEXT)
    chat = lm.chat(document)
    assert "not read with as_chat" in caplog.text
    with pytest.raises(UserError, match="leave out num_samples"):
        chat.ask("The sky", 8, num_samples=2)
    answers = [chat.ask(q, 8, on_prefill=told.append) for q in ("The sky", "Here")]
    assert chat.messages == ()
    new = lm.tokenizer.encode("Here", add_special_tokens=False)
    before = [*document.token_ids, *lm.tokenizer.encode("The sky"), *answers[0].token_ids]
    assert told[-1] == 1 + len(new)  # the answer's last token has not been run yet
    (expected,) = lm.generate([*before, *new], 8)
    assert answers[1].token_ids == expected.token_ids
