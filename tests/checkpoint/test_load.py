"""Loading: every parameter is the checkpoint's, on any mesh and in any dtype."""

import logging

import jax
import numpy as np
import pytest
from helpers.checkpoints import CONFIGS, make_tensors, mesh, on_each_mesh, write_folder, write_index
from safetensors.numpy import save_file

from lsjax.checkpoint import checkpoint_bytes, load_parameters
from lsjax.families import family_of, read_config
from lsjax.nn.parameters import abstract_parameters, flatten


def load(folder, mesh_text="", dtype="float32", **more):
    config = read_config(folder)
    return flatten(load_parameters(folder, config, mesh(mesh_text), dtype, **more))


def assert_holds(params, config, tensors):
    """Each tensor is its parameters, one below the other."""
    for tensor in family_of(config).tensors(config):
        found = np.concatenate([np.asarray(params.pop(path)) for path in tensor.params])
        np.testing.assert_array_equal(found, tensors[tensor.name])
    assert not params


@pytest.mark.parametrize(
    ("architecture", "mesh_text"),
    on_each_mesh(
        CONFIGS, [[m] for m in ("", "context=2,model=2", "context=3", "context=3,model=2")]
    ),
)
def test_parameters_are_the_tensors_in_their_shardings(tmp_path, architecture, mesh_text):
    tensors = make_tensors(architecture)
    folder = write_folder(tmp_path / "hf", architecture, tensors, files=3)
    config = read_config(folder)
    params = load(folder, mesh_text)
    for path, wanted in abstract_parameters(config, mesh(mesh_text), "float32").items():
        assert params[path].sharding == wanted.sharding, path
    assert_holds(params, config, tensors)


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_is_the_one_asked_for(tmp_path, stored, asked):
    tensors = make_tensors("GlmForCausalLM", stored)
    folder = write_folder(tmp_path / "hf", "GlmForCausalLM", tensors)
    params = load(folder, dtype=asked)
    assert {leaf.dtype for leaf in params.values()} == {jax.numpy.dtype(asked)}
    wanted = {name: tensor.astype(jax.numpy.dtype(asked)) for name, tensor in tensors.items()}
    assert_holds(params, read_config(folder), wanted)


def test_progress_sums_up_to_the_bytes_of_the_checkpoint(tmp_path):
    tensors = make_tensors("Qwen3ForCausalLM")
    total = sum(tensor.nbytes for tensor in tensors.values())
    folder = write_folder(tmp_path / "hf", "Qwen3ForCausalLM", tensors, files=3)
    seen = []
    load(folder, progress=seen.append)
    assert sum(seen) == total == checkpoint_bytes(folder)
    assert len(seen) >= 3


def test_tensors_that_nothing_reads_are_named(tmp_path, caplog):
    tensors = make_tensors("Qwen3ForCausalLM") | {"model.vision.weight": np.ones(3, np.int64)}
    folder = write_folder(tmp_path / "hf", "Qwen3ForCausalLM", tensors)
    with caplog.at_level(logging.WARNING, "lsjax"):
        load(folder)
    (record,) = [r for r in caplog.records if r.name == "lsjax"]
    assert "model.vision.weight" in record.getMessage()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen2ForCausalLM", "lm_head.weight"),
        ("ChatGLMModel", "transformer.rotary_pos_emb.inv_freq"),
    ],
)
def test_tied_head_and_buffers_are_left_out_silently(tmp_path, caplog, architecture, name):
    tensors = make_tensors(architecture)
    folder = write_folder(tmp_path / "hf", architecture, tensors | {name: np.ones((64, 32))})
    with caplog.at_level(logging.WARNING, "lsjax"):
        params = load(folder)
    assert not [r for r in caplog.records if r.name == "lsjax"]
    assert_holds(params, read_config(folder), tensors)


def test_index_decides_between_two_copies_of_a_tensor(tmp_path):
    tensors = make_tensors("Qwen3ForCausalLM")
    folder = write_folder(tmp_path / "hf", "Qwen3ForCausalLM", tensors)
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / "other.safetensors")
    write_index(folder, dict.fromkeys(tensors, "model.safetensors"))
    assert_holds(load(folder), read_config(folder), tensors)
