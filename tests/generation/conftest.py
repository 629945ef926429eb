"""Small models to generate with: the golden ones, whose weights follow from their names."""

import functools
import gc
import json
import pathlib

import pytest
from golden.models.parameters import golden_parameters

from lsjax.cache import whole_stripes
from lsjax.families import parse_config
from lsjax.language_model import LanguageModel
from lsjax.positions.scaling import override_rope_scaling
from lsjax.settings import Settings
from lsjax.sharding import make_mesh, parse_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"


# A few at a time: the compiled programs of a model take many of a process's memory mappings.
@functools.lru_cache(maxsize=8)
def build(name, kv="float32", chunk=64, mesh="", rope_scaling=None, eos=()):
    config = parse_config(json.loads((GOLDEN / name / "config.json").read_text()))
    devices = make_mesh(parse_mesh(mesh))
    settings = Settings(
        folder=str(GOLDEN / name),
        config=override_rope_scaling(config, rope_scaling),
        mesh=devices,
        dtype="float32",
        kv_cache_dtype=kv,
        prefill_chunk=whole_stripes(chunk, devices.shape["context"]),
        eos_token_ids=frozenset(eos),
    )
    return LanguageModel(settings, golden_parameters(config))


@pytest.fixture
def model():
    """model(name, kv, chunk, mesh, rope_scaling, eos) -> LanguageModel, the last few kept."""
    yield build
    gc.collect()
