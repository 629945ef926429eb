"""Small models to generate with: the golden ones, whose weights follow from their names."""

import copy
import dataclasses
import functools
import gc
import json
import pathlib

import jax
import pytest
from blocks import BLOCK
from golden.models.parameters import golden_parameters

from lsjax.cache import kv_cache, whole_stripes
from lsjax.families import parse_config
from lsjax.language_model import LanguageModel
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.positions.scaling import override_rope_scaling
from lsjax.settings import Settings
from lsjax.sharding import make_mesh, parse_mesh, place


@pytest.fixture(scope="module", autouse=True)
def _short_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "BLOCK", BLOCK)
        yield


GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {file.parent.name: file for file in GOLDEN.glob("models/*/config.json")}
CONFIGS |= {file.stem: file for file in GOLDEN.glob("baichuan/*.json")}


def build(name, kv="float32", chunk=64, mesh="", rope_scaling=None, eos=(), layers=0, **changes):
    """A golden model: its last layers alone if a number is given, its config with changes.

    Those that differ in where an answer ends, or on one device in chunks, share their programs.
    """
    context = parse_mesh(mesh)["context"]
    chunk = whole_stripes(chunk, context)
    lm = loaded(name, kv, chunk if context > 1 else None, mesh, rope_scaling, layers, **changes)
    lm = copy.copy(lm)
    eos = frozenset(eos)
    lm.settings = dataclasses.replace(lm.settings, prefill_chunk=chunk, eos_token_ids=eos)
    return lm


# A few at a time: the compiled programs of a model take many of a process's memory mappings.
@functools.lru_cache(maxsize=8)
def loaded(name, kv, chunk, mesh, rope_scaling, layers, **changes):
    config = parse_config(json.loads(CONFIGS[name].read_text()))
    config = dataclasses.replace(override_rope_scaling(config, rope_scaling), **changes)
    windows = config.windows[-layers:]
    config = dataclasses.replace(config, num_layers=len(windows), windows=windows)
    devices = make_mesh(parse_mesh(mesh))
    folder = str(CONFIGS[name].parent)
    settings = Settings(folder, config, devices, "float32", kv, chunk or 1, frozenset())
    params = golden_parameters(config)
    wanted = unflatten(abstract_parameters(config, devices, "float32"))
    placed = jax.tree.map(lambda x, leaf: place(x, leaf.sharding), params, wanted)
    return LanguageModel(settings, placed)


@pytest.fixture
def model():
    """model(name, kv, chunk, mesh, rope_scaling, eos, layers, **changes) -> LanguageModel."""
    yield build
    gc.collect()
