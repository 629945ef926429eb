"""Logits and tokens depend neither on how many devices run the model nor on what each one does."""

import functools

import numpy as np
import pytest
from helpers.golden_models import BLOCK

FAMILIES = (
    "qwen2_window",
    "qwen3",
    "llama_tied_llama3",
    "glm",
    "glm4",
    "chatglm",
    "alibi_8_heads",
)
# Devices along data, context and model.
MESHES = ("111", "121", "141", "181", "142", "124", "212", "222")
# Heads that every mesh divides, more of queries than of keys; and one layer, as to a mesh all are
# alike.
CHANGES = {"num_heads": 8, "num_kv_heads": 4, "layers": 1}
# Rows of odd lengths that end in different chunks. A quantised cache is read from the second
# block of positions on.
LONG, SHORT, OUTPUT = 61, 37, 5
LONGER = {"float32": 0, "int8": BLOCK}
CHUNKS = {"float32": (24, 64), "int8": (200, BLOCK + 64)}  # in several, and whole


def case(name, kv, mesh, turn):
    """Chunked and whole in turn; one device alone, which is compared with whole, chunked."""
    return name, kv, mesh, CHUNKS[kv][turn % 2 if mesh != "111" else 0]


CASES = [
    *(
        case(name, "float32", mesh, i + j)
        for i, name in enumerate(FAMILIES)
        for j, mesh in enumerate(MESHES)
    ),
    *(case(("qwen2_window", "glm4")[j % 2], "int8", mesh, j // 2) for j, mesh in enumerate(MESHES)),
    # Three divides the rows of the MLP, but not those of attention.
    case("glm4", "float32", "131", 0),
]


def prompt(length):
    return np.random.default_rng(length).integers(0, 64, length).tolist()


def run(model, name, kv, mesh, chunk):
    """The tokens of two rows and, over a float cache, the logits of two others."""
    mesh = "data={},context={},model={}".format(*mesh)
    lm = model(name, kv, chunk, mesh, **CHANGES)
    prompts = [prompt(LONGER[kv] + LONG), prompt(SHORT)]
    tokens = [c.token_ids for c in lm.generate(prompts, OUTPUT, allow_untrained_length=True)]
    rows = [prompt(LONG), prompt(LONG)[::-1]]
    return tokens, lm.logits(rows) if kv == "float32" else None


@functools.cache
def on_one_device(model, name, kv):
    return run(model, name, kv, "111", CHUNKS[kv][1])


@pytest.mark.parametrize(("name", "kv", "mesh", "chunk"), CASES)
def test_whatever_the_mesh(model, name, kv, mesh, chunk):
    tokens, logits = run(model, name, kv, mesh, chunk)
    expected, expected_logits = on_one_device(model, name, kv)
    assert tokens == expected
    if kv == "float32":
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-5)
