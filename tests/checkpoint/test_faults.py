"""A folder that cannot be loaded is refused in one sentence, with the file and the tensor."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from helpers.checkpoints import make_folder, make_tensors, mesh, write_folder
from safetensors.numpy import save_file

from lsjax.checkpoint import checkpoint_bytes, convert_hf_to_orbax, load_parameters
from lsjax.families import read_config
from lsjax.runtime.errors import UserError


def refusal(folder, config=None):
    with pytest.raises(UserError) as caught:
        load_parameters(folder, config or read_config(folder), mesh(), "float32")
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(tmp_path, **tensors):
    """A checkpoint with some tensors replaced, or left out where given None."""
    all_tensors = make_tensors("Qwen3ForCausalLM") | tensors
    kept = {name: tensor for name, tensor in all_tensors.items() if tensor is not None}
    return write_folder(tmp_path / "hf", "Qwen3ForCausalLM", kept)


def test_no_weights(tmp_path):
    folder = make_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


def test_pickle_is_refused_with_the_way_out(tmp_path):
    folder = make_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained(safe_serialization=True)" in message


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_corrupt_index(tmp_path, content):
    folder = make_folder(tmp_path / "hf", files=2)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is corrupt" in refusal(folder)


def test_missing_file_of_the_index(tmp_path):
    folder = make_folder(tmp_path / "hf", files=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(folder)


def test_file_that_lacks_what_the_index_places_there(tmp_path):
    folder = make_folder(tmp_path / "hf", files=2)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    file = raw["weight_map"]["model.norm.weight"]
    raw["weight_map"]["model.norm.weight"] = f"model-0000{3 - int(file[10])}-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    assert "lacks 'model.norm.weight'" in refusal(folder)


def test_missing_tensor(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    assert f"lacks the tensor {name!r}" in refusal(changed(tmp_path, **{name: None}))


def test_misshaped_tensor(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    message = refusal(changed(tmp_path, **{name: np.zeros((47, 32), np.float32)}))
    assert all(part in message for part in ("model.safetensors", name, "[47, 32]", "[48, 32]"))


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_dtype_that_is_no_weight(tmp_path, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    message = refusal(changed(tmp_path, **{name: np.zeros((48, 32), dtype)}))
    assert name in message
    assert "float32, bfloat16, float16" in message


def test_truncated_file_names_the_first_tensor_that_is_cut_off(tmp_path):
    folder = make_folder(tmp_path / "hf")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = "model.layers.0.mlp.up_proj.weight"
    file.write_bytes(content[: start + header[name]["data_offsets"][1] - 1])
    message = refusal(folder)
    assert "model.safetensors is cut off" in message
    assert name in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x10" + bytes(7) + b"{not JSON at all",
        b"\x02" + bytes(7) + b"[]",
        b"\x0c" + bytes(7) + b'{"a": {}}   ',
        b"\x0a" + bytes(7) + b'{"a": [1]}',
    ],
)
def test_corrupt_header(tmp_path, content):
    folder = make_folder(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(content)
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "download it again" in message


def test_tensor_in_two_files(tmp_path):
    folder = make_folder(tmp_path / "hf")
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / "other.safetensors")
    message = refusal(folder)
    assert all(
        p in message for p in ("model.norm.weight", "model.safetensors", "other.safetensors")
    )


def test_folder_without_config_is_no_model(tmp_path):
    folder = make_folder(tmp_path / "hf")
    config = read_config(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder, config)


@pytest.fixture
def converted(tmp_path):
    convert_hf_to_orbax(make_folder(tmp_path / "hf"), tmp_path / "orbax")
    return tmp_path / "orbax"


def test_converted_folder_without_metadata(converted):
    for file in converted.rglob("_METADATA"):
        file.unlink()
    assert "convert the model again" in refusal(converted)


def test_converted_folder_with_empty_params(converted):
    shutil.rmtree(converted / "params")
    (converted / "params").mkdir()
    assert "convert the model again" in refusal(converted)
    with pytest.raises(UserError):
        checkpoint_bytes(converted)


def test_converted_folder_with_damaged_data(converted):
    for file in (converted / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "convert the model again" in refusal(converted)


def test_converted_folder_of_another_shape(converted):
    config = converted / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 64', '"vocab_size": 72'))
    message = refusal(converted)
    assert all(part in message for part in ("embed/weight", "[64, 32]", "[72, 32]"))


def test_converted_folder_that_lacks_a_layer(converted):
    config = converted / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    assert "lacks the parameter 'layers_2/" in refusal(converted)
