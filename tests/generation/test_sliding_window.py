"""Layers with a sliding window keep their window only, and answer as if they kept everything."""

import dataclasses
import json
from pathlib import Path

import pytest

import lsjax
from lsjax.config import LayerKind
from lsjax.families import parse_config

PROMPTS = [list(range(1, 61)) * 6, list(range(40, 90)), list(range(7, 27)) * 17]


@pytest.mark.slow("tests/attention has rolling caches of each format, on meshes and in decode")
def test_tokens_are_those_of_a_cache_that_never_rolls(model):
    """With chunks of 1,024 the cache of a layer holds all of the texts; with 16, 256 tokens."""
    options = {"ignore_eos": True, "allow_untrained_length": True}
    whole, rolling = (
        model("qwen2_window", kv="int8", chunk=chunk, layers=2).generate(PROMPTS, 24, **options)
        for chunk in (1024, 16)
    )
    assert [c.token_ids for c in rolling] == [c.token_ids for c in whole]
    assert rolling[0].stats.cache_bytes < whole[0].stats.cache_bytes
    lookup = model("qwen2_window", kv="int8", chunk=16, layers=2).generate(
        PROMPTS, 24, prompt_lookup_num_tokens=5, **options
    )
    assert [c.token_ids for c in lookup] == [c.token_ids for c in whole]


def test_three_of_four_windowed_layers_take_less_than_three_tenths():
    raw = json.loads(Path("tests/golden/configs/Qwen2.5-7B-Instruct.json").read_text())
    raw |= {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 4096}
    config = parse_config(raw | {"max_window_layers": 1})
    assert config.windows == (None, 4096, 4096, 4096)
    whole = dataclasses.replace(config, layers=(LayerKind(),) * 4)
    plans = [
        lsjax.plan(c, "h100-80gb:1", max_input_length=131072, allow_untrained_length=True,
                   kv_cache_dtype="bfloat16", prefill_chunk=4096)
        for c in (config, whole)
    ]  # fmt: skip
    planned = [plan.programs["decode"].cache for plan in plans]
    assert planned[0] < 0.3 * planned[1]
    spec = plans[0].deployment.cache_spec_for(131072)
    assert spec.nbytes(config) < 0.3 * spec.nbytes(whole)
