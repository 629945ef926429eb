"""The tokens of a prompt depend on the prompt: not on chunks, neighbours, history or devices."""

import functools

import numpy as np
import pytest
from helpers.golden_models import BLOCK

from lsjax import UserError
from lsjax.distributed.sharding import check_fits_mesh, make_mesh

LENGTH, OUTPUT = 61, 24
# A quantized cache is read from the second block of positions on.
LONGER = {"float32": 0, "int8": BLOCK, "int4": BLOCK}
# Chunks meet each format of the cache, with a window and without. Families differ in what comes
# before and after.
slow = functools.partial(pytest.param, marks=pytest.mark.slow("a window over int8 is quick"))
CHUNKED = [
    ("qwen2_window", "int8", 7),
    slow("qwen2_window", "int8", 1),
    slow("glm4", "float32", 1),
    slow("glm4", "int4", 7),
]
# Rows of a batch meet these too, and rotary tables that differ.
BATCHED = [("qwen2_window", "int8"), slow("qwen3_dynamic", "float32")]


def prompt(seed, length=LENGTH, vocab=64):
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def tokens(lm, prompts, **options):
    """Greedy tokens; with the same room for prompts in all tests, so that they share programs."""
    room = {"max_input_length": LONGER[lm.options.kv_cache_dtype] + 200}
    done = lm.generate(prompts, OUTPUT, allow_untrained_length=True, **room | options)
    return [c.token_ids for c in done]


def step_by_step(lm, ids):
    """Greedy tokens from the logits of ever longer prompts, each run whole: no cache is reused."""
    ids = list(ids)
    for _ in range(6):
        ids.append(int(lm.logits([ids])[0, -1].argmax()))
    return tuple(ids[-6:])


@pytest.mark.parametrize(("name", "kv", "chunk"), CHUNKED)
def test_whatever_the_chunk(model, name, kv, chunk):
    text = [prompt(1, LONGER[kv] + LENGTH)]
    usual, other = (tokens(model(name, kv, size, layers=2), text) for size in (64, chunk))
    assert other == usual


@pytest.mark.parametrize(("name", "kv"), BATCHED)
def test_whatever_the_batch_beside_it(model, name, kv):
    """Three rows, and then one with two that fill the batch up."""
    lm, more = model(name, kv, layers=2), LONGER[kv]
    prompts = [prompt(3, more + 61), prompt(4, 5), prompt(5, more + 150), prompt(6, 64)]
    alone = [tokens(lm, [p])[0] for p in prompts]
    assert tokens(lm, prompts, max_batch_size=3) == alone


@pytest.mark.parametrize(
    ("name", "kv"),
    [("llama_tied_llama3", "float32"), slow("glm4", "int4")],
)
def test_generation_is_the_argmax_of_the_logits(model, name, kv):
    """Covers the case that a quantized cache's block ends within the answer."""
    lm, ids = model(name, kv), prompt(2, max(70, LONGER[kv] - 3))
    assert tokens(lm, [ids])[0][:6] == step_by_step(lm, ids)


def test_whatever_the_segment(model):
    usual = tokens(model("glm4"), [prompt(13)])
    for segment in (1, OUTPUT):
        assert tokens(model("glm4", segment=segment), [prompt(13)]) == usual


def test_whatever_was_asked_before(model):
    lm = model("qwen3_dynamic", chunk=16)
    first = tokens(lm, [prompt(7)])
    tokens(lm, [prompt(8, 200)])
    assert tokens(lm, [prompt(7)]) == first


slow_drafts = pytest.mark.slow("drafts over int8 are quick, and few tokens on meshes")


@pytest.mark.parametrize(
    ("drafted", "name", "kv", "mesh"),
    [
        (6, "glm4", "int8", ""),
        *(
            pytest.param(
                *case,
                marks=slow_drafts,
            )
            for case in (
                (1, "qwen2_window", "float32", ""),
                (15, "chatglm", "int4", "context=4"),
                (6, "llama_tied_llama3", "float32", "data=2,context=2,model=2"),
            )
        ),
    ],
)
def test_whatever_is_drafted(model, drafted, name, kv, mesh):
    """Rows that repeat themselves and rows that do not, past a block's end and the answer's."""
    near_a_block_end = (prompt(14, 30) * 40)[: max(LENGTH, LONGER[kv] - 9)]
    prompts = [near_a_block_end, prompt(15, 100), prompt(16, 8) * 6]
    lm = model(name, kv, mesh=mesh, layers=2 if "window" in name else 1)
    usual, done = (
        lm.generate(prompts, OUTPUT, allow_untrained_length=True, prompt_lookup_num_tokens=n)
        for n in (0, drafted)
    )
    assert [c.token_ids for c in done] == [c.token_ids for c in usual]


@pytest.mark.slow("prompts of any length share programs, which is quick")
def test_room_for_longer_prompts_changes_nothing(model):
    lm = model("qwen3")
    assert tokens(lm, [prompt(11)], max_input_length=3000) == tokens(lm, [prompt(11)])


def test_rows_that_fill_a_batch_up_are_not_waited_for(model):
    free = tokens(model("qwen3"), [prompt(12)])[0]
    lm = model("qwen3", mesh="data=2", eos=free[:1])
    (completion,) = lm.generate([prompt(12)], 200, allow_untrained_length=True)
    assert completion.finish_reason == "stop" and len(completion.token_ids) == 1
    assert completion.stats.decode_seconds == 0


def test_a_mesh_by_name_needs_only_the_axes_that_are_split():
    assert dict(make_mesh({"context": 4}).shape) == {"data": 1, "context": 4, "model": 1}
    with pytest.raises(UserError, match="'rows' is not known"):
        make_mesh({"rows": 2})


def test_a_mesh_that_does_not_divide_the_model_is_refused(model):
    with pytest.raises(UserError, match="KV heads cannot be split over model=3; use context=3"):
        check_fits_mesh(model("glm4").config, {"model": 3})
