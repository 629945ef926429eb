"""What real folders, files and terminals hold: it is applied, refused in a sentence, or noted."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.programs import ROOT, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lsjax.shipped import shipped_model_path

PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEXT = "The pass key is 12345. What is the pass key? The pass key is"
QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped model."""
    return shutil.copytree(shipped_model_path(), tmp_path / "model")


def edit(file, **fields):
    """Changes fields of a JSON file; None takes one out."""
    held = json.loads(file.read_text()) if file.exists() else {}
    held |= fields
    file.write_text(json.dumps({k: v for k, v in held.items() if v is not None}))


def tensors(folder):
    return load_file(folder / "model.safetensors")


def answer(folder, *arguments, output=4, program="run_pa.py", **options):
    """What run_pa prints, its results and its errors; one sentence or nothing of these."""
    out = folder.parent / "out.json"
    out.unlink(missing_ok=True)
    flags = [f"--model_path={folder}", f"--max_output_length={output}", f"--output_json={out}"]
    done = run(program, *flags, *arguments, **options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == (done.returncode != 0)
    results = json.loads(out.read_text())["results"] if out.exists() else None
    assert (results is None) == (done.returncode != 0)
    return done.stdout, results, lines[0] if lines else ""


def ids(folder, text=TEXT, **options):
    stdout, results, error = answer(folder, "--input_texts", text, **options)
    assert not error, error
    return results[0]["token_ids"], notes(stdout)


def notes(stdout):
    return [line for line in stdout.splitlines() if line.startswith("note ")]


def refusal(folder, *arguments):
    error = answer(folder, *arguments)[2]
    assert error
    return error


def chat(tmp_path, *messages):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(list(messages)) + "\n")
    return [f"--input_file={file}", "--is_chat_model", f"--chat_template={PLAIN}"]


# ---- Chats ---------------------------------------------------------------------------------------


def test_parts_of_text_are_one_text_and_others_are_refused(folder, tmp_path):
    part = {"type": "text", "text": TEXT}
    found = answer(folder, *chat(tmp_path, {"role": "user", "content": [part]}))[1]
    plain = answer(folder, *chat(tmp_path, {"role": "user", "content": TEXT}))[1]
    assert found == plain and found[0]["prompt_tokens"] == len(TEXT)
    for other in ([{"type": "image_url", "image_url": {"url": "x"}}], [TEXT], 7, {"text": TEXT}):
        error = refusal(folder, *chat(tmp_path, {"role": "user", "content": other}))
        assert "message 0" in error and "only text can be read" in error


def test_arguments_of_calls_are_objects_when_templates_see_them(folder, tmp_path):
    call = {"function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    template = (
        "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    )
    flags = chat(tmp_path, {"role": "assistant", "content": None, "tool_calls": [call]})[:2]
    found = answer(folder, *flags, f"--chat_template={template}")[1]
    assert found[0]["prompt_tokens"] == len('{"city": "Oslo"}')
    call["function"]["arguments"] = "Oslo"
    flags = chat(tmp_path, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert "no JSON object: 'Oslo'" in refusal(folder, *flags)


def test_templates_are_told_what_else_is_given(folder, tmp_path):
    flags = chat(tmp_path, {"role": "user", "content": "a"})[:2]
    template = "--chat_template={% if enable_thinking %}thinking{% else %}no{% endif %}"
    for value, length in (("true", 8), ("false", 2)):
        kwargs = f'--chat_template_kwargs={{"enable_thinking": {value}}}'
        assert answer(folder, *flags, template, kwargs)[1][0]["prompt_tokens"] == length
    for wrong in ("[]", "{", '{"messages": []}'):
        assert refusal(folder, *flags, template, f"--chat_template_kwargs={wrong}")


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@QUICK
@given(any_json)
def test_any_content_is_answered_or_refused_in_one_sentence(tmp_path_factory, content):
    tmp_path = tmp_path_factory.mktemp("chat")
    answer_of = run(
        "run_pa.py", *chat(tmp_path, {"role": "user", "content": content}), "--max_output_length=1"
    )
    assert answer_of.returncode == 0 or answer_of.stderr.startswith("error: ")


# ---- Text as it is on disk and in terminals ------------------------------------------------------


def test_a_byte_order_mark_is_no_text(folder, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert ids(folder, tmp_path / "bom.txt") == ids(folder)
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert ids(folder) == ids(folder)


def test_half_a_character_is_named_with_its_line(folder, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(
        '[{"role": "user", "content": "fine"}]\n[{"role": "user", "content": "\\ud83d"}]\n'
    )
    error = refusal(folder, f"--input_file={file}", "--is_chat_model", f"--chat_template={PLAIN}")
    assert f"{file}, line 2" in error and "half of a character" in error
    assert "0xff, which is not UTF-8" in refusal(folder, "--input_texts", "abc\udcff")


def test_lines_end_at_line_feeds_alone(folder, tmp_path):
    flags = chat(tmp_path, {"role": "user", "content": "a"})
    file = tmp_path / "chat.jsonl"
    file.write_text('[{"role": "user", "content": "a\u2028b\x85c"}]\r\n', encoding="utf-8")
    assert answer(folder, *flags)[1][0]["prompt_tokens"] == len("a\u2028b\x85c".encode())


@QUICK
@given(content=st.binary(min_size=1, max_size=40))
def test_any_file_is_answered_or_refused_in_one_sentence(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(content)
    done = run("run_pa.py", "--input_texts", file, "--max_output_length=1")
    assert done.returncode == 0 or done.stderr.startswith("error: ")


def test_pipes_and_standard_input_are_read(folder, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(TEXT))
    writer.start()
    found = ids(folder, pipe)
    writer.join()
    stdin = io.TextIOWrapper(io.BytesIO(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert ids(folder, "-") == found == ids(folder)
    assert "give it once" in refusal(folder, "--input_texts", "-", "-")


@pytest.mark.parametrize("text", ["请介绍北京/上海。", "答案是3.14", "pi=3.14"])
def test_texts_are_not_taken_for_paths(folder, text):
    assert answer(folder, "--input_texts", text)[1][0]["prompt_tokens"] == len(text.encode())


@pytest.mark.slow("three seconds a process; what a program prints is seen by quick tests")
def test_a_terminal_that_knows_few_characters_and_a_reader_who_leaves(tmp_path):
    """Two real processes: what they print goes through Python's own streams."""
    program, out = ROOT / "scripts" / "run_pa.py", tmp_path / "out.json"
    command = [sys.executable, program, "--input_texts", "é" * 20, "--max_output_length=4"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([*command, f"--output_json={out}"], capture_output=True, env=env)
    assert done.returncode == 0 and out.exists(), done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    out.unlink()
    done = subprocess.run(
        [*command, f"--output_json={out}"], stdout=writer, stderr=subprocess.PIPE, env=env
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and out.exists(), done.stderr


# ---- Model folders -------------------------------------------------------------------------------


def test_the_head_of_a_tied_model_counts_where_it_differs(folder):
    held, before = tensors(folder), ids(folder)
    embed = held["model.embed_tokens.weight"]
    save_file({**held, "lm_head.weight": embed}, folder / "model.safetensors")
    assert ids(folder) == before  # the same twice
    save_file({**held, "lm_head.weight": np.roll(embed, 1, axis=0)}, folder / "model.safetensors")
    found, said = ids(folder)
    assert [i - 1 for i in found[:1]] == before[0][:1]
    assert len(said) == 1 and "the two differ" in said[0]
    converted, back = folder.parent / "converted", folder.parent / "back"
    done = run("hf_to_orbax.py", f"--input_dir={folder}", f"--output_dir={converted}")
    assert done.returncode == 0 and "the two differ" in done.stdout
    done = run("orbax_to_hf.py", f"--input_dir={converted}", f"--output_dir={back}")
    assert done.returncode == 0
    assert ids(converted)[0] == ids(back)[0] == found


@pytest.mark.parametrize("tied", [True, False])
def test_one_tensor_stands_for_both_under_either_name(folder, tied):
    held, before = tensors(folder), ids(folder)
    edit(folder / "config.json", tie_word_embeddings=tied)
    names = "model.embed_tokens.weight", "lm_head.weight"
    for kept, alias in (names, names[::-1]):
        moved = {kept if k == names[0] else k: v for k, v in held.items()}
        save_file(moved, folder / "model.safetensors", metadata={alias: kept})
        assert ids(folder) == before
    if tied:
        save_file(moved, folder / "model.safetensors")
        assert ids(folder) == before


def test_model_safetensors_wins_over_an_index_of_others(folder):
    before = ids(folder)
    save_file({k: 0 * v for k, v in tensors(folder).items()}, folder / "old-1-of-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(folder), "old-1-of-1.safetensors")}
    edit(folder / "model.safetensors.index.json", **index)
    found, said = ids(folder)
    assert found == before[0] and "index.json" in said[0]


def test_adapters_and_quantised_weights_are_refused(folder):
    edit(folder / "adapter_config.json", peft_type="LORA")
    assert "merge it" in refusal(folder, "--input_texts", "a")
    (folder / "adapter_config.json").unlink()
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    for program in ("run_pa.py", "hf_to_orbax.py", "plan.py"):
        arguments = {
            "run_pa.py": [f"--model_path={folder}", "--input_texts", "a"],
            "hf_to_orbax.py": [f"--input_dir={folder}", f"--output_dir={folder.parent / 'out'}"],
            "plan.py": [f"--config={folder / 'config.json'}", "--target=h100-80gb:1"],
        }[program]
        done = run(program, *arguments)
        assert done.returncode == 2 and "config.json says gptq" in done.stderr


def test_scores_that_are_not_numbers_end_the_run(folder):
    held = tensors(folder)
    held["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(held, folder / "model.safetensors")
    assert "not numbers" in refusal(folder, "--input_texts", TEXT)


def test_two_rope_blocks_are_one_or_a_contradiction(folder):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    new = {"rope_type": "default", "rope_theta": 10000.0}
    edit(folder / "config.json", rope_theta=None, rope_parameters=new, rope_scaling=yarn)
    stdout = answer(folder, "--input_texts", TEXT)[0]
    assert "rope yarn, theta 10000, factor 4" in stdout
    for wrong in (
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"factor": 2.0}},
    ):
        edit(folder / "config.json", **wrong)
        assert "rope_scaling says" in refusal(folder, "--input_texts", TEXT)


def test_positions_and_attention_that_are_not_applied_refuse_the_request(folder):
    edit(folder / "config.json", rope_local_base_freq=1e4)
    assert "rope_local_base_freq" in refusal(folder, "--input_texts", TEXT)
    sparse = {"chunk_size": 64, "local_size": 8, "sparse_attention_config": {"0": {}}}
    edit(folder / "config.json", rope_local_base_freq=None, dual_chunk_attention_config=sparse)
    _, said = ids(folder)  # 60 tokens and 4
    assert len(said) == 1 and "sparse_attention_config" in said[0]
    twice = {"type": "linear", "factor": 2.0}
    edit(folder / "config.json", rope_scaling=twice)
    assert "beside linear" in refusal(folder, "--input_texts", TEXT)


def test_fields_of_transformers_base_class_are_not_worth_a_note(folder):
    edit(folder / "config.json", chunk_size_feed_forward=0, return_dict=True, temperature=1.0)
    assert ids(folder)[1] == []
    edit(folder / "config.json", logit_scale=2.0)
    (said,) = ids(folder)[1]
    assert "logit_scale" in said


# ---- Tokenizer folders ---------------------------------------------------------------------------


def test_added_tokens_json_is_read_and_letters_come_out_as_written(folder):
    edit(folder / "added_tokens.json", **{"<|im_start|>": 257, "café": 258})
    found = answer(folder, "--input_texts", "<|im_start|>a")[1]
    assert found[0]["prompt_tokens"] == 2
    from lsjax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("café <|im_start|>")) == "café <|im_start|>"


@pytest.mark.parametrize(
    "flag", [{"add_eos_token": False}, {"add_eos_token": False, "add_bos_token": None}]
)
def test_an_absent_flag_leaves_its_side_alone_and_a_second_bos_is_noted(folder, flag):
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ends = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}}
    template = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text]}
    edit(folder / "tokenizer.json", post_processor=template | {"special_tokens": ends})
    edit(folder / "tokenizer_config.json", bos_token="<|endoftext|>", **flag)
    assert answer(folder, "--input_texts", "ab")[1][0]["prompt_tokens"] == 3
    stdout, results, _ = answer(folder, "--input_texts", "<|endoftext|>ab")
    assert results[0]["prompt_tokens"] == 4 and "twice" in notes(stdout)[0]


def test_answers_end_where_any_file_says(folder):
    tokens, _ = ids(folder, output=8)
    end = tokens[3]
    first = tokens.index(end) + 1
    edit(folder / "config.json", eos_token_id=263)
    for value in (end, [262, end]):
        edit(folder / "generation_config.json", eos_token_id=value)
        assert ids(folder, output=8)[0] == tokens[:first]
    edit(folder / "generation_config.json", eos_token_id="1")
    assert "must be a token id" in refusal(folder, "--input_texts", TEXT)
    edit(folder / "generation_config.json", eos_token_id=262)
    edit(folder / "tokenizer_config.json", eos_token=chr(end) if end < 128 else None)
    assert ids(folder, output=8)[0] == tokens[:first]


def test_a_document_ends_in_training_where_an_answer_does(folder):
    from lsjax.training.config import find_model_source

    edit(folder / "config.json", eos_token_id=None)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert find_model_source(str(folder), None, None, None).vocabulary().end == 256
        edit(folder / name, eos_token_id=None)  # now the tokenizer says it alone


OPTIONAL = ["generation_config.json", "tokenizer_config.json", "retrieval_heads.json"]


@settings(QUICK, max_examples=8)
@given(st.sets(st.sampled_from([*OPTIONAL, "tokenizer.json"])))
def test_any_files_may_be_missing(tmp_path_factory, missing):
    folder = shutil.copytree(shipped_model_path(), tmp_path_factory.mktemp("some") / "model")
    for name in missing:
        (folder / name).unlink()
    _, results, error = answer(folder, "--input_texts", TEXT)
    assert bool(results) == ("tokenizer.json" not in missing) == (not error)


# ---- Sampling ------------------------------------------------------------------------------------


def test_the_publishers_sampling_is_noted_and_can_be_taken(folder):
    suggested = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3}
    edit(folder / "generation_config.json", **suggested)
    (said,) = ids(folder)[1]
    assert "temperature 0.7, top_k 20, repetition_penalty 1.3" in said and "--sampling auto" in said
    flags = ["--temperature=0.7", "--top_k=20", "--repetition_penalty=1.3"]
    by_flags, by_file = (
        answer(folder, "--input_texts", TEXT, *given, output=12)
        for given in (flags, ["--sampling=auto"])
    )
    assert by_flags[1] == by_file[1] and not notes(by_file[0])
    edit(folder / "generation_config.json", temperature="hot")
    assert "'temperature'" in refusal(folder, "--input_texts", TEXT)
    edit(folder / "generation_config.json", temperature=1.0, num_beams=4)
    assert any("num_beams" in note for note in notes(answer(folder, "--input_texts", TEXT)[0]))


@pytest.mark.parametrize("extreme", ["--temperature=1e-40", "--temperature=1e-30"])
def test_next_to_no_temperature_is_greedy(folder, extreme):
    found = answer(folder, "--input_texts", TEXT, extreme, "--top_k=99999999999999")[1]
    assert found[0]["token_ids"] == ids(folder)[0]


def test_an_answer_ends_before_a_stop_string(folder):
    whole = answer(folder, "--input_texts", TEXT, output=6)[1][0]["text"]
    stdout, (result,), _ = answer(folder, "--input_texts", TEXT, f"--stop={whole[3:5]}", output=6)
    assert result["text"] == whole[:3] and result["finish_reason"] == "stop"
    assert f"\n{whole[:3]}\n" in stdout


def test_what_is_too_long_says_how_long_it_may_be(folder):
    error = refusal(folder, "--input_texts", TEXT, "--max_output_length=500")
    assert "at most 452 tokens of output" in error


def test_help_lists_every_flag():
    for program in ("run_pa.py", "eval_needle.py", "train.py"):
        done = run(program, "--help")
        shown = done.stdout + done.stderr
        for flag in ("--mesh", "--coordinator_address", "--dtype", "--model_path"):
            assert flag in shown.replace("--[no]", "--"), (program, flag)
