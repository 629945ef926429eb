"""Plans against the compilers that they speak for: arithmetic is near, and the longest is tight.

Layers are few, so that compiling is quick; then temporaries, which arithmetic has to guess, are a
larger share than in a whole model.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.deployments import deployment as deployment_of
from helpers.published import CONFIGS, GLM, QWEN, with_layers

import lsjax
from lsjax.compression import RazorConfig
from lsjax.planning import find_target
from lsjax.planning.arithmetic import cache_bytes, needs_of
from lsjax.planning.compiled import TooLargeError, compile_for
from lsjax.planning.result import fits

QWEN3 = CONFIGS / "Qwen3-8B.json"
DUAL_CHUNK = CONFIGS / "Qwen2.5-7B-Instruct-1M.json"
QWEN3_5 = CONFIGS / "Qwen3.5-9B.json"
QWEN3_MOE = CONFIGS / "Qwen3-30B-A3B.json"
LLAMA = CONFIGS / "Llama-3.1-70B-Instruct.json"


@pytest.mark.parametrize(
    ("path", "target", "mesh", "length", "chunk", "kv", "batch"),
    [
        (GLM, "v5e:2x4", (1, 8, 1), 1_048_576, 16384, "int8", 1),
        (GLM, "a100-80gb:4", (1, 2, 2), 300_001, 8192, "bfloat16", 1),
        pytest.param(
            *(QWEN, "v5e:2x4", (2, 2, 2), 524_288, 4096, "int8", 4),
            marks=pytest.mark.as_users_compile,
        ),
        (QWEN, "l40s:1", (1, 1, 1), 131_072, 4096, "int4", 8),
        (QWEN3, "v6e:2x4", (1, 1, 8), 131_072, 4096, "int8", 2),
        (QWEN3, "h200:1", (1, 1, 1), 500_000, 16384, "bfloat16", 1),
        (LLAMA, "v5p:2x2x2", (1, 8, 1), 131_072, 4096, "int8", 1),
        (LLAMA, "h100-80gb:8", (1, 1, 8), 131_072, 8192, "int8", 4),
        (DUAL_CHUNK, "h100-80gb:1", (1, 1, 1), 1_008_000, 4096, "int8", 1),
        (DUAL_CHUNK, "v5e:2x4", (1, 2, 4), 1_008_000, 4096, "int8", 1),
        (QWEN3_5, "h100-80gb:1", (1, 1, 1), 261_120, 4096, "int8", 1),
        (QWEN3_5, "l40s:1", (1, 1, 1), 261_120, 4096, "int8", 1),
        (QWEN3_MOE, "h100-80gb:1", (1, 1, 1), 261_120, 4096, "int8", 1),
        (QWEN3_MOE, "v5e:2x4", (1, 2, 4), 261_120, 4096, "int8", 1),
    ],
)
def test_arithmetic_is_within_a_tenth_of_the_compiler(path, target, mesh, length, chunk, kv, batch):
    # The fourth layer of Qwen3.5 is the first of attention.
    target, config = find_target(target), with_layers(path, 4 if path == QWEN3_5 else 3)
    deployment = deployment_of(mesh, "bfloat16", kv, chunk, batch, 1024)
    guessed = needs_of(config, target.platform, deployment, length)
    for name, compiled in compile_for(config, target, deployment, length).items():
        assert guessed[name].total == pytest.approx(compiled.total, rel=0.1), name


def test_prefill_layer_by_layer_needs_what_its_largest_layer_does():
    """Three layers are recurrent, and one is of attention."""
    target, config = find_target("h100-80gb:1"), with_layers(QWEN3_5, 4)
    razor = RazorConfig().estimate(config, 1)
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 4096, 1, 1024, razor)
    guessed = needs_of(config, target.platform, deployment, 261_120)
    for name, compiled in compile_for(config, target, deployment, 261_120).items():
        assert guessed[name].total == pytest.approx(compiled.total, rel=0.1), name


def test_temporaries_of_prefill_are_those_of_one_layer():
    """XLA would hold the results of loops and the convolution's inputs of all recurrent layers."""
    target, config = find_target("h100-80gb:1"), with_layers(QWEN3_5, 12)
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 4096, 1, 256)
    guessed = needs_of(config, target.platform, deployment, 8192)["prefill"]
    compiled = compile_for(config, target, deployment, 8192)["prefill"]
    assert compiled.temporaries < 1.1 * guessed.temporaries


@pytest.mark.parametrize(("target", "mesh"), [("h100-80gb:1", (1, 1, 1)), ("v5e:2x4", (1, 4, 2))])
def test_with_int8_weights_too_and_no_matrix_of_floats_in_decode(target, mesh):
    target, config = find_target(target), with_layers(GLM, 2)
    deployment = deployment_of(mesh, "bfloat16", "int8", 4096, 1, 1024)
    deployment = dataclasses.replace(deployment, weight_dtype="int8")
    guessed = needs_of(config, target.platform, deployment, 1_047_552)
    compiled = compile_for(config, target, deployment, 1_047_552)
    for name, needs in compiled.items():
        assert guessed[name].total == pytest.approx(needs.total, rel=0.1), name
    # A device's part of an MLP matrix in bfloat16.
    matrix = 2 * config.intermediate_size * config.hidden_size // (mesh[1] * mesh[2])
    assert compiled["decode"].temporaries < matrix
    # What prefill holds with float weights, and one matrix that is gathered over the context axis.
    assert compiled["prefill"].temporaries < guessed["prefill"].temporaries + mesh[1] * matrix


@pytest.mark.parametrize("target", ["v5e:1x1", "h100-80gb:1"])
def test_the_longest_fits_and_five_percent_more_does_not(target):
    config = with_layers(GLM, 1)
    options = {"max_batch_size": 9, "kv_cache_dtype": "bfloat16", "allow_untrained_length": True}
    plan = lsjax.plan(config, target, compile=True, **options)
    assert plan.limited_by == "memory" and plan.compiled
    assert plan.length == plan.max_length and plan.fits
    # That is the compiler's word, and on programs for that very length.
    cache = cache_bytes(config, plan.target.platform, plan.deployment, plan.max_length)
    assert plan.programs["decode"].cache == pytest.approx(cache, rel=0.01)
    try:
        more = compile_for(config, plan.target, plan.deployment, int(1.05 * plan.max_length))
    except TooLargeError:
        return
    assert not fits(plan.target, more)


def test_the_program_asks_the_compiler(tmp_path):
    program = pathlib.Path(__file__).parents[2] / "scripts" / "plan.py"
    config = CONFIGS.parent / "models" / "qwen2" / "config.json"
    flags = [
        f"--config={config}",
        "--target=h100-80gb:1",
        "--max_output_length=16",
        f"--output_json={tmp_path / 'p.json'}",
    ]
    bare = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}  # as a user has it
    done = subprocess.run(
        [sys.executable, program, *flags, "--compile"], capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["fits"] and found["compiled"]
    for of in found["programs"].values():
        assert of["total"] == of["weights"] + of["cache"] + of["temporaries"] < of["capacity"]
