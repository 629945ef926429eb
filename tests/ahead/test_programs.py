"""A model's own programs, as they would run, compiled for TPUs and GPUs.

Layers are few, so that compiling is quick; each has its own cache, so that shares of the cache
are those of the whole model, or larger.
"""

import dataclasses
import pathlib

import pytest
from targets import mesh_of

from lsjax.cache import CacheSpec
from lsjax.engine import Engine
from lsjax.families import read_config

CONFIGS = pathlib.Path(__file__).parents[1] / "golden" / "configs"
QWEN = pathlib.Path(__file__).parents[2] / "examples" / "qwen2.5-0.5b.json"
GLM = CONFIGS / "glm-4-9b-chat-1m.json"


def compiled(path, layers, mesh, capacity, batch=1):
    config = dataclasses.replace(read_config(path), num_layers=layers, windows=(None,) * layers)
    engine = Engine(config, mesh, "bfloat16", "int8", 512)
    spec = CacheSpec(batch, capacity, "int8", "bfloat16", engine.stripe)
    programs = engine.compile_ahead(spec)
    return spec.nbytes(config) / mesh.size, *(p.memory_analysis() for p in programs)


@pytest.mark.parametrize(
    ("path", "target", "devices", "capacity", "batch"),
    [
        (GLM, "v5e:2x4", 1, 2**17, 1),
        (GLM, "v5e:2x4", 8, 2**20, 1),
        (QWEN, "v5e:2x4", 1, 2**17, 4),
        (GLM, "h100", 1, 2**20 + 2**12, 1),
        (GLM, "h100", 8, 2**20, 1),
        (QWEN, "h100", 1, 2**17, 4),
    ],
)
def test_decode_and_prefill_work_in_the_cache_that_they_are_given(
    path, target, devices, capacity, batch
):
    mesh = mesh_of(target, context=devices)
    cache, prefill, decode = compiled(path, 2, mesh, capacity, batch)
    assert decode.temp_size_in_bytes < 0.1 * cache
    # The cache that comes out lies where the one that went in lay.
    assert decode.alias_size_in_bytes >= cache
    assert prefill.alias_size_in_bytes >= cache
