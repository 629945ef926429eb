"""run_pa as a user runs it: answers, figures, and one clear sentence for what is wrong."""

import json
import os
import pathlib
import shutil

import pytest
from helpers.processes import finish, start
from helpers.programs import path_of, run

from lsjax import shipped_model_path

ROOT = pathlib.Path(__file__).parents[2]
YARN = '{"rope_type": "yarn", "factor": 4.5, "original_max_position_embeddings": 512}'
DOCUMENT = str(ROOT / "examples" / "passkey_2048.txt")


def run_pa(*arguments, cwd="."):
    return run("run_pa.py", *arguments, cwd=cwd)


def as_users_have_it(*arguments, **environment):
    """run_pa as a process, whose one device is the CPU and whose programs are optimized."""
    plain = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"} | environment
    return finish(start(path_of("run_pa.py"), *arguments, **plain))


@pytest.mark.slow("make demo is this very command; its lines are tested quickly in process")
def test_the_pass_key_in_four_times_the_trained_length(tmp_path):
    def answer():
        return as_users_have_it(
            "--input_texts", DOCUMENT, "--rope_scaling", YARN, "--max_output_length", 16,
            "--output_json", tmp_path / "out.json",
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
        )  # fmt: skip

    first = answer()
    assert first.returncode == 0, first.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    (result,) = written["results"]
    text = pathlib.Path(DOCUMENT).read_text()
    key = text.split("The pass key is ")[1][:5]
    assert result["text"].strip() == key and key in first.stdout
    assert result["finish_reason"] == "stop"
    assert result["prompt_tokens"] == 2048
    assert written["config"]["rope_kind"] == "yarn"
    assert written["config"]["trained_length"] == 512
    assert written["config"]["served_length"] == 2304
    assert written["stats"]["compilations"] == 3
    for line in (
        # 0.1 ln 4.5 + 1
        "rope yarn, theta 10000, factor 4.5, attention factor 1.15041",
        "trained for 512, serves 2,304, this request 2,064 tokens",
        "tokens/s",
        "at the peak",
    ):
        assert line in first.stdout

    again = answer()
    second = json.loads((tmp_path / "out.json").read_text())
    assert again.returncode == 0 and second["results"] == written["results"]
    assert second["stats"]["compilations"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # (2,048 + 64) / 512 = 4.125; attention factor 0.1 ln 4.125 + 1.
        (DOCUMENT, ["rope yarn, theta 10000, factor 4.125, attention factor 1.14171"]),
        (
            "A short text.",
            [
                "rope default, theta 10000, factor 1, attention factor 1",
                "note       rope_scaling auto leaves requests of up to 512 tokens as they are",
            ],
        ),
    ],
)
def test_auto_prints_what_it_chose(text, words):
    arguments = ["--input_texts", text, "--rope_scaling", "auto", "--max_output_length", 64]
    done = run_pa(*arguments)
    assert done.returncode == 0, done.stderr
    assert all(line in done.stdout for line in words)


def test_a_compressed_cache_reads_the_pass_key():
    small = '{"induction": 0.5, "window": 256, "window_share": 0.1}'
    arguments = ["--input_texts", DOCUMENT, "--rope_scaling", "auto", "--max_output_length", 8]
    done = run_pa(*arguments, "--kv_compression", small)
    assert done.returncode == 0, done.stderr
    assert " 65415\n" in done.stdout and "2 KV heads of 4 keep everything" in done.stdout


def test_several_texts_and_flags_after_them(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("The pass key is 12345. What is the pass key? The pass key is")
    done = run_pa(
        "--input_texts", file, "Some words.", "Other words.", "--max_output_length", 8,
        "--max_batch_size", 2, "--ignore_eos", "--output_json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [len(r["token_ids"]) for r in results] == [8, 8, 8]
    assert [r["prompt_tokens"] for r in results] == [len(file.read_text()), 11, 12]


def test_ids_and_chats(tmp_path):
    out = tmp_path / "out.json"
    short = ["--max_output_length", 4, "--output_json", out]
    assert run_pa("--input_ids", "5,6,7", "8,9", *short).returncode == 0
    results = json.loads(out.read_text())["results"]
    assert [r["prompt_tokens"] for r in results] == [3, 2]
    chats = tmp_path / "chats.jsonl"
    chats.write_text('[{"role": "user", "content": "Hello"}]\n')
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    flags = ["--input_file", chats, "--is_chat_model", "--chat_template", template]
    done = run_pa(*flags, *short)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["results"][0]["prompt_tokens"] == len("<user>Hello")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--input_texts", "a b c", "--max_input_length", 3],
            ["5 tokens", "max_input_length is 3"],
        ),
        (["--input_texts", DOCUMENT], ["serves 512", "set rope_scaling", "allow_untrained_length"]),
        (["--input_texts", "no/such/book.txt"], ["no/such/book.txt", "no such file"]),
        (["--input_texts", ""], ["empty"]),
        (["--input_texts", "latin1.txt"], ["latin1.txt", "not UTF-8", "byte 1"]),
        (["--input_texts", "hello", "--mesh", "rows=2"], ["'rows'", "data, context, model"]),
        (
            ["--input_texts", "hello", "--mesh", "context=64"],
            ["64 devices", "here", "JAX_NUM_CPU_DEVICES=64"],
        ),
        (["--input_texts", "hello", "--prompt_lookup_num_tokens", "99"], ["0 (no drafts) to 15"]),
        (["--input_texts", "hello", "--max_output_length", -1], ["max_output_length"]),
        (["--input_texts", "hello", "--max_input_length", 0], ["max_input_length"]),
        (["--input_texts", "hello", "--no_such_flag"], ["no_such_flag"]),
        (["--input_texts", "hello", "--rope_scaling", "yarn"], ["rope_scaling", "neither"]),
        (["--input_texts", "hello", "--model_path", "nowhere"], ["nowhere", "not a folder"]),
        (["--input_texts", "hello", "--output_json", "no/where.json"], ["no", "not a folder"]),
        (["--input_ids", "1,99999"], ["99999", "vocabulary of 264"]),
        (["--input_ids", "1,x"], ["'x'", "1,15043,3186"]),
        (["--input_file", "chats.jsonl", "--is_chat_model"], ["line 2", "not valid JSON"]),
        (["--input_texts", "hello", "--is_chat_model"], ["chat template", "--chat_template"]),
        (["--input_texts", "hello", "--model_path", "broken"], ["config.json", "not valid JSON"]),
        (["--input_texts", "hello", "--model_path", "wordless"], ["tokenizer.json"]),
        ([], ["--input_texts", "--input_file", "--input_ids"]),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, arguments, words):
    (tmp_path / "latin1.txt").write_bytes(b"h\xe9llo")
    (tmp_path / "chats.jsonl").write_text('[{"role": "user", "content": "Hi"}]\n{oops\n')
    shipped = shipped_model_path()
    for name, damaged in (("broken", "config.json"), ("wordless", "tokenizer.json")):
        shutil.copytree(shipped, tmp_path / name)
        (tmp_path / name / damaged).write_text((shipped / damaged).read_text()[:-40])
    before = sorted(os.listdir(tmp_path))
    done = run_pa("--output_json", "out.json", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""
    assert sorted(os.listdir(tmp_path)) == before


def test_as_a_process_it_ends_with_the_same_sentence():
    done = as_users_have_it("--input_texts", "no/such/book.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no/such/book.txt" in done.stderr and "no such file" in done.stderr


@pytest.mark.slow("a document that begins as a saved one is quick, and so is ask with its cache")
def test_a_prompt_that_begins_as_an_earlier_one_is_read_from_there(tmp_path):
    flags = ["--kv_cache_dtype", "float32", "--max_output_length", 4, "--document_cache", tmp_path]
    text = "The grass is green. " * 20
    run_pa("--input_texts", text, *flags)
    longer = text + "The sky is blue. " * 4
    plain = run_pa("--input_texts", longer, "--max_output_length", 4)
    kept = run_pa("--input_texts", longer, *flags)
    assert kept.returncode == 0, kept.stderr
    answer = plain.stdout.split("cpu, mesh data=1,context=1,model=1\n")[1].splitlines()[0]
    assert answer in kept.stdout.splitlines()
    assert len(list(tmp_path.iterdir())) == 2
    refused = run_pa("--input_texts", text, *flags, "--max_batch_size", 2)
    assert refused.returncode == 2 and "one after the other" in refused.stderr


def test_progress_is_written_as_json_lines(tmp_path):
    events = tmp_path / "events"
    done = run_pa(
        "--input_texts", "The sky. " * 30, "--max_output_length", 2, "--progress_json", events
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in events.read_text().splitlines()]
    assert {event["phase"] for event in found} == {"tokenize", "load", "prefill"}
    last = {event["phase"]: event for event in found}
    for event in last.values():
        assert event["done"] == event["total"] and event["remaining_seconds"] == 0
    assert last["prefill"]["unit"] == "tokens" and last["prefill"]["total"] > 60
    refused = run_pa("--input_texts", "The sky.", "--progress_json", tmp_path / "no" / "events")
    assert refused.returncode == 2 and "cannot be written" in refused.stderr
