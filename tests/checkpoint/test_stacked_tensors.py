"""Parameters that stack the tensors of a checkpoint, as experts are stored: read, kept, written."""

import dataclasses

import numpy as np
import pytest
from helpers.checkpoints import make_tensors, mesh, write_folder
from safetensors.numpy import load_file

from lsjax.checkpoint import convert_hf_to_orbax, convert_orbax_to_hf, load_parameters
from lsjax.families import Tensor, family_of, read_config
from lsjax.nn.parameters import flatten

NAME = "Qwen2ForCausalLM"
GATE, UP, DOWN = (f"layers_0/mlp/{name}/weight" for name in ("gate", "up", "down"))
FUSED = "model.layers.0.mlp.{}.gate_up"
SINGLE = "model.layers.0.mlp.{}.down"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that stores one layer's MLP row by row, with the rows of two matrices fused."""
    tensors = make_tensors(NAME)
    stored = "model.layers.0.mlp.{}_proj.weight"
    rows = gate, up, down = [tensors.pop(stored.format(x)) for x in ("gate", "up", "down")]
    fused = np.concatenate([gate, up], axis=1)
    tensors |= {FUSED.format(i): row for i, row in enumerate(fused)}
    tensors |= {SINGLE.format(i): row for i, row in enumerate(down)}
    family = family_of(read_config(write_folder(tmp_path / "plain", NAME, make_tensors(NAME))))

    def stacked(config):
        kept = [t for t in family.tensors(config) if not {GATE, UP, DOWN} & set(t.params)]
        kept += [Tensor(FUSED.format(i), (GATE, UP), i) for i in range(len(gate))]
        return (*kept, *(Tensor(SINGLE.format(i), (DOWN,), i) for i in range(len(down))))

    changed = dataclasses.replace(family, tensors=stacked)
    for module in ("hf_checkpoint", "hf_writer"):
        monkeypatch.setattr(f"lsjax.checkpoint.{module}.family_of", lambda _: changed)
    return write_folder(tmp_path / "hf", NAME, tensors, files=3), rows


slow = pytest.mark.slow("shards of four devices are quick")


@pytest.mark.parametrize("mesh_text", ["context=2,model=2", pytest.param("", marks=slow)])
def test_rows_are_stacked_from_files_and_shards(folder, mesh_text):
    path, rows = folder
    seen = []
    found = flatten(
        load_parameters(path, read_config(path), mesh(mesh_text), "float32", seen.append)
    )
    for name, wanted in zip((GATE, UP, DOWN), rows, strict=True):
        np.testing.assert_array_equal(found[name], wanted)
    assert sum(seen) == sum(x.nbytes for x in found.values())


def test_converted_and_back_the_tensors_are_the_same(folder, tmp_path):
    path, _ = folder
    convert_hf_to_orbax(path, tmp_path / "orbax")
    convert_orbax_to_hf(tmp_path / "orbax", tmp_path / "back")
    wanted = {}
    for file in path.glob("*.safetensors"):
        wanted |= load_file(file)
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor)
