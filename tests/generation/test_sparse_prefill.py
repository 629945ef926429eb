"""Sparse prefill in a model: whatever the chunk and the devices, told, refused, and documents."""

import dataclasses

import numpy as np
import pytest
from helpers.golden_models import build

import lsjax
from lsjax import UserError
from lsjax.attention.sparse.rule import TILE, SparsePrefill
from lsjax.cli import report
from lsjax.evals.passkey import make_passage
from lsjax.inference.options import resolve_options
from lsjax.inference.sparse_prefill import parse_sparse_prefill
from lsjax.inference.sparsity import Sparsity, combine
from lsjax.language_model import LanguageModel
from lsjax.shipped import shipped_model_path

RULE = SparsePrefill(0.9, first_layers=1, last_tokens=TILE, dense_length=2 * TILE)
LENGTH = 12 * TILE + 30


def model(chunk=256, mesh="", kv="float32", rule=RULE):
    lm = build("glm4", kv, chunk, mesh, layers=2, block=256)
    return LanguageModel(dataclasses.replace(lm.options, sparse_prefill=rule), lm.params)


def prompt(length=LENGTH):
    return np.random.default_rng(5).integers(0, 64, length).tolist()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"chunk": 128}, marks=pytest.mark.slow("caches are tested with chunks")),
        pytest.param(
            {"chunk": 512, "mesh": "context=2"},
            marks=pytest.mark.slow("caches are tested on such a mesh"),
        ),
    ],
)
def test_logits_do_not_depend_on_chunks_and_devices(other):
    usual = model().logits([prompt()])
    assert np.abs(model(**other).logits([prompt()]) - usual).max() < 1e-4
    assert np.abs(model(rule=None).logits([prompt()]) - usual).max() > 1e-3


@pytest.mark.slow("caches are tested alone, and a model of such layers takes long to compile")
def test_layers_of_attention_between_recurrent_ones(tmp_path):
    """Layers 1 and 3 of 4 attend; the first of them is the dense one."""

    def model(alpha, chunk=256, mesh=""):
        rule = SparsePrefill(alpha, 1, 0, 0, sink_blocks=1, near_blocks=1) if alpha >= 0 else None
        lm = build("qwen3_5", "float32", chunk, mesh, layers=4, block=256)
        return LanguageModel(dataclasses.replace(lm.options, sparse_prefill=rule), lm.params)

    dense = model(-1).logits([prompt()])
    assert np.abs(model(0.0).logits([prompt()]) - dense).max() < 1e-4
    usual = model(1.0).logits([prompt()])
    assert np.abs(usual - dense).max() > 1e-3
    assert np.abs(model(1.0, 512, "context=2").logits([prompt()]) - usual).max() < 1e-4
    options = {"allow_untrained_length": True, "ignore_eos": True}
    plain = model(1.0).generate([[*prompt(), 1, 2]], 8, **options)[0]
    tiles = 13
    most = tiles * (tiles + 1)  # blocks of two layers
    found = plain.stats.sparsity
    assert 0.5 + (3 * tiles - 3) / most <= found.density <= 0.5 + 4 * tiles / most
    assert found.least_head[0] == 3
    document = model(1.0).read(prompt(), save_to=tmp_path / "it", allow_untrained_length=True)
    of_document = model(1.0).generate([[1, 2]], 8, document=document, **options)[0]
    opened = model(1.0, 512, "context=2").open_document(tmp_path / "it")
    again = model(1.0, 512, "context=2").generate([[1, 2]], 8, document=opened, **options)[0]
    assert of_document.token_ids == again.token_ids and document.sparsity.density < 1


def test_what_prompts_attended_to_is_told():
    """With alpha 1 a tile keeps the best block, beside those that all tiles keep."""
    rule = SparsePrefill(1.0, first_layers=1, last_tokens=0, dense_length=0)
    lm = lsjax.load(rope_scaling="auto", sparse_prefill=rule)
    passage = make_passage("sparse", 16 * TILE, 0.5).prompt
    stats = lm.generate(passage, 4, allow_untrained_length=True)[0].stats
    found, all_of = stats.sparsity, 16 * 17 / 2
    always = sum(min(tile + 1, 7) for tile in range(16))
    assert 56 <= found.samples <= 80 and found.pairs == all_of
    assert all_of + always <= 2 * all_of * found.density <= all_of + always + 9
    assert 0 < found.least_mass <= found.kept_mass < 1 and found.least_head[0] == 1
    line = report.summary(report.combine([stats, stats]))
    assert f"attended   to {found.density:.1%} of full attention, with " in line


@pytest.mark.slow("caches are tested with both; here a request settles the length")
def test_a_model_with_dual_chunk_attention_and_alpha_0_is_dense():
    scaling = {"rope_type": "dual_chunk", "chunk_size": 512, "local_size": 128}
    rules = None, dataclasses.replace(RULE, alpha=0.0), RULE
    dense, all_of, some = (
        lsjax.load(rope_scaling=scaling, sparse_prefill=rule, kv_cache_dtype="int8").logits(
            [prompt()]
        )
        for rule in rules
    )
    assert np.abs(all_of - dense).max() < 1e-4 < np.abs(some - dense).max()


def test_figures_of_batches_are_weighted_by_their_sizes():
    found = combine(
        [Sparsity(0.5, 10, 1, 0.9, 0.8, (1, 2)), Sparsity(0.2, 30, 3, 0.7, 0.6, (0, 1))]
    )
    assert found == Sparsity(pytest.approx(0.275), 40, 4, pytest.approx(0.75), 0.6, (0, 1))


@pytest.mark.slow("documents are quick, and means are found from the slots in any case")
def test_a_document_may_be_read_in_two_parts(tmp_path):
    """The longer one begins with the shorter one, whose means have to be found again."""
    lm, ids = model(kv="int8"), prompt()

    def answers(lm, **options):
        document = lm.read(ids, allow_untrained_length=True, **options)
        options = {"document": document, "allow_untrained_length": True, "ignore_eos": True}
        return [c.token_ids for c in lm.generate([[1, 2], [3]], 8, **options)]

    usual = answers(lm)
    first = lm.read(ids[: 6 * TILE], document_cache=tmp_path, allow_untrained_length=True)
    assert answers(lm, document_cache=tmp_path) == usual
    whole, rest = (
        lm.read(ids, allow_untrained_length=True, **options)
        for options in ({}, {"save_to": tmp_path / "it"})
    )
    assert first.sparsity.pairs == 6 * 7 / 2 and whole.sparsity.pairs == 12 * 13 / 2
    assert whole.sparsity == rest.sparsity and 0.5 < whole.sparsity.density < 1


def test_a_document_is_not_used_with_another_alpha(tmp_path):
    lm, options = model(), {"save_to": tmp_path / "it", "allow_untrained_length": True}
    assert lm.read(prompt(600), **options).sparsity.pairs == 5 * 6 / 2  # tiles of 128 tokens
    assert lm.read(prompt(600), **options).sparsity is None  # nothing is read
    for rule in (None, dataclasses.replace(RULE, alpha=0.5)):
        with pytest.raises(UserError, match="read with another sparse_prefill"):
            model(rule=rule).open_document(tmp_path / "it")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_compression": "streaming_llm"}, "does not go with kv_compression"),
        ({"path": shipped_model_path("alibi")}, "does not go with ALiBi"),
        (
            {"rope_scaling": {"rope_type": "dual_chunk", "chunk_size": 512, "local_size": 64}},
            "make chunk_size - local_size a multiple of 128",
        ),
        ({"prefill_chunk": 200}, "prefill_chunk to a multiple of as many"),
        ({"prefill_chunk": 128, "mesh": "context=2"}, "a multiple of 256 for each device"),
        ({"sparse_prefill": "much"}, "is not known; use none, a number alpha"),
        ({"sparse_prefill": 1.5}, "alpha must be from 0 to 1, not 1.5"),
        ({"sparse_prefill": '{"alpha": 0.1, "first": 1}'}, "no setting 'first'"),
        ({"sparse_prefill": {"alpha": 0.1, "last_tokens": -1}}, "last_tokens must be a number"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, reason):
    options = {"path": shipped_model_path(), "sparse_prefill": 0.1} | options
    with pytest.raises(UserError, match=reason):
        resolve_options(**options)


def test_settings_are_a_number_or_json():
    assert parse_sparse_prefill("none") is None
    assert parse_sparse_prefill("0.1") == parse_sparse_prefill(0.1) == SparsePrefill(0.1)
    text = '{"alpha": 0.2, "first_layers": 2}'
    assert parse_sparse_prefill(text) == SparsePrefill(0.2, first_layers=2)
