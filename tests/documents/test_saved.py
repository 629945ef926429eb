"""Saved documents: read on with after any end, opened on any mesh, refused when damaged."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from helpers.deployments import deployment as deployment_of
from helpers.golden_models import build

from lsjax import UserError
from lsjax.attention.kv_array import KVArray
from lsjax.attention.sparse.rule import SparsePrefill
from lsjax.cache import FullCache, RollingCache, from_slices
from lsjax.config import LayerKind
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CACHE_SPEC, make_mesh, sharding
from lsjax.documents.fingerprint import fingerprint
from lsjax.documents.folder import DocumentFolder, slice_tokens
from lsjax.documents.library import delete, prune, saved_documents
from lsjax.planning.shared_document import held_bytes, own_bytes, saved_bytes

LENGTH, SLICE = 330, 64  # as long as a chunk
DOCUMENT = np.random.default_rng(0).integers(0, 64, LENGTH).tolist()
QUESTIONS = [[5, 6, 7], [8] * 20]


def test_what_a_document_depends_on_has_no_defaults():
    """So a setting that is added later leaves saved documents valid."""
    lm, rule = build("qwen2"), SparsePrefill(0.5, last_tokens=0)
    options = dataclasses.replace(lm.options, sparse_prefill=rule)
    plain, sparse = (fingerprint(lm.config, x, lm.params) for x in (lm.options, options))
    assert sparse["sparse_prefill"] == '{"SparsePrefill": {"alpha": 0.5, "last_tokens": 0}}'
    kind = dataclasses.make_dataclass(
        "LayerKind", [("new", int, 0)], bases=(LayerKind,), frozen=True
    )
    for added, same in ((kind(), True), (kind(window=7), False), (kind(new=1), False)):
        config = dataclasses.replace(lm.config, layers=(added,) * lm.config.num_layers)
        found = fingerprint(config, lm.options, lm.params)
        assert (found == plain) is same


def read(lm, folder, **options):
    return lm.read(DOCUMENT, save_to=folder, allow_untrained_length=True, **options)


def ask(lm, document):
    return lm.generate(
        QUESTIONS, 12, document=document, allow_untrained_length=True, ignore_eos=True
    )


def answers(lm, document):
    return [c.token_ids for c in ask(lm, document)]


def model(mesh="", chunk=64, kv="int8", name="glm4"):
    return build(name, kv=kv, mesh=mesh, chunk=chunk, layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved document, and the answers of the model that has read it."""
    folder = tmp_path_factory.mktemp("documents") / "saved"
    lm = model()
    return folder, answers(lm, read(lm, folder))


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved document, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / "copy")


def slice_file(folder, number):
    return folder / "entries" / "c" / "0" / "0" / "0" / str(number) / "0"


def test_opened_it_gives_the_same_answers(saved):
    folder, expected = saved
    lm = model()
    document = lm.open_document(folder)
    assert document.token_ids == tuple(DOCUMENT)
    assert answers(lm, document) == expected


def test_it_takes_what_is_planned(saved):
    """To the byte: on disk beside checksums and document.json, in memory, and beside questions."""
    folder, lm = saved[0], model()
    document = lm.open_document(folder)
    plan = deployment_of((1, 1, 1), "float32", "int8", 64, len(QUESTIONS), 12)
    plan = dataclasses.replace(plan, cache_block=lm.options.cache_block, document_length=LENGTH)
    files = [f for name in ("entries/c", "scales/c") for f in (folder / name).rglob("*")]
    sizes = [f.stat().st_size for f in [*files, folder / "ids.bin"] if f.is_file()]
    checksums = 4 * (len(sizes) - 1)
    assert saved_bytes(lm.config, plan) == sum(sizes) - checksums
    arrays = jax.tree.leaves((document.cache.layers, document.cache.rest))
    assert held_bytes(lm.config, "cpu", plan) == sum(x.nbytes for x in arrays)
    (first, _) = ask(lm, document)
    longest = max(map(len, QUESTIONS))
    assert own_bytes(lm.config, "cpu", plan, longest) == first.stats.cache_bytes


@pytest.mark.parametrize(("kind", "capacity"), [(FullCache, 64), (RollingCache, 32)])
def test_slices_are_put_into_the_slots_of_their_positions(kind, capacity):
    """In every row, on each device of the context axis; a cache that rolls holds the last lap."""
    mesh, zigzag, length = make_mesh("data=2,context=2,model=2"), Zigzag(2, 16), 56
    entries = np.random.default_rng(0).integers(-127, 128, (2, 2, 4, length, 8), np.int8)
    scales = entries[..., 0].astype(np.uint16)
    shapes = (2, 4, capacity, 8), (2, 4, capacity)
    store = KVArray(
        *(
            jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding(mesh, CACHE_SPEC))
            for shape, x in zip(shapes, (entries, scales), strict=True)
        )
    )
    slices = (
        (at, KVArray(entries[:, :, :, at : at + 14], scales[:, :, :, at : at + 14]))
        for at in range(0, length, 14)
    )
    layers = from_slices((kind(store, store, zigzag),) * 2, slices)
    slots = np.arange(capacity // 2)
    positions = np.concatenate([zigzag.position(device, slots) for device in range(2)])
    if kind is RollingCache:
        positions += capacity * (positions + capacity < length)
    held = positions < length
    for layer, x, scale in zip(layers, entries, scales, strict=True):
        for stored, half in ((layer.k, 0), (layer.v, 1)):
            for row in range(2):
                data, factor = np.asarray(stored.data)[row], np.asarray(stored.scale)[row]
                np.testing.assert_array_equal(data[:, held], x[half][:, positions[held]])
                np.testing.assert_array_equal(factor[:, held], scale[half][:, positions[held]])


@pytest.mark.slow("slices of a sharded cache are put in place, and taken as those of one device")
def test_saved_on_one_mesh_it_is_opened_on_others(tmp_path):
    lm = model("context=4", name="qwen2_window")
    expected = answers(lm, read(lm, tmp_path / "a"))
    lm = model("data=2,context=2,model=2", chunk=32, name="qwen2_window")
    opened = lm.open_document(tmp_path / "a")
    assert answers(lm, opened) == expected
    opened.save(tmp_path / "b")
    last = model(name="qwen2_window")
    assert answers(last, last.open_document(tmp_path / "b")) == expected


@pytest.mark.parametrize("chunks", [1, 3])
def test_reading_goes_on_where_it_was_interrupted(saved, tmp_path, chunks):
    folder, expected = saved
    lm, seen = model(), []

    def interrupt(tokens):
        seen.append(tokens)
        if len(seen) == chunks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(lm, tmp_path / "part", on_prefill=interrupt)
    done = DocumentFolder.open(tmp_path / "part").manifest.done
    assert 0 < done < LENGTH
    with pytest.raises(UserError, match=f"holds {done} of 320 tokens"):
        lm.open_document(tmp_path / "part")
    told = []
    document = read(lm, tmp_path / "part", on_prefill=told.append)
    assert told[0] == done and sum(told) == LENGTH
    assert answers(lm, document) == expected
    for number in range(5):
        assert (
            slice_file(tmp_path / "part", number).read_bytes()
            == slice_file(folder, number).read_bytes()
        )


def flip(folder):
    file = slice_file(folder, 2)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder):
    file = slice_file(folder, 1)
    file.write_bytes(file.read_bytes()[:-100])


def cut_ids(folder):
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-4])


@pytest.mark.parametrize(
    "damage",
    [flip, cut, cut_ids, lambda folder: slice_file(folder, 3).unlink()],
    ids=["a flipped bit", "a truncated slice", "truncated ids", "a missing slice"],
)
def test_damage_is_found(copy, damage):
    damage(copy)
    with pytest.raises(UserError, match="is damaged; remove it and read the document again"):
        model().open_document(copy)


def edit(folder, **changes):
    manifest = json.loads((folder / "document.json").read_text())
    (folder / "document.json").write_text(json.dumps(manifest | changes))


def test_what_does_not_fit_is_refused(copy, tmp_path):
    with pytest.raises(UserError, match="was read with another kv_cache_dtype"):
        model(kv="int4").open_document(copy)
    lm = model()
    with pytest.raises(UserError, match="holds another text"):
        lm.read(DOCUMENT[1:], save_to=copy, allow_untrained_length=True)
    with pytest.raises(UserError, match="holds no document"):
        lm.open_document(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear all")
    with pytest.raises(UserError, match="is not empty and holds no document"):
        read(lm, tmp_path / "other")
    edit(copy, format=99)
    with pytest.raises(UserError, match="is not one of this version's"):
        lm.open_document(copy)


def test_a_folder_that_is_being_written_is_left_alone(copy):
    edit(copy, done=SLICE)
    with open(copy / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            read(model(), copy)
        with pytest.raises(UserError, match="being written by another process"):
            delete(copy.parent, copy.name)
    assert (copy / "document.json").exists()


def test_a_full_disk_keeps_what_was_saved(saved, tmp_path):
    lm, append = model(), DocumentFolder.append

    def full(self, tokens, start):
        if start >= 2 * SLICE:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, tokens, start)

    with (
        mock.patch.object(DocumentFolder, "append", full),
        pytest.raises(UserError, match="is full; 128 of 320 tokens are saved"),
    ):
        read(lm, tmp_path / "full")
    assert answers(lm, read(lm, tmp_path / "full")) == saved[1]


def test_documents_used_least_recently_go_first(copy):
    root = copy.parent
    for name in ("older", "newer"):
        shutil.copytree(copy, root / name)
    os.utime(root / "older", (1000, 1000))
    os.utime(root / "newer", (2000, 2000))
    found = saved_documents(root)
    assert [saved.name for saved in found] == ["older", "newer", "copy"]
    assert prune(root, 2.5 * found[0].nbytes, keep=str(root / "copy")) == ["older"]
    assert prune(root, 0, keep=str(root / "copy")) == ["newer"]
    with pytest.raises(UserError, match="names have no separators"):
        delete(root, "../copy")
    assert [saved.name for saved in saved_documents(root)] == ["copy"]


def test_a_slice_is_about_a_chunk_and_64_mib_at_most():
    assert slice_tokens(6144, 512) == 512
    assert slice_tokens(6144, 96) == 64
    assert slice_tokens(114_688, 4096) == 512
    assert slice_tokens(10**7, 4096) == 256


def test_a_document_that_begins_as_a_saved_one_is_read_from_there(copy):
    """Up to the last whole slice that both have."""
    lm, told = model(), []
    other = [*DOCUMENT[:250], *[1] * 70]
    document = lm.read(
        other, document_cache=copy.parent, allow_untrained_length=True, on_prefill=told.append
    )
    assert told[0] == 250 // SLICE * SLICE and sum(told) == len(other)
    plain = lm.read(other, allow_untrained_length=True)
    assert answers(lm, document) == answers(lm, plain)


@pytest.mark.parametrize("damage", [cut_ids, flip], ids=["its ids", "a slice"])
def test_a_damaged_one_does_not_stop_others(copy, caplog, damage):
    lm, told = model(), []
    damage(copy)
    document = lm.read(
        [*DOCUMENT[:250], *[1] * 70],
        document_cache=copy.parent,
        allow_untrained_length=True,
        on_prefill=told.append,
    )
    assert len(document) == 320 and told[0] == {cut_ids: SLICE, flip: 2 * SLICE}[damage]
    assert f"--document_cache {copy.parent} --delete {copy.name}" in caplog.text
    delete(copy.parent, copy.name)
    assert not copy.exists()


@pytest.mark.slow("meshes that share fewer tokens, and what is interrupted, are tested alone")
def test_a_mesh_that_shares_fewer_tokens_goes_on_with_it(tmp_path):
    """Zigzag blocks of eight devices are longer than blocks of the cache."""
    lm, calls = model(chunk=128), []

    def interrupt(tokens):
        calls.append(tokens)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(lm, tmp_path, on_prefill=interrupt)
    other = model("context=8", chunk=128)
    document = read(other, tmp_path)
    assert document.cached == 256 < LENGTH // lm.options.cache_block * lm.options.cache_block
    assert answers(lm, lm.open_document(tmp_path)) == answers(other, document)
    with pytest.raises(UserError, match="on another mesh or in other chunks"):
        lm.generate([1], 4, document=document)
