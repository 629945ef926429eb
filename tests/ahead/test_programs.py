"""A model's own programs, as they would run, compiled for TPUs and GPUs.

Layers are few, so that compiling is quick; each has its own cache, so that shares of the cache
are those of the whole model, or larger.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from lsjax.cache import CacheSpec, stripe_of
from lsjax.families import read_config
from lsjax.plan import compile_for, find_target, target_mesh

CONFIGS = pathlib.Path(__file__).parents[1] / "golden" / "configs"
QWEN = pathlib.Path(__file__).parents[2] / "examples" / "qwen2.5-0.5b.json"
GLM = CONFIGS / "glm-4-9b-chat-1m.json"


@pytest.mark.parametrize(
    ("path", "target", "devices", "capacity", "batch"),
    [
        (GLM, "v5e:2x4", 1, 2**17, 1),
        (GLM, "v5e:2x4", 8, 2**20, 1),
        (QWEN, "v5e:2x4", 1, 2**17, 4),
        (GLM, "h100-80gb:8", 1, 2**20 + 2**12, 1),
        (GLM, "h100-80gb:8", 8, 2**20, 1),
        (QWEN, "h100-80gb:8", 1, 2**17, 4),
    ],
)
def test_decode_and_prefill_work_in_the_cache_that_they_are_given(
    path, target, devices, capacity, batch
):
    mesh = target_mesh(find_target(target), {"context": devices})
    config = dataclasses.replace(read_config(path), num_layers=2, windows=(None, None))
    spec = CacheSpec(batch, capacity, "int8", "bfloat16", stripe_of(512, devices))
    needs = compile_for(config, mesh, "bfloat16", spec, 512)
    cache = spec.nbytes(config) / devices
    assert needs["decode"].temporaries < 0.1 * cache
    # The cache that comes out lies where the one that went in lay.
    assert needs["decode"].cache >= cache and needs["prefill"].cache >= cache


def test_tensor_parallel_decode_leaves_the_embedding_where_it_is():
    config = read_config(CONFIGS / "Llama-3.1-70B-Instruct.json")
    config = dataclasses.replace(config, num_layers=1, windows=(None,))
    mesh = target_mesh(find_target("h100-80gb:8"), {"model": 8})
    spec = CacheSpec(1, 2**17, "int8", "bfloat16")
    needs = compile_for(config, mesh, "bfloat16", spec, 512)
    assert needs["decode"].temporaries < 16 * 2**20  # the table is 2 GiB


def test_a_plan_says_whether_it_fits(tmp_path):
    arguments = {
        "config": CONFIGS.parent / "models" / "qwen2" / "config.json",
        "target": "h100-80gb:1",
        "max_input_length": 100_000,
        "output_json": tmp_path / "plan.json",
    }
    program = pathlib.Path(__file__).parents[2] / "scripts" / "plan.py"
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    bare = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}  # as a user has it
    done = subprocess.run(
        [sys.executable, program, *flags], capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0 and ": fits\n" in done.stdout, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    for of in found["programs"].values():
        assert of["total"] == of["weights"] + of["cache"] + of["temporaries"] < of["capacity"]
