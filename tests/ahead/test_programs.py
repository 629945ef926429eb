"""A model's own programs, as they would run, compiled for TPUs and GPUs.

There is one layer, so that compiling is quick; each has its own cache, so that shares of the cache
are those of the whole model, or larger.
"""

import dataclasses
import re

import pytest
from helpers.deployments import deployment as deployment_of
from helpers.kernels import between_calls
from helpers.published import CONFIGS, GLM, QWEN, with_layers
from helpers.sass import assembled

from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.compression import RazorConfig
from lsjax.inference.engine import Engine
from lsjax.planning import find_target, target_mesh
from lsjax.planning.arithmetic import cache_bytes, hidden_bytes, needs_of
from lsjax.planning.compiled import compile_for

DUAL_CHUNK = CONFIGS / "Qwen2.5-7B-Instruct-1M.json"


@pytest.mark.parametrize(
    ("path", "target", "devices", "length", "batch"),
    [
        (GLM, "v5e:2x4", 8, 2**20, 1),
        (QWEN, "v5e:2x4", 1, 2**17, 4),
        (GLM, "h100-80gb:8", 8, 2**20, 1),
        (QWEN, "h100-80gb:8", 1, 2**17, 4),
        (GLM, "l40s:1", 1, 2**20, 1),
        (GLM, "a100-80gb:1", 1, 2**20, 1),
    ],
)
def test_decode_and_prefill_work_in_the_cache_that_they_are_given(
    path, target, devices, length, batch
):
    config = with_layers(path, 1)
    deployment = deployment_of((1, devices, 1), "bfloat16", "int8", 512, batch, 256)
    needs = compile_for(config, find_target(target), deployment, length)
    cache = deployment.cache_spec_for(length).nbytes(config) / devices
    assert needs["decode"].temporaries < 0.1 * cache
    # The cache that comes out lies where the one that went in lay.
    assert needs["decode"].cache >= cache and needs["prefill"].cache >= cache


def test_sparse_prefill_on_a_gpu_copies_nothing_of_the_cache():
    layers, target = 3, find_target("h100-80gb:1")
    config = with_layers(GLM, layers)
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 4096, 1, 256)
    sparse = dataclasses.replace(deployment, sparse_prefill=SparsePrefill(0.1, first_layers=0))
    needs = compile_for(config, target, sparse, 2**20)
    # The keys of a layer are half of its cache. What is made for tiles is not held for all layers.
    assert needs["prefill"].temporaries < 0.45 * needs["prefill"].cache / layers
    planned = needs_of(config, target.platform, sparse, 2**20)
    assert needs["prefill"].total <= planned["prefill"].total


def test_tensor_parallel_decode_leaves_the_embedding_where_it_is():
    config = with_layers(CONFIGS / "Llama-3.1-70B-Instruct.json", 1)
    deployment = deployment_of((1, 1, 8), "bfloat16", "int8", 512, 1, 256)
    needs = compile_for(config, find_target("h100-80gb:8"), deployment, 2**17)
    assert needs["decode"].temporaries < 16 * 2**20  # the table is 2 GiB


@pytest.mark.as_users_compile
@pytest.mark.parametrize(("target", "mesh"), [("v5e:2x4", (1, 8, 1)), ("h100-80gb:8", (1, 1, 1))])
def test_decode_over_a_compressed_cache_copies_nothing_of_it(target, mesh):
    config = with_layers(GLM, 1)
    compression = RazorConfig().estimate(config, mesh[2])
    deployment = deployment_of(mesh, "bfloat16", "int8", 512, 1, 256, compression)
    needs = compile_for(config, find_target(target), deployment, 2**20)
    whole = dataclasses.replace(deployment, compression=None).cache_spec_for(2**20).nbytes(config)
    cache = needs["decode"].cache
    platform = find_target(target).platform
    assert cache == pytest.approx(cache_bytes(config, platform, deployment, 2**20), rel=0.01)
    assert cache < 0.7 * whole / (mesh[1] * mesh[2])  # one head of two keeps all in a layer
    assert needs["decode"].temporaries < 0.1 * cache
    # Beside it one layer is whole, and all hidden states are there.
    layer = whole / (mesh[1] * mesh[2])
    assert needs["prefill"].temporaries < 1.2 * (layer + hidden_bytes(config, deployment, 2**20))
    # One that compresses as it goes holds a window's copy at most.
    streaming = RazorConfig(streaming=True).estimate(config, mesh[2])
    deployment = dataclasses.replace(deployment, compression=streaming)
    prefill = compile_for(config, find_target(target), deployment, 2**20)["prefill"]
    assert prefill.cache == pytest.approx(cache, rel=0.01)
    assert prefill.temporaries < 0.3 * layer


@pytest.mark.parametrize(
    ("path", "devices", "kv", "window", "views"),
    [
        (QWEN, 1, "int8", None, 1),
        (QWEN, 1, "bfloat16", 4096, 0),
        (QWEN, 8, "int8", None, 1),
        (DUAL_CHUNK, 1, "int8", None, 3),
        (DUAL_CHUNK, 1, "bfloat16", None, 3),
    ],
)
def test_prefill_on_a_gpu_waits_for_the_host_in_one_loop_a_view(path, devices, kv, window, views):
    """The host decides after each iteration whether a loop goes on, unless their number is known to
    the compiler."""
    config = with_layers(path, 1)
    config = dataclasses.replace(
        config, layers=(dataclasses.replace(config.layers[0], window=window),)
    )
    deployment = deployment_of((1, devices, 1), "bfloat16", kv, 4096, 1, 256)
    mesh = target_mesh(find_target(f"h100-80gb:{devices}"), deployment.sizes)
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    length = 1_008_000 if path == DUAL_CHUNK else 2**17
    prefill, _ = engine.lower_ahead(deployment.cache_spec_for(length))
    text = prefill.compile().as_text()
    assert "__cudnn$fmha" in text
    loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
    unknown = [line for line in loops if "known_trip_count" not in line]
    assert len(unknown) == views


@pytest.mark.as_users_compile
def test_a_layer_of_decode_on_a_gpu_is_a_short_chain_of_kernels(tmp_path):
    """Each kernel of a chain costs a few microseconds, however little it does."""
    config = with_layers(GLM, 2)
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 512, 1, 256)
    mesh = target_mesh(find_target("h100-80gb:1"), deployment.sizes)
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    _, decode = engine.lower_ahead(deployment.cache_spec_for(2**17))
    program = decode.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    kernels, chain = between_calls(program.as_text(), "decode_attention")
    print(f"longest chain {len(chain)} of {len(kernels)} kernels")
    assert len(kernels) <= 17
    assert len(chain) <= 12
    for name in "write_token", "decode_attention", "merge_splits":
        print(name, kernel := assembled(tmp_path, name))
        assert kernel.spilled == 0


@pytest.mark.parametrize(
    ("path", "layers", "target", "mesh"),
    [
        (GLM, 1, "v5e:2x4", (1, 4, 2)),
        (GLM, 1, "h100-80gb:1", (1, 1, 1)),
        (CONFIGS / "Qwen3.5-9B.json", 4, "h100-80gb:1", (1, 1, 1)),  # the fourth has attention
    ],
)
def test_rows_of_a_document_copy_nothing_of_it(path, layers, target, mesh):
    config, target = with_layers(path, layers), find_target(target)
    deployment = deployment_of(mesh, "bfloat16", "int8", 256, 8, 256)
    deployment = dataclasses.replace(deployment, document_length=1_044_480)
    compiled = compile_for(config, target, deployment, 3840)
    guessed = needs_of(config, target.platform, deployment, 3840)
    held = guessed["read"].cache
    assert compiled["decode"].temporaries < 0.1 * held
    assert compiled["prefill"].temporaries < held
    for name, needs in compiled.items():
        assert guessed[name].cache == pytest.approx(needs.cache, rel=0.02), name
        assert guessed[name].weights == pytest.approx(needs.weights, rel=0.02), name


@pytest.mark.parametrize("target", ["v5e:2x4", "h100-80gb:1"])
def test_decode_copies_no_experts(target):
    config, target = with_layers(CONFIGS / "Qwen3-30B-A3B.json", 1), find_target(target)
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 512, 1, 256)
    mesh = target_mesh(target, deployment.sizes)
    engine = Engine(config, dataclasses.replace(deployment, mesh=mesh))
    _, decode = engine.lower_ahead(deployment.cache_spec_for(2**17))
    # The eight experts of a token are 75 MB, and those of a layer 1.2 GB.
    assert decode.compile().memory_analysis().temp_size_in_bytes < 8 * 2**20
