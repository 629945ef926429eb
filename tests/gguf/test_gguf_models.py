"""GGUF files become the Hugging Face folders that they were made of."""

import numpy as np
import pytest
from helpers.gguf_files import (
    F16,
    F32,
    GOLDEN,
    Q8_0,
    golden_config,
    hf_tensors,
    write_gguf,
)
from helpers.programs import run
from safetensors.numpy import load_file

import lsjax
from lsjax.checkpoint.gguf import read_gguf
from lsjax.checkpoint.gguf import tensors as gguf_tensors
from lsjax.checkpoint.gguf.config import hf_config
from lsjax.checkpoint.gguf.file import open_gguf
from lsjax.families import parse_config, read_config
from lsjax.runtime.errors import UserError

MODELS = ("llama", "llama_biases", "qwen2_tied", "qwen3", "glm4")


def convert(tmp_path, raw, kind=F32, dtype="float32", **given):
    """Returns the folder and its tensors."""
    read_gguf(write_gguf(tmp_path / "model.gguf", raw, kind, **given), dtype).save_hf(
        tmp_path / "hf"
    )
    return tmp_path / "hf", load_file(tmp_path / "hf" / "model.safetensors")


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, name)


@pytest.mark.parametrize("name", MODELS)
def test_config_and_float32_tensors_come_back_as_they_were(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gguf_tensors, "_BLOCK_BYTES", 2000)  # each tensor comes in many blocks
    raw = golden_config(name)
    folder, found = convert(tmp_path, raw)
    assert_same(found, hf_tensors(raw))
    raw.pop("eos_token_id")  # this file has no tokenizer
    assert read_config(folder) == parse_config(raw)


def test_float16_is_exact_in_float32_and_rounded_once_in_bfloat16(tmp_path):
    raw = golden_config("llama")
    halves = {
        name: values.astype(np.float16).astype(np.float32) if values.ndim > 1 else values
        for name, values in hf_tensors(raw).items()
    }
    _, found = convert(tmp_path, raw, F16)
    assert_same(found, halves)
    read_gguf(tmp_path / "model.gguf").save_hf(tmp_path / "rounded")
    found = load_file(tmp_path / "rounded" / "model.safetensors")
    dtype = found["model.norm.weight"].dtype
    assert dtype.name == "bfloat16"
    assert_same(found, {name: values.astype(dtype) for name, values in halves.items()})
    assert read_config(tmp_path / "rounded").dtype == "bfloat16"


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_q8_0_is_within_half_of_its_step(tmp_path, name):
    raw = golden_config(name)
    seen = []
    model = read_gguf(write_gguf(tmp_path / "model.gguf", raw, Q8_0), "float32")
    model.save_hf(tmp_path / "hf", seen.append)
    assert sum(seen) == model.nbytes
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, values in hf_tensors(raw).items():
        blocks = values.reshape(-1, 32) if values.ndim > 1 else values[:, None]
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127 if values.ndim > 1 else 0
        error = np.abs(found[name].reshape(blocks.shape) - blocks)
        # The step itself is a float16, which is off by 2^-11 of 127 steps.
        assert (error <= step * (0.5 + 127 / 2**11)).all(), name


@pytest.mark.slow("tensors and config, which decide the logits, are compared in quick tests")
@pytest.mark.parametrize(("kind", "limit"), [(F32, 1e-4), (Q8_0, 0.5)])
@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "qwen3", "glm4"])
def test_logits_are_those_of_transformers(tmp_path, name, kind, limit):
    folder, _ = convert(tmp_path, golden_config(name), kind)
    data = np.load(GOLDEN / "models" / name / "logits.npz")
    logits = lsjax.load(folder).logits(data["tokens"])[:, data["positions"]]
    assert np.abs(logits - data["logits"]).max() < limit


def test_the_program_shows_its_progress(tmp_path):
    raw = golden_config("qwen3")
    path = write_gguf(tmp_path / "model.gguf", raw)
    out = tmp_path / "hf"
    done = run("gguf_to_hf.py", f"--input_dir={path}", f"--output_dir={out}", "--dtype=float32")
    assert (done.returncode, "100%" in done.stderr) == (0, True), done.stderr
    assert_same(load_file(out / "model.safetensors"), hf_tensors(raw))


def test_large_models_are_written_in_shards(tmp_path):
    raw = golden_config("qwen3")
    model = read_gguf(write_gguf(tmp_path / "model.gguf", raw), "float32")
    model.save_hf(tmp_path / "hf", max_shard_bytes=40_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: values for path in files for name, values in load_file(path).items()}
    assert_same(found, hf_tensors(raw))


# ---- RoPE scaling and windows --------------------------------------------------------------------

_SCALING = "{arch}.rope.scaling."


def scaling_of(tmp_path, given, raw=None, **more):
    raw = raw or golden_config("qwen2_tied")
    path = write_gguf(tmp_path / "model.gguf", raw, metadata=given, **more)
    return hf_config(open_gguf(path), "float32")["rope_scaling"]


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 64,
                "yarn_beta_fast": 16.0,
                "finetuned": True,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
            },
        ),
        ({"type": "none"}, None),
    ],
)
def test_rope_scaling_is_written_as_hugging_face_writes_it(tmp_path, given, scaling):
    metadata = {_SCALING + key: value for key, value in given.items()}
    assert scaling_of(tmp_path, metadata) == scaling


def llama3_divisors(raw, factor, low, high):
    """What generate_extra_tensors in llama.cpp's conversion/llama.py stores, in float32."""
    dim = raw["head_dim"]
    freqs = 1 / np.float32(raw["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    wavelengths = 2 * np.pi / freqs
    smooth = (8192 / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out = np.where(
        wavelengths < 8192 / high, 1, np.where(wavelengths > 8192 / low, factor, between)
    )
    return out.astype(np.float32)


@pytest.mark.parametrize("parameters", [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (4.0, 2.0, 16.0)])
def test_llama3_is_found_in_the_divisors_of_its_frequencies(tmp_path, parameters):
    raw = golden_config("llama") | {"head_dim": 64, "num_hidden_layers": 1}
    extra = {"rope_freqs.weight": llama3_divisors(raw, *parameters)}
    names = ("factor", "low_freq_factor", "high_freq_factor")
    assert scaling_of(tmp_path, {}, raw, extra=extra) == {
        "rope_type": "llama3",
        "original_max_position_embeddings": 8192,
        **dict(zip(names, parameters, strict=True)),
    }


def test_divisors_of_another_scaling_are_refused(tmp_path):
    raw = golden_config("llama") | {"head_dim": 64, "num_hidden_layers": 1}
    divisors = llama3_divisors(raw, 8.0, 1.0, 4.0)
    divisors[10] *= 1.01
    with pytest.raises(UserError, match="no parameters of llama3"):
        scaling_of(tmp_path, {}, raw, extra={"rope_freqs.weight": divisors})


def test_sliding_layers_are_those_of_the_pattern(tmp_path):
    raw = golden_config("qwen2_window_layer_types")
    window = {
        "{arch}.attention.sliding_window": 12,
        "{arch}.attention.sliding_window_pattern": [True, False, True],
    }
    file = open_gguf(write_gguf(tmp_path / "model.gguf", raw, metadata=window))
    found = parse_config(hf_config(file, "float32"))
    assert found.windows == parse_config(raw).windows == (12, None, 12)
