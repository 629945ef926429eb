"""ask as a user runs it: questions about a document that is read once."""

import io
import json
from unittest import mock

import pytest
from helpers.programs import run

from lsjax.shipped.evaluation import held_out_passages

CHAT = ["--document", "A text.", "--question", "?", "--is_chat_model"]
QUESTION = "What is the pass key? The pass key is"


@pytest.fixture(scope="module")
def passage():
    """A document with a pass key, and the key."""
    found = held_out_passages(400, 1)[0]
    document, question, rest = found.prompt.partition(QUESTION)
    assert question and not rest.strip()
    return document, found.answer


def test_one_question_several_and_lines_get_the_same_answer(passage, tmp_path):
    document, key = passage
    book, cache, out = tmp_path / "book.txt", tmp_path / "documents", tmp_path / "out.json"
    book.write_text(document)
    flags = ["--document", book, "--max_output_length", 8, "--document_cache", cache]
    one = run("ask.py", *flags, "--question", QUESTION, "--output_json", out)
    assert one.returncode == 0 and key in one.stdout, one.stderr
    (answer,) = json.loads(out.read_text())["answers"]
    assert answer["text"].strip() == key and answer["finish_reason"] == "stop"

    two = run("ask.py", *flags, "--question", QUESTION, "--question", "Where")
    assert f"--- {QUESTION}\n {key}" in two.stdout and "--- Where\n" in two.stdout

    with mock.patch("sys.stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION}\n")):
        lines = run("ask.py", *flags)
    assert lines.stdout.count(key) == 2

    (name,) = (path.name for path in cache.iterdir())
    listed = run("documents.py", "--document_cache", cache)
    assert name in listed.stdout and "whole" in listed.stdout and "1 documents" in listed.stdout
    gone = run("documents.py", "--document_cache", cache, "--delete", name)
    assert "0 documents" in gone.stdout and not list(cache.iterdir())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--document", "-"], "so give --question too"),
        (["--document", "A text.", "--chat_template", "x"], "add --is_chat_model"),
        (["--document", "A text.", "--document_cache_gib", "1"], "give that, too"),
        (CHAT, "no chat template"),
        (
            [*CHAT, "--chat_template", "{{ messages[0]['content'] | upper }}"],
            "does not write a message once as it is",
        ),
        (
            ["--document", "A text.", "--question", "?", "--kv_compression", "streaming_llm"],
            "documents do not go with a kv_compression that forgets while it reads",
        ),
    ],
)
def test_what_does_not_go_is_refused(flags, says):
    refused = run("ask.py", *flags)
    assert refused.returncode == 2 and says in refused.stderr
    assert refused.stderr.count("error:") == 1
