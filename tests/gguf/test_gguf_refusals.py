"""What a GGUF file says that a Hugging Face folder cannot hold is refused in one sentence."""

import os
import sys

import numpy as np
import pytest
from helpers.gguf_files import golden_config, write_gguf
from helpers.programs import run

import lsjax
from lsjax.checkpoint.gguf import read_gguf
from lsjax.runtime.errors import UserError

RAW = golden_config("qwen3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", RAW)


def program(name, *flags):
    """The sentence of a program that fails."""
    done = run(name, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metadata": {"general.architecture": "gemma3"}}, "the architecture 'gemma3'"),
        ({"metadata": {"general.type": "adapter"}}, "general.type = 'adapter'"),
        ({"metadata": {"{arch}.expert_count": 8}}, "qwen3.expert_count = 8"),
        ({"metadata": {"{arch}.logit_scale": 2.0}}, "sets qwen3.logit_scale"),
        ({"metadata": {"{arch}.attention.value_length": 16}}, "value_length = 16"),
        ({"metadata": {"{arch}.rope.dimension_count": 16}}, "rope.dimension_count = 16"),
        ({"metadata": {"{arch}.attention.sliding_window": 16}}, "sliding_window = 16"),
        ({"metadata": {"{arch}.attention.head_count_kv": [2, 1]}}, "from layer to layer"),
        ({"metadata": {"{arch}.rope.scaling.type": "longrope"}}, "of kind 'longrope'"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "tokenizer of kind 'bert'"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.ones((8, 64))}}, "'blk.0.ffn_gate_inp.weight'"),
        ({"extra": {"blk.2.attn_norm.weight": np.ones(64)}}, "'blk.2.attn_norm.weight'"),
        ({"without": "blk.1.ffn_down.weight"}, "lacks the tensor 'blk.1.ffn_down.weight'"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, given, words):
    path = write_gguf(tmp_path / "model.gguf", RAW, **given)
    with pytest.raises(UserError) as caught:
        read_gguf(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("left", [0.99, 0.5, 0.02, 0.001])
def test_a_file_that_is_cut_off_is_refused(tmp_path, model, left):
    content = model.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(left * len(content))])
    with pytest.raises(UserError, match="cut off or damaged"):
        read_gguf(tmp_path / "cut.gguf")


def test_the_program_refuses_what_does_not_fit(tmp_path, model):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    out = f"--output_dir={tmp_path / 'out'}"
    given = f"--input_dir={model}"
    assert "not empty" in program("gguf_to_hf.py", given, f"--output_dir={taken}")
    assert "holds floats" in program("gguf_to_hf.py", given, out, "--weight_dtype=int8")
    assert "not a GGUF file" in program("gguf_to_hf.py", f"--input_dir={__file__}", out)
    assert "is a GGUF file" in program("hf_to_orbax.py", given, out)
    assert "for GGUF files" in program(
        "hf_to_orbax.py", f"--input_dir={taken}", out, "--dtype=float32"
    )
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(taken) == ["file"]


def test_a_missing_package_is_named_with_its_extra(tmp_path, model, monkeypatch):
    for name in [n for n in sys.modules if n == "gguf" or n.startswith("lsjax.checkpoint.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = program("gguf_to_hf.py", f"--input_dir={model}", f"--output_dir={tmp_path / 'out'}")
    assert "needs gguf" in said and "pip install 'lsjax[gguf]'" in said


def test_a_gguf_file_is_loaded_after_it_is_converted(model):
    command = f"`lsjax-convert --input_dir {model} --output_dir {model.with_suffix('')}`"
    for path in (model, model.parent):  # a download's folder holds the file alone
        with pytest.raises(UserError) as caught:
            lsjax.load(path)
        assert command in str(caught.value)
    assert command in program("run_pa.py", f"--model_path={model}", "--input_ids=1,2")
