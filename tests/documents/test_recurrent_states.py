"""Documents of models with recurrent layers: answered, saved, gone on with and opened by states."""

import dataclasses
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.deployments import deployment as deployment_of
from helpers.golden_models import build, changed_config, mesh_of

from lsjax import Sampling, UserError
from lsjax.attention.kv_array import KVArray
from lsjax.cache import CacheSpec, cache_shapes, from_snapshot, snapshot, snapshot_bytes, states_of
from lsjax.compression import HeadScores, RazorConfig, write_scores
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh, parse_mesh
from lsjax.documents import prefill
from lsjax.documents.folder import DocumentFolder
from lsjax.language_model import LanguageModel
from lsjax.planning.shared_document import held_bytes, own_bytes, saved_bytes, shared_bytes

often = mock.patch.object(prefill, "_INTERVAL", 0)  # every slice is recorded
OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
OUTPUT = 12


def ids(seed, length):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


DOCUMENT = ids(0, 330)  # not whole blocks, nor whole chunks
QUESTIONS = [ids(1, 9), ids(2, 30), ids(3, 1)]


def model(mesh="111", kv="int8", chunk=64, name="qwen3_5"):
    return build(name, kv=kv, chunk=chunk, mesh=mesh_of(mesh))


def read(lm, document=DOCUMENT, **options):
    return lm.read(document, allow_untrained_length=True, **options)


def plain(lm, document=DOCUMENT, **options):
    prompts = [document + question for question in QUESTIONS]
    return [c.token_ids for c in lm.generate(prompts, OUTPUT, **OPTIONS, **options)]


def answers(lm, document, **options):
    done = lm.generate(QUESTIONS, OUTPUT, document=document, **OPTIONS, **options)
    return [c.token_ids for c in done]


def interrupted(lm, folder, calls):
    """Reads the document into a folder until so many calls of on_prefill, and the chunk begun."""
    seen = []

    def interrupt(tokens):
        seen.append(tokens)
        if len(seen) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(lm, save_to=folder, on_prefill=interrupt)


def empty_folder(path):
    facts = {"fingerprint": {}, "cached": 1000, "slice": 50, "settled_length": None}
    return DocumentFolder.create(path, range(1000), **facts)


def test_the_last_snapshot_of_each_quarter_is_kept(tmp_path):
    folder, entries = empty_folder(tmp_path), np.zeros((1, 2, 1, 50, 4), np.float32)
    for at in range(50, 1001, 50):
        folder.append(KVArray(entries, None), at - 50)
        folder.commit(at, (at, np.full(100, 20 - at // 50, np.uint8)))
        assert folder.manifest.states[-1] == at
    folder = DocumentFolder.open(tmp_path)
    assert folder.manifest.states == (200, 450, 700, 950, 1000)
    kept = {int(path.name) for path in (tmp_path / "states").iterdir()}
    assert kept == set(folder.manifest.states)
    for at, value in ((450, 11), (1000, 0)):
        np.testing.assert_array_equal(folder.read_snapshot(at, 100), np.full(100, value, np.uint8))
    last = folder.manifest.last_state
    assert [last(1000), last(999), last(999, 100), last(450, 100), last(150)] == (
        [1000, 950, 700, 450, 0]
    )


@pytest.mark.parametrize("damage", ["a flipped bit", "missing", "truncated", "of another size"])
def test_a_damaged_snapshot_ends_in_one_sentence(tmp_path, damage):
    folder = empty_folder(tmp_path)
    folder.commit(50, (50, np.arange(100, dtype=np.uint8)))
    file = tmp_path / "states" / "50" / "c" / "0"
    content = bytearray(file.read_bytes())
    content[40] ^= damage == "a flipped bit"
    file.write_bytes(content[:-30] if damage == "truncated" else content)
    if damage == "missing":
        file.unlink()
    with pytest.raises(UserError, match="is damaged; remove it and read the document again"):
        folder.read_snapshot(50, 99 if damage == "of another size" else 100)


@pytest.mark.parametrize("meshes", [("222", "111"), ("141", "212")])
def test_a_snapshot_is_the_same_on_each_mesh(meshes):
    config, states = changed_config("qwen3_5", 0), []
    for sizes in meshes:
        mesh = make_mesh(parse_mesh(mesh_of(sizes)))
        layout = zigzag_of(64, mesh.shape["context"])
        spec = CacheSpec(mesh.shape["data"], 64, "int8", "bfloat16", layout)
        states.append(states_of(cache_shapes(config, mesh, spec, "cpu")))
    heads = np.arange(snapshot_bytes(states[0]), dtype=np.uint32).astype(np.uint8)
    found = from_snapshot(states[1], snapshot(from_snapshot(states[0], heads)))
    np.testing.assert_array_equal(snapshot(found), heads)
    shardings = (jax.tree.map(lambda x: x.sharding, tree) for tree in (found, states[1]))
    assert next(shardings) == next(shardings)


def test_the_first_token_of_each_answer_is_that_of_the_plain_prompt():
    """In a ragged batch, with tokens of the document that each row copies."""
    lm, document = model(kv="float32"), DOCUMENT[:150]
    done = lm.generate(QUESTIONS, 1, document=read(lm, document), **OPTIONS)
    for question, answer in zip(QUESTIONS, done, strict=True):
        (expected,) = lm.generate([document + question], 1, **OPTIONS)
        assert answer.token_ids == expected.token_ids


@pytest.mark.slow("first tokens are quick on one device, and a state on each mesh")
@pytest.mark.parametrize(
    ("mesh", "kv", "name"),
    [
        ("111", "int8", "qwen3_5"),
        ("111", "float32", "qwen3_5"),
        ("141", "int8", "qwen3_5"),
        ("212", "int4", "qwen3_5_moe"),
        ("222", "int8", "qwen3_5"),
    ],
)
def test_answers_are_those_to_the_plain_prompt(mesh, kv, name):
    lm, document = model(mesh, kv, name=name), DOCUMENT[:150]
    assert answers(lm, read(lm, document)) == plain(lm, document)


@pytest.mark.slow("drafts and samples are quick without a document")
def test_drafts_and_samples_go_with_a_document():
    lm = model()
    document, options = read(lm), {"prompt_lookup_num_tokens": 5}
    assert answers(lm, document, **options) == plain(lm)
    options = {"sampling": Sampling(temperature=1.0), "num_samples": 2, "max_batch_size": 2}
    assert answers(lm, document, **options) == plain(lm, **options)


@pytest.mark.slow("the specs of what is planned are those of what is run")
def test_it_takes_what_is_planned(tmp_path):
    """To the byte, on disk, with five snapshots, beside checksums and the names of arrays."""
    lm = model()
    with often:
        document = read(lm, save_to=tmp_path)
    plan = deployment_of((1, 1, 1), "float32", "int8", 64, len(QUESTIONS), OUTPUT)
    plan = dataclasses.replace(plan, cache_block=64, document_length=len(DOCUMENT))
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".json"]
    checksums = 4 * (len(files) - 2)  # not of the ids and the lock
    assert saved_bytes(lm.config, plan) == sum(f.stat().st_size for f in files) - checksums
    cache = document.cache
    arrays = jax.tree.leaves((cache.layers, cache.rest, cache.states))
    assert held_bytes(lm.config, "cpu", plan) == sum(x.nbytes for x in arrays)
    first, *_ = lm.generate(QUESTIONS, OUTPUT, document=document, **OPTIONS)
    assert own_bytes(lm.config, "cpu", plan, 30) == first.stats.cache_bytes


def test_a_compressed_document_takes_as_much_memory_as_disk():
    """The ids left out; the snapshot of the states is small beside the rest."""
    config, length = changed_config("qwen3_5", 0), 65_536
    plan = deployment_of(
        (1, 1, 1), "float32", "int8", 64, 1, OUTPUT, RazorConfig().estimate(config, 1)
    )
    plan = dataclasses.replace(plan, document_length=length)
    held = shared_bytes(config, "cpu", plan)
    assert saved_bytes(config, plan) - 4 * length == pytest.approx(held, rel=0.02)


@pytest.mark.slow("a state on each mesh is quick")
@pytest.mark.parametrize("kv", ["int8", "float32"])
def test_saved_on_one_mesh_it_is_opened_on_others(tmp_path, kv):
    lm = model("141", kv)
    document = read(lm, save_to=tmp_path / "a")
    expected = answers(lm, document)
    document.save(tmp_path / "again")
    for mesh, chunk in (("222", 32), ("111", 128)):
        lm = model(mesh, kv, chunk)
        opened = lm.open_document(tmp_path / "a")
        assert answers(lm, opened) == expected
    opened.save(tmp_path / "b")
    for folder in ("again", "b"):
        assert answers(lm, lm.open_document(tmp_path / folder)) == expected


@pytest.mark.slow("which snapshot reading goes on from is quick")
@pytest.mark.parametrize(("mesh", "chunk"), [("111", 512), ("241", 64)])
def test_reading_goes_on_from_a_snapshot(tmp_path, mesh, chunk):
    """On another mesh, and in other chunks; what is cut again keeps its snapshots."""
    lm, told = model("111"), []
    for calls, at in ((1, 128), (2, 256)):
        interrupted(lm, tmp_path, calls)
        manifest = DocumentFolder.open(tmp_path).manifest
        assert manifest.states[-1] == manifest.done == at
    lm = model(mesh, chunk=chunk)
    document = read(lm, save_to=tmp_path, on_prefill=told.append)
    assert told[0] == 256 and sum(told) == document.shared
    assert answers(lm, document) == plain(lm)
    assert answers(lm, lm.open_document(tmp_path)) == plain(lm)


@pytest.mark.slow("what does not stand at a border is read again from a snapshot before it")
def test_a_mesh_that_shares_fewer_tokens_reads_the_last_ones_again(tmp_path):
    """Zigzag blocks of eight devices are longer than blocks of the cache."""
    lm = model("111", chunk=128)
    with often:
        read(lm, save_to=tmp_path)
    assert DocumentFolder.open(tmp_path).manifest.states == (128, 256, 320)
    other = model("181", chunk=128)
    opened = other.open_document(tmp_path)
    assert opened.cached == 256
    assert answers(other, opened) == plain(other)


@pytest.mark.slow("which snapshot reading goes on from is quick")
def test_a_document_that_begins_as_a_saved_one_is_read_from_a_snapshot(tmp_path, caplog):
    lm = model()
    with often:
        read(lm, document_cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert DocumentFolder.open(folder).manifest.states == (64, 128, 192, 256, 320)
    for common, start in ((250, 192), (330, 320)):
        told, other = [], [*DOCUMENT[:common], *ids(9, 70)]
        document = read(lm, other, document_cache=tmp_path, on_prefill=told.append)
        assert told[0] == start and sum(told) == len(other)
        assert answers(lm, document) == plain(lm, other)
    shutil.rmtree(folder / "states" / "128")
    told, other = [], [*DOCUMENT[:170], *ids(10, 70)]
    read(lm, other, document_cache=tmp_path, on_prefill=told.append)
    assert "a saved document is passed over" in caplog.text and told[0] == 64


@pytest.mark.slow("what is compressed, and states that rows copy, are quick apart")
def test_a_compressed_document_has_its_states_beside_it(tmp_path):
    """Windows that hold all of it leave the tokens of the plain prompt, also on another mesh."""

    def razor(mesh):
        lm = model(mesh)
        heads = tmp_path / "heads.json"
        if not heads.exists():
            some = np.eye(1, 8)  # the first head of the layer of attention keeps everything
            write_scores(str(heads), lm.config, HeadScores(np.zeros_like(some), some))
        settings = RazorConfig(induction=0.5, echo=0.0, window=400, heads=str(heads))
        found = settings.resolve("", lm.config, int(mesh[2]))
        params = found.reorder_heads(jax.tree.map(jnp.copy, lm.params), lm.config)
        return LanguageModel(dataclasses.replace(lm.options, compression=found), params)

    lm = razor("111")
    document = read(lm, save_to=tmp_path / "a")
    expected = plain(model())
    assert answers(lm, document) == expected
    other = razor("122")
    opened = other.open_document(tmp_path / "a")
    assert answers(other, opened) == expected
    opened.save(tmp_path / "b")
    assert answers(lm, lm.open_document(tmp_path / "b")) == expected


@pytest.mark.slow("turns of a chat are quick")
@pytest.mark.parametrize("mesh", ["111", "121"])
def test_turns_of_a_chat_go_on_from_a_state(mesh):
    """From the end of the last turn, if that is a border of the mesh, or from the document's."""
    lm, prompt, told = model(mesh), DOCUMENT[:150], []
    chat = lm.chat(read(lm, prompt))
    for turn, question in enumerate([ids(1, 9), ids(2, 30), ids(3, 20)]):
        before, prompt = prompt, [*prompt, *question]
        (expected,) = lm.generate(prompt, OUTPUT, **OPTIONS)
        told.clear()
        answer = chat.ask(question, OUTPUT, on_prefill=told.append, **OPTIONS)
        assert answer.token_ids == expected.token_ids
        stands = len(before) - (turn > 0) if mesh == "111" else 128
        assert sum(told) == len(prompt) - stands
        prompt += answer.token_ids
