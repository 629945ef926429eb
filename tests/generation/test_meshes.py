"""Logits and tokens depend neither on how many devices run the model nor on what each one does."""

import functools

import numpy as np
import pytest
from helpers.golden_models import BLOCK, build, mesh_of

# What a mesh sees of a model: a window, ALiBi, an embedding that is the head as well, rotary tables
# for each row, and the float tail of a quantized cache. Heads are as many as every mesh divides,
# more of queries than of keys; and there is one layer, as to a mesh all are alike.
CHANGES = {"num_heads": 8, "num_kv_heads": 4, "layers": 1}
WINDOW, ALIBI, TIED, ROWS = "qwen2_window", "alibi_8_heads", "llama_tied_llama3", "qwen3_dynamic"
# Devices along data, context and model: each model meets each cache, and each of these each axis.
# Weights are in int8 where the name says so.
INT8 = " in int8"
CASES = [
    (WINDOW + INT8, "int8", "212"),
    (ALIBI, "float32", "114"),
    (ROWS, "int8", "222"),
    (ROWS, "float32", "241"),
    (TIED, "int8", "142"),
    (ALIBI, "int8", "222"),
    (TIED + INT8, "float32", "222"),
    (WINDOW, "float32", "142"),
    (ROWS, "int4", "181"),
    # Three divides the rows of the MLP, but not those of attention.
    ("glm4", "float32", "131"),
]
QUICK = [(WINDOW + INT8, "int8", "212"), (ROWS, "float32", "241")]
# Rows of odd lengths that end in different chunks. A quantized cache is read from the second block
# of positions on.
LONG, SHORT, OUTPUT = 61, 37, 5
LONGER = {"float32": 0, "int8": BLOCK, "int4": BLOCK}
# In several chunks, and whole.
CHUNKS = {"float32": (24, 64), "int8": (40, 2 * BLOCK), "int4": (40, 2 * BLOCK)}


def prompt(length):
    return np.random.default_rng(length).integers(0, 64, length).tolist()


def run(name, kv, mesh, chunk):
    """The tokens of two rows and, over a float cache, the logits of two others."""
    mesh = mesh_of(mesh)
    weights = "int8" if name.endswith(INT8) else "auto"
    lm = build(name.removesuffix(INT8), kv, chunk, mesh, weight_dtype=weights, **CHANGES)
    prompts = [prompt(LONGER[kv] + LONG), prompt(SHORT)]
    tokens = [c.token_ids for c in lm.generate(prompts, OUTPUT, allow_untrained_length=True)]
    rows = [prompt(LONG), prompt(LONG)[::-1]]
    return tokens, lm.logits(rows) if kv == "float32" else None


@functools.cache
def on_one_device(name, kv):
    return run(name, kv, "111", CHUNKS[kv][1])


def slow_or_quick(case):
    reason = "five seconds of compiling each; QUICK has each axis"
    marks = [] if case in QUICK else [pytest.mark.slow(reason)]
    return pytest.param(*case, marks=marks)


@pytest.mark.parametrize(("name", "kv", "mesh"), [slow_or_quick(case) for case in CASES])
def test_whatever_the_mesh(name, kv, mesh):
    chunk = CHUNKS[kv][CASES.index((name, kv, mesh)) % 2]
    tokens, logits = run(name, kv, mesh, chunk)
    expected, expected_logits = on_one_device(name, kv)
    assert tokens == expected
    if kv == "float32":
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-5)
