"""Folders as transformers saves them give its greedy tokens: tests/golden/saved/make.py."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lsjax
from lsjax.checkpoint import convert_hf_to_orbax

SAVED = Path(__file__).parents[1] / "golden" / "saved"
FOLDERS = sorted(path.parent.name for path in SAVED.glob("*/config.json"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check(folder, name, **options):
    """Whether the chat gives the prompt and the tokens that it gave in transformers."""
    expected = json.loads((SAVED / name / "expected.json").read_text())
    model = lsjax.load(folder, dtype="float32", **options)
    messages = expected["messages"]
    assert model.tokenizer.render_chat(messages) == expected["rendered"]
    prompt = model.tokenizer.encode_chat(messages)
    assert list(prompt) == expected["prompt"]
    found = model.generate([prompt], max_output_length=24)[0]
    assert (found.token_ids, found.text) == (tuple(expected["tokens"]), expected["text"])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_gives_the_tokens_of_transformers(name):
    check(SAVED / name, name)


@pytest.mark.slow("conversion and meshes are tested with other checkpoints")
def test_so_does_it_converted_and_on_a_mesh(tmp_path):
    name = "glm4_sharded"
    convert_hf_to_orbax(SAVED / name, tmp_path / "converted")
    check(tmp_path / "converted", name, mesh="context=2,model=2")


@pytest.mark.parametrize("stored", ["both", "head", "head and alias"])
@pytest.mark.parametrize("name", [name for name in FOLDERS if name.endswith("_tied")])
def test_a_tied_matrix_is_found_under_either_name(name, stored, tmp_path):
    folder = shutil.copytree(SAVED / name, tmp_path / name)
    held = load_file(folder / "model.safetensors")
    matrix = held[EMBEDDING] if stored == "both" else held.pop(EMBEDDING)
    metadata = {"format": "pt"} | ({EMBEDDING: HEAD} if "alias" in stored else {})
    save_file(held | {HEAD: matrix}, folder / "model.safetensors", metadata)
    found, saved = (lsjax.load(path, dtype="float32") for path in (folder, SAVED / name))
    assert found.config == saved.config
    jax.tree.map(np.testing.assert_array_equal, found.params, saved.params)
