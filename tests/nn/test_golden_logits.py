"""The decoder against transformers: golden/models/make.py made the logits."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.models.cases import CASES
from golden.models.parameters import golden_parameters

from lsjax.cache import CacheSpec, empty_cache
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh, parse_mesh
from lsjax.families import parse_config
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import rotary_tables

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
LIMIT = 1e-4

# One of each mechanism that a cache could get wrong.
CACHED = ("qwen2_tied", "qwen2_window_layer_types", "chatglm_1m")
CHUNKED = ("qwen2_window", pytest.param("chatglm", marks=pytest.mark.slow("a window is quick")))
# Each kind of scaling, at four times the length that it stretches, and the chunks that it is run
# in. A kind changes tables, not programs: models of one family share theirs.
STRETCHED = {
    "qwen2_yarn_type": 1,
    "qwen3_yarn_mscale": 64,
    "qwen3_dynamic": 64,
    "llama_yarn_untruncated": 7,
    "llama_linear_type": 7,
    "llama_tied_llama3": 256,
    "glm_yarn": 64,
    "glm4_dynamic_v5": 1,
    "chatglm_linear": 7,
}


@functools.cache
def golden(name):
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    config = parse_config(raw)
    return config, golden_parameters(config), np.load(GOLDEN / name / "logits.npz")


@functools.partial(jax.jit, static_argnums=(0, 6))
def step(decoder, variables, tables, tokens, positions, cache, decode):
    """Models that differ in their tables share it."""
    hidden, cache = decoder.apply(variables, tokens, positions, tables, cache, decode=decode)
    return decoder.apply(variables, hidden, method="logits"), cache


def difference(name, cache_dtype=None, chunks=(), mesh=""):
    """Largest difference from the golden logits.

    `chunks` are the sizes that the sequence is run in; the rest of it goes one by one.
    """
    config, params, data = golden(name)
    tokens = data["tokens"]
    batch, length = tokens.shape
    devices = parse_mesh(mesh)["context"]
    decoder = Decoder(config.traced, make_mesh(parse_mesh(mesh)), jnp.dtype("float32"))
    tables = rotary_tables(config, [length])
    cache = None
    if cache_dtype is not None:
        zigzag = zigzag_of(chunks[0] if chunks else 1, devices)
        spec = CacheSpec(batch, -(-length // 8) * 8, cache_dtype, "float32", zigzag)
        cache = empty_cache(config, spec)

    parts = []
    sizes = [*chunks, *[1] * (length - sum(chunks))]
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        order = np.arange(size)
        if size > 1 and devices > 1:
            order = zigzag.permutation(size)
        at = end - size + order
        positions = np.broadcast_to(at, (batch, size))
        inputs = tokens[:, at], positions, cache
        logits, cache = step(decoder, {"params": params}, tables, *inputs, size == 1)
        parts.append(np.asarray(logits)[:, np.argsort(order)])
    logits = np.concatenate(parts, axis=1)[:, data["positions"]]
    return np.max(np.abs(logits - data["logits"]))


def length_of(name):
    return CASES[name][1]


def test_every_golden_folder_is_tested():
    folders = {file.parent.name for file in GOLDEN.glob("*/config.json")}
    assert folders == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_whole_sequence(name):
    assert difference(name, chunks=[length_of(name)]) < LIMIT


@pytest.mark.parametrize("name", CACHED)
def test_prefill_into_a_cache(name):
    assert difference(name, "float32", [length_of(name)]) < LIMIT


@pytest.mark.parametrize("name", CHUNKED)
def test_prefill_in_chunks_and_then_token_by_token(name):
    assert difference(name, "float32", [7] * (length_of(name) // 14)) < LIMIT


@pytest.mark.parametrize(("name", "chunk"), STRETCHED.items())
def test_four_times_the_original_length(name, chunk):
    config, _, data = golden(name)
    length = data["tokens"].shape[1]
    original = config.rope_scaling.original_length or config.max_position_embeddings
    assert length == 4 * original
    assert difference(name, "float32", [chunk] * (length // chunk)) < LIMIT


@pytest.mark.slow("two stretched models run token by token from the first")
def test_token_by_token_from_the_first():
    assert difference("qwen3_window", "float32") < LIMIT


@pytest.mark.slow("tests of generation have meshes, each against one device")
def test_split_over_a_mesh():
    chunks = [8] * (length_of("qwen2_window") // 16)
    assert difference("qwen2_window", "float32", chunks, "data=2,context=2,model=2") < LIMIT
