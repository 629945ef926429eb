"""Conversions: everything comes back as it was, and what they write loads anywhere."""

import json
import logging

import jax
import numpy as np
import pytest
from helpers.checkpoints import CONFIGS, make_folder, make_tensors, mesh, write_folder
from safetensors.numpy import load_file

from lsjax.checkpoint import (
    checkpoint_bytes,
    convert_hf_to_orbax,
    convert_orbax_to_hf,
    load_parameters,
    tensor_info,
)
from lsjax.families import read_config
from lsjax.nn.parameters import abstract_parameters, flatten


@pytest.fixture
def small_groups(monkeypatch):
    """Arrays arrive in many groups, as those of a large checkpoint do."""
    monkeypatch.setattr(tensor_info, "GROUP_BYTES", 40_000)


def read_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


slow = pytest.mark.slow("of each family a folder that transformers saved is quick")


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(
            architecture,
            dtype,
            marks=[slow] * (architecture in ("LlamaForCausalLM", "Glm4ForCausalLM")),
        )
        for architecture, dtype in zip(CONFIGS, 2 * ("bfloat16", "float16", "float32"), strict=True)
    ],
)
def test_round_trip_is_bit_identical(tmp_path, small_groups, architecture, dtype):
    tensors = make_tensors(architecture, dtype)
    hf = write_folder(tmp_path / "hf", architecture, tensors, files=3)
    convert_hf_to_orbax(hf, tmp_path / "orbax")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=30_000)
    assert_same_bits(read_tensors(tmp_path / "back"), tensors)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    tensors = make_tensors("GlmForCausalLM", "bfloat16")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    convert_hf_to_orbax(write_folder(tmp_path / "hf", "GlmForCausalLM", tensors), tmp_path / "o")
    convert_orbax_to_hf(tmp_path / "o", tmp_path / "back")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_shards_are_small_enough_and_the_index_finds_every_tensor(tmp_path):
    convert_hf_to_orbax(make_folder(tmp_path / "hf"), tmp_path / "orbax")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 1
    contents = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {t: file for file, found in contents.items() for t in found}
    sizes = [sum(t.nbytes for t in found.values()) for found in contents.values()]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(
    ("mesh_text", "dtype"),
    [("", "bfloat16"), ("context=2,model=2", "float32"), ("model=2", "float16")],
)
def test_converted_folder_loads_as_the_original_does(tmp_path, small_groups, mesh_text, dtype):
    hf = make_folder(tmp_path / "hf", "GlmForCausalLM")
    convert_hf_to_orbax(hf, tmp_path / "orbax")
    config, devices = read_config(hf), mesh(mesh_text)
    wanted = flatten(load_parameters(hf, config, devices, dtype))
    seen = []
    found = flatten(load_parameters(tmp_path / "orbax", config, devices, dtype, seen.append))
    assert_same_bits(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, wanted))
    for path, leaf in abstract_parameters(config, devices, dtype).items():
        assert found[path].sharding == leaf.sharding, path
    assert sum(seen) == checkpoint_bytes(tmp_path / "orbax") == checkpoint_bytes(hf)


def test_progress_sums_up_to_the_bytes_of_the_checkpoint(tmp_path, small_groups):
    hf = make_folder(tmp_path / "hf")
    total = checkpoint_bytes(hf)
    there, back = [], []
    convert_hf_to_orbax(hf, tmp_path / "orbax", there.append)
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back", back.append)
    assert sum(there) == sum(back) == total
    assert min(len(there), len(back)) > 1


def test_small_files_are_carried_along_both_ways_and_others_are_named(tmp_path, caplog):
    hf = make_folder(tmp_path / "hf", files=2)
    (hf / "additional_chat_templates").mkdir()
    carried = (
        "tokenizer.model", "merges.txt", "qwen.tiktoken", "chat_template.jinja", "LICENSE",
        "modeling_chatglm.py", "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    left = ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json")
    for name in (*carried, *left, "vocab.xml"):
        (hf / name).write_bytes(name.encode())
    with caplog.at_level(logging.WARNING, "lsjax"):
        convert_hf_to_orbax(hf, tmp_path / "orbax")
    (record,) = [r for r in caplog.records if r.name == "lsjax"]
    assert record.getMessage().endswith("not carried along: vocab.xml")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    for folder, weights in (("orbax", "params"), ("back", "model.safetensors")):
        names = {str(f.relative_to(tmp_path / folder)) for f in (tmp_path / folder).rglob("*")}
        names = {name for name in names if not name.startswith("params/")}
        shared = {"config.json", "tokenizer.json", "generation_config.json"}
        assert names == {weights, "additional_chat_templates", *shared, *carried}
        for name in carried:
            assert (tmp_path / folder / name).read_bytes() == name.encode()


def test_tensors_that_are_dropped_are_named(tmp_path, caplog):
    tensors = make_tensors("Qwen2ForCausalLM") | {"lm_head.weight": np.ones((64, 32), np.float32)}
    hf = write_folder(tmp_path / "hf", "Qwen2ForCausalLM", tensors)
    with caplog.at_level(logging.WARNING, "lsjax"):
        convert_hf_to_orbax(hf, tmp_path / "orbax")
    (record,) = [r for r in caplog.records if r.name == "lsjax"]
    assert "lm_head.weight" in record.getMessage()
