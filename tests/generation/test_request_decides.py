"""Scaling that depends on length: resolved per request, for each row of a batch by itself."""

import json

import pytest

from lsjax import UserError
from lsjax.cli import report
from lsjax.inference.request import batches
from lsjax.positions.scaling import override_rope_scaling

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear"}
OUTPUT = 12


def prompt(length):
    return [i * i % 61 for i in range(length)]


def tokens(lm, *prompts):
    return [c.token_ids for c in lm.generate(prompts, OUTPUT, allow_untrained_length=True)]


def scaled(model, name, scaling):
    text = scaling if isinstance(scaling, str) else json.dumps(scaling)
    return model(name, rope_scaling=text, layers=1)


def test_auto_leaves_short_requests_alone_and_scales_long_ones_by_what_they_need(model):
    trained = model("qwen3").config.trained_length
    auto = scaled(model, "qwen3", "auto")
    short, long = prompt(50), prompt(2 * trained)
    factor = (2 * trained + OUTPUT) / trained
    block = YARN | {"factor": factor, "original_max_position_embeddings": trained}
    assert tokens(auto, short) == tokens(model("qwen3", layers=1), short)
    assert tokens(auto, long) == tokens(scaled(model, "qwen3", block), long)
    assert tokens(auto, short, long) == [*tokens(auto, short), *tokens(auto, long)]


def test_auto_settles_each_row_where_rows_lie_on_different_devices(model):
    alone, auto = (
        model("qwen3", mesh=mesh, rope_scaling="auto", layers=1) for mesh in ("", "data=2")
    )
    prompts = prompt(2 * alone.config.trained_length), prompt(50)
    assert tokens(auto, *prompts) == tokens(alone, *prompts)


def test_auto_keeps_the_scaling_that_a_checkpoint_was_trained_with_and_says_so(model, caplog):
    num_full_heads = model("llama_tied_llama3").config
    assert override_rope_scaling(num_full_heads, "auto") == num_full_heads
    assert "auto" in caplog.text and "llama3" in caplog.text


def test_dynamic_counts_the_output_asked_for(model):
    """The frequencies of the whole length hold from the first token on, in every chunk."""
    lm = model("qwen3_dynamic", chunk=16, layers=1)
    trained = lm.config.trained_length
    ids = prompt(trained - 4)
    stretch = 4.0 * (trained - 4 + OUTPUT) / trained - 3.0
    fixed = scaled(model, "qwen3_dynamic", {"rope_type": "ntk", "factor": stretch})
    assert tokens(lm, ids) == tokens(fixed, ids)


def test_longrope_counts_the_output_asked_for(model):
    pairs = model("qwen3").config.rotary_dim // 2
    short, long = [1.0] * pairs, [1.0 + i for i in range(pairs)]
    block = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64}

    def served(length, **factors):
        return tokens(scaled(model, "qwen3", block | factors), prompt(length))

    both = {"short_factor": short, "long_factor": long}
    for length, factor in ((64 - OUTPUT, short), (65 - OUTPUT, long)):
        assert served(length, **both) == served(length, short_factor=factor, long_factor=factor)


def test_one_request_does_not_see_anothers_setting(model):
    lm = scaled(model, "qwen3", "auto")
    before = tokens(lm, prompt(300))
    tokens(lm, prompt(700))
    assert tokens(lm, prompt(300)) == before


@pytest.mark.parametrize(
    ("scaling", "length", "words"),
    [
        ("auto", 20, "leaves requests"),
        ({"rope_type": "dynamic", "factor": 4.0}, 20, "leaves requests"),
        (LINEAR | {"factor": 1.0}, 20, "changes nothing"),
        (LINEAR | {"factor": 1.0}, 600, "changes nothing"),
        (LINEAR | {"factor": 4.0}, 20, "reads better without"),
        (YARN | {"factor": 4.0}, 20, "reads better without"),
        ("auto", 600, None),
        (YARN | {"factor": 4.0}, 600, None),
        ("off", 20, None),
    ],
)
def test_a_scaling_without_effect_or_with_a_cost_says_so(model, scaling, length, words):
    lm = scaled(model, "qwen3", scaling)
    requests = batches(lm.options, [tuple(prompt(length))], OUTPUT, allow_untrained_length=True)
    notes = report.warnings(lm.options, requests)
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


@pytest.mark.parametrize("wrong", ["yarn", "{", "[]", '{"rope_type": "auto"}', '{"factor": 2}'])
def test_wrong_text_is_refused(model, wrong):
    with pytest.raises(UserError, match="rope_scaling"):
        scaled(model, "qwen3", wrong)


@pytest.mark.parametrize("kv, said", [("float32", 0), ("int8", 0), ("int4", 1)])
def test_what_int4_costs_is_said(model, kv, said):
    settings = model("qwen3", kv).options
    requests = batches(settings, [tuple(prompt(20))], OUTPUT)
    assert sum("costs accuracy" in note for note in report.warnings(settings, requests)) == said
