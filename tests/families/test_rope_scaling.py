"""The rope_scaling block of config.json."""

import pytest

from lsjax.config import RopeScaling
from lsjax.positions.scaling import KINDS, parse_rope_scaling
from lsjax.runtime.errors import UserError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BLOCKS = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4},
    "yarn": {"factor": 4.0},
    "ntk": {"factor": 4},
    "longrope": {"short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0]},
    "llama3": LLAMA3,
    "dual_chunk": {"chunk_size": 64, "local_size": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings_of_the_kind(kind):
    block = BLOCKS[kind]
    scaling = parse_rope_scaling({"rope_type": kind} | block, 4096)
    assert scaling.kind == kind
    assert scaling == parse_rope_scaling({"type": kind} | block, 4096)
    assert scaling == parse_rope_scaling({"type": kind, "rope_type": kind} | block, 4096)


@pytest.mark.parametrize("block", [None, {}, {"rope_theta": 1e6}, {"rope_type": "default"}])
def test_no_scaling(block):
    assert parse_rope_scaling(block, 4096) == RopeScaling()


def test_yarn_takes_the_config_maximum_where_it_names_no_original_length():
    block = {"type": "yarn", "factor": 4.0}
    assert parse_rope_scaling(block, 4096).original_length == 4096
    block["original_max_position_embeddings"] = 512
    assert parse_rope_scaling(block, 4096).original_length == 512


@pytest.mark.parametrize("name", ["attention_factor", "mscale", "mscale_all_dim"])
def test_null_means_unset_where_transformers_writes_it(name):
    block = {"type": "yarn", "factor": 4.0}
    assert parse_rope_scaling(block | {name: None}, 64) == parse_rope_scaling(block, 64)


@pytest.mark.parametrize(
    "block, words",
    [
        ({"type": "yarn", "rope_type": "linear", "factor": 2}, "names two kinds"),
        ({"factor": 4.0}, "does not say its kind"),
        ({"rope_type": "su", "factor": 4.0}, "'su' is not known"),
        ({"rope_type": None, "factor": 4.0}, "None is not known"),
        ({"rope_type": ["yarn"], "factor": 4.0}, "is not known"),
        ("yarn", "must be a JSON object"),
        ([4], "must be a JSON object"),
        ({"type": "linear", "factor": 0.5}, "at least 1"),
        ({"type": "yarn", "factor": 4.0, "truncate": 1}, "truncate"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": None}, "beta_fast"),
        ({"type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        ({"type": "dual_chunk", "chunk_size": 16, "local_size": 16}, "local_size below"),
        ({"type": "dual_chunk", "chunk_size": 16.5, "local_size": 8}, "'chunk_size' is a number"),
    ],
)
def test_contradictions(block, words):
    with pytest.raises(UserError, match=words):
        parse_rope_scaling(block, 4096)


@pytest.mark.parametrize("kind, field", [(k, f) for k, block in BLOCKS.items() for f in block])
@pytest.mark.parametrize(
    "value", ["missing", None, "4", True, 0, -4.0, float("nan"), float("inf"), 10**400]
)
def test_a_needed_field_is_missing_or_wrong(kind, field, value):
    block = {"rope_type": kind} | BLOCKS[kind] | {field: value}
    if value == "missing":
        del block[field]
    with pytest.raises(UserError, match=f"'{field}'"):
        parse_rope_scaling(block, 4096)


def test_a_field_that_nothing_reads_is_named(caplog):
    parse_rope_scaling({"type": "linear", "factor": 2.0, "beta_fast": 32, "facter": 8}, 4096)
    assert "beta_fast, facter" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_no_warning_without_cause(kind, caplog):
    shared = {"rope_theta": 1e6, "partial_rotary_factor": 0.5}
    parse_rope_scaling({"rope_type": kind} | BLOCKS[kind] | shared, 4096)
    assert not caplog.text


def _stretched(kind, factor, original):
    lists = {"short_factor": [1.0], "long_factor": [2.0]} if kind == "longrope" else {}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": original,
        **lists,
    }


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_a_factor_that_the_lengths_contradict_is_named_and_used(kind, caplog):
    assert parse_rope_scaling(_stretched(kind, 2.0, 32768), 131072).factor == 2.0
    assert "factor 2" in caplog.text and "131072" in caplog.text and "32768 = 4" in caplog.text


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
@pytest.mark.parametrize("longest", [32768, 131072])
def test_lengths_that_say_the_same_or_nothing_are_not_remarked_on(kind, longest, caplog):
    parse_rope_scaling(_stretched(kind, 4.0, 32768), longest)
    assert not caplog.text
