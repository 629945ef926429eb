"""What compiles, and what must not compile again."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.deployments import deployment as deployment_of
from helpers.published import CONFIGS, QWEN, with_layers
from jax.experimental.compilation_cache import compilation_cache

from lsjax import Sampling
from lsjax.distributed.sharding import make_mesh
from lsjax.inference.engine import Engine
from lsjax.inference.request import chunks
from lsjax.runtime.compilation import forget_compiled_programs

LENGTH = 1000


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    forget_compiled_programs()
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def compilations(lm, length, output=20, **options):
    """Programs compiled for a prompt of so many tokens, where there is room for LENGTH."""
    prompt = np.arange(length) % lm.config.vocab_size
    options |= {"max_input_length": LENGTH, "allow_untrained_length": True}
    return lm.generate([prompt], output, **options)[0].stats.compilations


def test_prompts_of_any_length_share_their_programs(model):
    lm = model("qwen2_tied", chunk=64, layers=1)
    assert compilations(lm, LENGTH) == 3  # prefill, first token, decode
    assert compilations(lm, 100) == 0


def test_a_short_prompt_and_the_end_of_a_long_one_run_in_a_short_chunk(model):
    assert list(chunks(37, 4096, 0)) == [(0, 64)]
    assert list(chunks(64, 512, 0)) == [(0, 64)]
    assert list(chunks(512, 512, 0)) == [(0, 512)]
    assert list(chunks(1090, 512, 0)) == [(0, 512), (512, 512), (1024, 256)]
    assert list(chunks(1000, 512, 512)) == [(0, 512), (512, 512)]  # of four devices
    assert list(chunks(5, 16, 0)) == [(0, 16)]
    assert list(chunks(9, 512, 0, least=16)) == [(0, 16)]  # of a short question
    assert list(chunks(17, 512, 0, least=16)) == [(0, 64)]
    lm = model("qwen2_tied", chunk=512, layers=1)
    assert compilations(lm, 10) == 3
    assert compilations(lm, 60) == 0
    assert [compilations(lm, n) for n in (700, 100, 513, 650, 1000)] == [2, 0, 0, 0, 0]


def test_engines_of_one_model_share_their_programs(model):
    assert compilations(model("qwen3", layers=1), 100) == 3
    assert compilations(model("qwen3", layers=1), 100) == 0
    scaled = model("qwen3", layers=1).with_rope_scaling({"rope_type": "linear", "factor": 4.0})
    assert compilations(scaled, 100) == 0
    assert compilations(model("qwen3", kv="bfloat16", layers=1), 100) > 0


def test_other_sampling_does_not_compile_again(model):
    lm = model("qwen2_tied", chunk=16, layers=1)
    compilations(lm, 3, sampling=Sampling(temperature=0.5, seed=1))
    other = Sampling(temperature=1.5, top_k=3, top_p=0.5, seed=2)
    assert compilations(lm, 2, sampling=other) == 0


@pytest.mark.parametrize(
    ("path", "most"),
    [
        # The matrices of the MLP have 8.3 MiB each, and the embedding 260 MiB.
        (QWEN, 8),
        # Matrices of an expert have 3 MiB and are widened one at a time; those of all, 1,152 MiB.
        (CONFIGS / "Qwen3-30B-A3B.json", 24),
    ],
)
def test_a_cpu_decodes_without_a_copy_of_a_matrix(path, most):
    deployment = deployment_of((1, 1, 1), "bfloat16", "int8", 512, 1, 256)
    settings = dataclasses.replace(deployment, mesh=make_mesh(""))
    _, decode = Engine(with_layers(path, 1), settings).lower_ahead(deployment.cache_spec_for(2048))
    assert decode.compile().memory_analysis().temp_size_in_bytes < most * 2**20
