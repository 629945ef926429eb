"""Saving: what one mesh wrote another reads, and a folder appears whole or not at all."""

import os

import numpy as np
import pytest
from helpers.checkpoints import CONFIGS, make_folder, mesh, on_each_mesh

from lsjax import UserError
from lsjax.checkpoint import load_parameters, save_parameters
from lsjax.families import read_config
from lsjax.nn.parameters import abstract_parameters, flatten

MESHES = (("context=4,model=2", "context=8"), ("", "data=2,context=3"), ("context=3", ""))


@pytest.mark.parametrize(
    ("architecture", "saved_on", "restored_on"),
    on_each_mesh(CONFIGS, MESHES),
)
def test_saved_on_one_mesh_restored_on_another(tmp_path, architecture, saved_on, restored_on):
    folder = make_folder(tmp_path / "hf", architecture)
    config = read_config(folder)
    params = load_parameters(folder, config, mesh(saved_on), "bfloat16")
    save_parameters(params, folder, tmp_path / "saved")
    assert read_config(tmp_path / "saved") == config
    there = flatten(load_parameters(tmp_path / "saved", config, mesh(restored_on), "bfloat16"))
    wanted = abstract_parameters(config, mesh(restored_on), "bfloat16")
    for path, value in flatten(params).items():
        assert there[path].sharding == wanted[path].sharding, path
        np.testing.assert_array_equal(np.asarray(there[path]), np.asarray(value), path)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    folder = make_folder(tmp_path / "hf")
    params = load_parameters(folder, read_config(folder), mesh(), "float32")
    before = {name: os.stat(folder / name) for name in os.listdir(folder)}
    with pytest.raises(UserError, match="already exists and is not empty"):
        save_parameters(params, folder, folder)
    assert {name: os.stat(folder / name) for name in os.listdir(folder)} == before
    assert os.listdir(tmp_path) == ["hf"]
