"""RazorAttention past the chunk size of dual chunk attention, against its definition in float64."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.golden_models import build, changed_config, mesh_of
from helpers.oracle import dual_chunk_distance, rotated

from lsjax.attention.kv_array import KVArray, empty_kv_array
from lsjax.cache import (
    FloatBlock,
    FloatTail,
    FullCache,
    HeadSplit,
    WindowSpec,
    compress,
    shared_layers,
    update_and_attend,
)
from lsjax.cache.shared_prefix import SharedPrefix
from lsjax.compression import HEAD_FILE, HeadScores, RazorConfig, write_scores
from lsjax.config import LayerKind, RopeScaling
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh, sharding
from lsjax.language_model import LanguageModel
from lsjax.nn.attention import LayerInputs
from lsjax.positions.rotary import rotary_tables, rotate

SIZE, LOCAL = 64, 16
STRIDE = SIZE - LOCAL
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
CHUNK, DOCUMENT = 64, 192
SCALING = {"chunk_size": SIZE, "local_size": LOCAL, "original_length": SIZE}


class Case(NamedTuple):
    """Prompts of a batch, whose answers cross a border of chunks at 240 and 192, and what heads
    keep of them: a window of more or fewer positions than a chunk has, or sinks of more."""

    sinks: int = 3
    last: int = 70
    mesh: str = "111"
    cache: str = "float32"
    prompts: tuple[int, ...] = (236, 187)
    output: int = 8
    whole: int = 1  # heads that keep everything, on each shard
    error: float = 1e-5


def by_definition(q, k, v, at, total, spec, length):
    """[heads, head_dim] float64 of a query at `at`; k and v are of one KV head for each query head.

    Every key that a head has dropped is, as it is held, the mean of those dropped. Of `length`
    tokens the window is what is kept. Without a spec nothing is dropped.
    """
    seen = np.arange(at + 1)
    held, values = rotated(k[seen], seen % STRIDE), v[seen].astype(np.float64)
    if spec is not None and length > spec.slots:
        gone = (seen >= spec.sinks) & (seen < length - spec.last)
        held[gone], values[gone] = held[gone].mean(axis=0), values[gone].mean(axis=0)
    # What the query is rotated to for each key.
    turned = dual_chunk_distance([at], SIZE, LOCAL)[0] + seen % STRIDE
    queries = rotated(np.repeat(q[None], at + 1, axis=0), turned)
    scores = np.einsum("shd,shd->hs", queries, held) / np.sqrt(HEAD_DIM)
    scores *= (0.1 * np.log(max(total, SIZE) / SIZE) + 1) ** 2
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), values)


class Layer:
    """A layer's steps on a mesh, for rows of some lengths, prompt and output together."""

    def __init__(self, mesh, totals):
        self.mesh = make_mesh(dict(zip(("data", "context", "model"), map(int, mesh), strict=True)))
        self.totals, self.shards = totals, self.mesh.shape["model"]
        rng, self.rows = np.random.default_rng(0), np.arange(len(totals))[:, None]
        self.q, self.k, self.v = (
            rng.standard_normal((len(totals), 512, n, HEAD_DIM)).astype(np.float32)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.q *= 1.5
        config = dataclasses.replace(
            changed_config("qwen2", 1),
            rope_scaling=RopeScaling("dual_chunk", **SCALING),
            **{"head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM, "rope_theta": 1e4},
        )
        self.tables = rotary_tables(config, totals)

    def empty(self, dtype="float32", rows=None):
        zigzag = zigzag_of(CHUNK, self.mesh.shape["context"])
        shape = rows or len(self.totals), KV_HEADS, 512, HEAD_DIM
        store = empty_kv_array(shape, dtype)
        cache = FullCache(store, store, zigzag, CHUNK)
        if dtype != "float32":
            zeros = jnp.zeros((*shape[:2], 64, HEAD_DIM))
            cache = FloatTail(cache, FloatBlock(zeros, zeros))
        specs = cache.partition_specs()
        return jax.device_put(cache, jax.tree.map(lambda s: sharding(self.mesh, s), specs))

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def _run(self, given, at, lengths, cache, decode):
        q, k, v = given
        inputs = LayerInputs(tables=self.tables).at(at)
        q, k = inputs.rotated(q, False), rotate(k, *inputs.angles, False)
        args = self.mesh, q, k, v, at, lengths, cache, decode
        return update_and_attend(*args, tables=self.tables)

    def step(self, at, lengths, cache, decode):
        at = np.broadcast_to(at, (len(self.totals), at.shape[-1]))
        given = tuple(x[self.rows, at] for x in (self.q, self.k, self.v))
        out, cache = self._run(given, at, lengths, cache, decode)
        return np.asarray(out), cache

    def read(self, start, stop, lengths, cache):
        """Outputs at the positions from `start` on, and the cache."""
        order = zigzag_of(CHUNK, self.mesh.shape["context"]).permutation(CHUNK)
        outs = []
        for first in range(start, stop, CHUNK):
            out, cache = self.step(first + order, lengths, cache, False)
            outs.append(out[:, np.argsort(order)])
        return np.concatenate(outs, axis=1), cache

    def filled(self):
        """The cache of all positions, written from the definition."""
        empty = self.empty()
        order = empty.zigzag.permutation(512)
        k = rotated(self.k, np.arange(512) % STRIDE)
        k, v = (x.astype(np.float32)[:, order].swapaxes(1, 2) for x in (k, self.v))
        filled = empty.replace(k=KVArray(k, None), v=KVArray(v, None))
        return jax.tree.map(lambda x, held: jax.device_put(x, held.sharding), filled, empty)

    def compress(self, cache, lengths, spec, whole=1):
        parts = HeadSplit(whole, ((KV_HEADS // self.shards - whole, spec),))
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda c, n: compress(c, n, parts, self.shards))(cache, lengths)

    def check(self, out, row, at, spec, length, whole=1, error=1e-5):
        """An output is that of a layer whose first heads on each shard keep everything."""
        group = HEADS // KV_HEADS
        keys, values = (np.repeat(x[row], group, axis=1) for x in (self.k, self.v))
        each = self.q[row, at], keys, values, at, self.totals[row]
        whole = np.arange(HEADS) // group % (KV_HEADS // self.shards) < whole
        every, rest = by_definition(*each, None, length), by_definition(*each, spec, length)
        wanted = np.where(whole[:, None], every, rest)
        np.testing.assert_allclose(out, wanted, rtol=0, atol=error)


slow = functools.partial(
    pytest.param,
    marks=pytest.mark.slow("the quick case has all views, and test_window meshes and formats"),
)


@pytest.mark.parametrize(
    "case",
    [
        Case(whole=0),
        slow(Case(last=40, mesh="122", cache="int8", error=5e-2)),
        slow(Case(sinks=50, output=60)),
        slow(Case(mesh="241", prompts=(236, 30), sinks=50)),
        slow(Case(last=40, cache="int4", error=0.5)),
        slow(Case(last=300)),
    ],
    ids=str,
)
def test_views_see_what_is_kept_and_what_was_dropped_of_their_keys(case):
    prompts, spec = np.array(case.prompts), WindowSpec(case.sinks, case.last)
    layer = Layer(case.mesh, (prompts + case.output).tolist())
    cache = layer.filled()
    if case.cache != "float32":
        _, cache = layer.read(0, prompts.max(), prompts, layer.empty(case.cache))
    cache = layer.compress(cache, prompts, spec, case.whole)
    for n in range(case.output):
        at = prompts[:, None] + n
        out, cache = layer.step(at, prompts, cache, True)
        for row, position in enumerate(at[:, 0].tolist()):
            args = out[row, 0], row, position, spec, position + 1, case.whole, case.error
            layer.check(*args)


@pytest.mark.parametrize("mesh", [slow("111"), slow("222")])
def test_tokens_after_a_compressed_document_drive_nothing_out_of_it(mesh):
    """Questions end within a chunk of positions and in the next, and each drafts two tokens."""
    lengths, spec = DOCUMENT + np.array([70, 33]), WindowSpec(3, 70)
    layer = Layer(mesh, (lengths + 9).tolist())
    layer.k[:, :DOCUMENT], layer.v[:, :DOCUMENT] = layer.k[0, :DOCUMENT], layer.v[0, :DOCUMENT]
    _, whole = layer.read(0, DOCUMENT, np.full(2, DOCUMENT), layer.empty())
    kept = layer.compress(whole, np.full(2, DOCUMENT), spec)
    (kept,) = shared_layers((kept,), [LayerKind()])
    rows = int(mesh[0])
    kept = jax.device_put(
        jax.tree.map(lambda x: np.asarray(x)[:rows], kept),
        jax.tree.map(lambda s: sharding(layer.mesh, s), kept.partition_specs()),
    )
    cache = SharedPrefix(kept, np.int32(DOCUMENT), layer.empty())
    out, cache = layer.read(DOCUMENT, lengths.max(), lengths, cache)
    found = {
        (row, at): out[row, at - DOCUMENT]
        for row in range(2)
        for at in range(DOCUMENT, lengths[row])
    }
    for n in range(0, 9, 3):
        at = lengths[:, None] + n + np.arange(3)
        out, cache = layer.step(at, None, cache, True)
        found |= {(row, p): out[row, i] for row in range(2) for i, p in enumerate(at[row])}
    for (row, at), got in found.items():
        layer.check(got, row, at, spec, DOCUMENT)


ROPE = {"rope_type": "dual_chunk", "chunk_size": SIZE, "local_size": LOCAL}
GROWING = ROPE | {"original_max_position_embeddings": SIZE}
OPTIONS = {"allow_untrained_length": True, "ignore_eos": True}
DROPS = {"induction": 0.5, "echo": 0.0, "window": 40, "window_share": 0.1}
LENGTHS = (230, 130, 50)


def ids(seed, length):
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Loads a model of two layers with settings, a mesh and a format; two of its heads retrieve."""
    path = str(tmp_path_factory.mktemp("heads") / HEAD_FILE)

    def load(settings, mesh="111", kv="int8", chunk=64):
        options = {"kv": kv, "mesh": mesh_of(mesh), "chunk": chunk, "layers": 2}
        lm = build("llama", rope_scaling=GROWING, **options)
        if settings is None:
            return lm
        induction = np.zeros((2, lm.config.num_heads))
        induction[:, [0, 3]] = 1
        write_scores(path, lm.config, HeadScores(np.zeros_like(induction), induction))
        razor = RazorConfig(**settings, heads=path).resolve("", lm.config, int(mesh[2]))
        params = razor.reorder_heads(jax.tree.map(jnp.copy, lm.params), lm.config)
        return LanguageModel(dataclasses.replace(lm.options, compression=razor), params)

    return load


def answers(lm, prompts, **options):
    return [c.token_ids for c in lm.generate(prompts, 20, **OPTIONS, **options)]


@pytest.mark.slow("whole models; what each query sees is quick")
@pytest.mark.parametrize("kv", ["int8", "float32"])
def test_where_nothing_is_dropped_tokens_are_those_without_compression(model, kv):
    prompts = [ids(i, n) for i, n in enumerate(LENGTHS)]
    wanted = answers(model(None, kv=kv), prompts)
    assert answers(model({"induction": 1.0}, kv=kv), prompts) == wanted
    assert answers(model(DROPS | {"window": 400}, kv=kv), prompts) == wanted


@pytest.mark.slow("whole models; what each query sees is quick")
def test_tokens_depend_neither_on_the_mesh_nor_on_the_chunks(model):
    prompts = [ids(i, n) for i, n in enumerate(LENGTHS)]
    wanted = answers(model(DROPS), prompts, max_batch_size=4)
    assert wanted != answers(model(None), prompts, max_batch_size=4)
    there = model(DROPS, mesh="222", chunk=48)
    assert answers(there, prompts, max_batch_size=4) == wanted


@pytest.mark.slow("whole models; what tokens see of a document is tested layer by layer")
def test_a_compressed_document_is_saved_and_opened_elsewhere(model, tmp_path):
    lm, document, questions = model(DROPS), ids(5, 200), [ids(6, 9), ids(7, 30)]
    read = lm.read(document, reserve=60, save_to=tmp_path / "saved", allow_untrained_length=True)
    wanted = answers(lm, questions, document=read)
    drafted = answers(lm, questions, document=read, prompt_lookup_num_tokens=5)
    there = model(DROPS, mesh="222")
    opened = answers(there, questions, document=there.open_document(tmp_path / "saved"))
    assert wanted == drafted == opened
    whole = model(DROPS | {"window": 400})
    kept = whole.read(document, reserve=60, allow_untrained_length=True)
    plain = [document + question for question in questions]
    total = len(document) + 60
    (first,) = whole.generate(questions[1], 30, document=kept, **OPTIONS)
    (alone,) = model(None).generate(plain[1], total - len(plain[1]), **OPTIONS)
    assert alone.token_ids[:30] == first.token_ids
