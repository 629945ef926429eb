"""Documents of which most heads keep the first and the last tokens: answered, saved and opened."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.deployments import deployment as deployment_of
from helpers.golden_models import build, mesh_of

import lsjax
from lsjax import UserError
from lsjax.compression import HEAD_FILE, HeadScores, RazorConfig, write_scores
from lsjax.documents.folder import DocumentFolder
from lsjax.inference.options import resolve_options
from lsjax.language_model import LanguageModel
from lsjax.planning.shared_document import held_bytes, own_bytes, saved_bytes
from lsjax.shipped import shipped_model_path

OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
OUTPUT = 12
# Four blocks, and a rest that rows copy.
LENGTH, CACHED = 330, 320
DROPS = {"induction": 0.5, "echo": 0.0, "window": 48, "window_share": 0.1}
KEEPS_ALL = DROPS | {"window": 400}
RETRIEVAL = [[0, 1, 1, 0], [1, 0, 0, 1]]  # the heads of each layer that keep everything

slow = functools.partial(
    pytest.mark.slow, "what tokens see of a compressed document is quick, against float64"
)


def ids(seed, length):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


DOCUMENT = ids(0, LENGTH)
QUESTIONS = [ids(1, 9), ids(2, 30), ids(3, 1)]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("heads") / HEAD_FILE)
    scores = HeadScores(np.zeros((2, 4)), np.array(RETRIEVAL, float))
    write_scores(path, build("llama", layers=2).config, scores)
    return path


@pytest.fixture(scope="module")
def model(heads):
    """Loads a model of two layers with four KV heads each, for settings, a mesh and a format."""

    def load(settings=DROPS, mesh="111", kv="int8", chunk=64):
        lm = build("llama", kv=kv, mesh=mesh_of(mesh), chunk=chunk, layers=2)
        razor = RazorConfig(**settings, heads=heads).resolve("", lm.config, int(mesh[2]))
        params = razor.reorder_heads(jax.tree.map(jnp.copy, lm.params), lm.config)
        return LanguageModel(dataclasses.replace(lm.options, compression=razor), params)

    return load


def read(lm, **options):
    return lm.read(DOCUMENT, allow_untrained_length=True, **options)


def asked(lm, document, **options):
    done = lm.generate(QUESTIONS, OUTPUT, document=document, **OPTIONS, **options)
    return [c.token_ids for c in done]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A saved document, and the answers of the model that has read it."""
    folder, lm = tmp_path_factory.mktemp("documents") / "saved", model()
    return folder, asked(lm, read(lm, save_to=folder))


@slow()
@pytest.mark.parametrize("kv", ["int8", "float32"])
def test_where_nothing_is_dropped_answers_are_those_to_the_plain_prompt(model, kv):
    lm = model(KEEPS_ALL, kv=kv)
    document, plain = read(lm), build("llama", kv=kv, layers=2)
    prompts = [DOCUMENT + question for question in QUESTIONS]
    wanted = [c.token_ids for c in plain.generate(prompts, OUTPUT, **OPTIONS)]
    assert document.cached == CACHED
    assert asked(lm, document) == wanted
    assert asked(lm, document, prompt_lookup_num_tokens=5) == wanted


@slow()
def test_heads_keep_tokens_as_an_uncompressed_document_has_them(model, tmp_path):
    """No token misses a key while the document is read, and each layer drops what it should."""
    read(model(kv="float32"), save_to=tmp_path / "kept")
    read(build("llama", layers=2), save_to=tmp_path / "all")
    kept, whole = (DocumentFolder.open(tmp_path / name) for name in ("kept", "all"))
    tokens = np.concatenate([part.data for _, part in whole.slices(CACHED)], axis=3)
    last = 52  # a tenth of the room for 512 tokens
    near = np.r_[:4, CACHED - last : CACHED]
    for i, (layer, retrieval) in enumerate(zip(tokens, RETRIEVAL, strict=True)):
        those, others = np.flatnonzero(retrieval), np.flatnonzero(np.array(retrieval) == 0)
        dropped = np.delete(layer[:, others], near, axis=2)
        for name, wanted in {
            "0/entries": layer[:, those],
            "1/entries": layer[:, others][:, :, near],
            "1/compensation": dropped.mean(axis=2),
        }.items():
            np.testing.assert_allclose(
                kept.read_array(f"{i}/{name}", wanted.shape), wanted, atol=1e-5
            )


@slow()
def test_with_alibi_nothing_is_lost():
    lms = [
        lsjax.load(str(shipped_model_path("alibi")), kv_compression=c, kv_cache_dtype="int8")
        for c in ("none", "razor")
    ]
    text = ids(4, 2100)
    answers = [
        lm.generate(
            QUESTIONS, OUTPUT, document=lm.read(text, allow_untrained_length=True), **OPTIONS
        )
        for lm in lms
    ]
    assert [c.token_ids for c in answers[0]] == [c.token_ids for c in answers[1]]


@slow()
@pytest.mark.parametrize("mesh", ["212", "222", "141"])
def test_saved_on_one_mesh_it_is_opened_on_others(model, saved, tmp_path, mesh):
    folder, expected = saved
    lm = model(mesh=mesh, chunk=32)
    opened = lm.open_document(folder)
    assert asked(lm, opened) == expected
    document = read(lm)
    assert document.cached == CACHED and asked(lm, document) == expected
    document.save(tmp_path / "b")
    last = model()
    assert asked(last, last.open_document(tmp_path / "b")) == expected


@slow()
def test_one_that_is_compressed_up_to_another_token_stays_so(model, tmp_path):
    """Zigzag blocks of eight devices are longer than those of the cache."""
    lm, alone = model(mesh="181", chunk=128), model()
    document = read(lm, save_to=tmp_path / "a")
    opened = alone.open_document(tmp_path / "a")
    assert document.cached == opened.cached == 256
    assert asked(alone, opened) == asked(lm, document)
    assert asked(alone, read(alone, save_to=tmp_path / "a")) == asked(lm, document)


@slow()
def test_turns_of_a_chat_run_what_is_new(model, saved):
    lm, prompt, told = model(), DOCUMENT, []
    chat = lm.chat(lm.open_document(saved[0]))
    for turn, question in enumerate(QUESTIONS):
        prompt = [*prompt, *question]
        told.clear()
        answer = chat.ask(question, OUTPUT, on_prefill=told.append, **OPTIONS)
        (expected,) = lm.generate(
            prompt[LENGTH:], OUTPUT, document=lm.open_document(saved[0]), **OPTIONS
        )
        assert answer.token_ids == expected.token_ids
        assert not turn or sum(told) <= len(question) + 1
        prompt += answer.token_ids


@slow()
def test_it_takes_what_is_planned(model, saved):
    folder, lm = saved[0], model()
    document = lm.open_document(folder)
    plan = deployment_of((1, 1, 1), "float32", "int8", 64, len(QUESTIONS), OUTPUT)
    plan = dataclasses.replace(
        plan,
        cache_block=lm.options.cache_block,
        document_length=LENGTH,
        compression=lm.options.compression,
    )
    files = [f for f in folder.rglob("*") if f.is_file()]
    slices = [f for f in files if "c" in f.relative_to(folder).parts]
    sizes = [f.stat().st_size - 4 for f in slices]  # without checksums
    on_disk = sum(sizes) + (folder / "ids.bin").stat().st_size
    assert saved_bytes(lm.config, plan) == on_disk
    arrays = jax.tree.leaves((document.cache.layers, document.cache.rest))
    assert held_bytes(lm.config, "cpu", plan) == sum(x.nbytes for x in arrays)
    (first, *_) = lm.generate(QUESTIONS, OUTPUT, document=document, **OPTIONS)
    longest = max(map(len, QUESTIONS))
    assert own_bytes(lm.config, "cpu", plan, longest) == first.stats.cache_bytes


@slow()
def test_one_shorter_than_a_block_is_kept_as_it_is(model, tmp_path):
    lm, short = model(), DOCUMENT[:40]
    lm.read(short, save_to=tmp_path / "short", allow_untrained_length=True)
    document = lm.open_document(tmp_path / "short")
    prompts = [short + question for question in QUESTIONS]
    plain = build("llama", kv="int8", layers=2).generate(prompts, OUTPUT, **OPTIONS)
    assert asked(lm, document) == [c.token_ids for c in plain]


@slow()
def test_a_stopped_one_is_read_again(model, saved, tmp_path):
    """It is compressed layer by layer, so that a part of it is of no use."""
    lm = model()

    def interrupt(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(lm, save_to=tmp_path / "part", on_prefill=interrupt)
    with pytest.raises(UserError, match="holds 0 of 320 tokens"):
        lm.open_document(tmp_path / "part")
    assert asked(lm, read(lm, save_to=tmp_path / "part")) == saved[1]


@slow()
def test_what_does_not_fit_is_refused(model, saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    with pytest.raises(UserError, match="read with another kv_compression"):
        model(DROPS | {"window": 50}).open_document(copy)
    with pytest.raises(UserError, match="read with another kv_compression"):
        model(mesh="114").open_document(copy)  # where all heads of a layer keep everything
    with pytest.raises(UserError, match="read with another kv_compression"):
        build("llama", kv="int8", layers=2).open_document(copy)
    file = copy / "0" / "0" / "entries" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged; remove it and read the document again"):
        model().open_document(copy)
    shutil.rmtree(copy / "0")
    with pytest.raises(UserError, match="is damaged; remove it and read the document again"):
        model().open_document(copy)
    # Rows of eight devices begin at whole zigzag blocks of 128 tokens.
    other = saved[0].parent / "odd"
    shutil.copytree(saved[0], other)
    with pytest.raises(UserError, match="was compressed at 320 tokens"):
        model(mesh="181", chunk=128).open_document(other)
    assert DocumentFolder.open(other).complete


def test_what_forgets_while_it_reads_is_refused():
    for kind in ({"streaming": True}, "streaming_llm"):
        options = resolve_options(shipped_model_path(), kv_compression=kind)
        with pytest.raises(UserError, match="forgets while it reads"):
            lsjax.documents.check_options(options)
