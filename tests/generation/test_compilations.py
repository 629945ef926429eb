"""What compiles, and what must not compile again."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lsjax import Sampling
from lsjax.inference.sharded_model import forget_compiled_programs

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
    lm = model("qwen2_tied", chunk=64)
    assert compilations(lm, LENGTH) == 3  # prefill, first token, decode
    assert compilations(lm, 100) == 0


def test_engines_of_one_model_share_their_programs(model):
    assert compilations(model("qwen3"), 100) == 3
    assert compilations(model("qwen3"), 100) == 0
    scaled = model("qwen3").with_rope_scaling({"rope_type": "linear", "factor": 4.0})
    assert compilations(scaled, 100) == 0
    assert compilations(model("qwen3", kv="bfloat16"), 100) > 0


def test_other_sampling_does_not_compile_again(model):
    lm = model("qwen2_tied", chunk=16)
    compilations(lm, 3, sampling=Sampling(temperature=0.5, seed=1))
    other = Sampling(temperature=1.5, top_k=3, top_p=0.5, seed=2)
    assert compilations(lm, 2, sampling=other) == 0
