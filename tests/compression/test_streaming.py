"""Prefill that compresses as it goes, against its definition in float64, chunk after chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import FullCache, HeadSplit, WindowSpec, compress, update_and_attend
from lsjax.cli import report
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh
from lsjax.inference.options import resolve_options
from lsjax.inference.request import batches
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import held_out_passages

HEADS, KV_HEADS, HEAD_DIM = 4, 4, 8
SPEC = WindowSpec(3, 70)
SMALL = {"induction": 0.5, "window": 256, "window_share": 0.1, "streaming": True}


def in_float64(q, k, v, start, position):
    """Returns a head's attention to what the window keeps from before the chunk, to a compensation
    token for the rest, and to the chunk."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    kept = [p for p in range(start) if p < SPEC.sinks or p >= start - SPEC.last]
    gone = np.arange(SPEC.sinks, start - SPEC.last)
    seen = [*kept, *range(start, position + 1)]
    scores = [q @ k[p] / np.sqrt(HEAD_DIM) for p in seen]
    values = [v[p] for p in seen]
    if len(gone):
        scores.append(q @ k[gone].mean(axis=0) / np.sqrt(HEAD_DIM) + np.log(len(gone)))
        values.append(v[gone].mean(axis=0))
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum() @ np.array(values)


@pytest.mark.parametrize(
    "mesh, chunk",
    [
        ((1, 1, 1), 50),
        ((2, 2, 2), 64),
        *(
            pytest.param(*case, marks=pytest.mark.slow("all axes together are quick"))
            for case in (((1, 1, 1), 256), ((1, 4, 1), 32))
        ),
    ],
)
def test_chunks_see_the_window_before_them_and_leave_what_compressing_leaves(mesh, chunk):
    rng = np.random.default_rng(0)
    data, context, shards = mesh
    mesh = make_mesh({"data": data, "context": context, "model": shards})
    lengths = np.array([301, 190])
    total = -(-lengths.max() // chunk) * chunk
    zigzag = zigzag_of(chunk, context)
    shape = 2, total, KV_HEADS, HEAD_DIM
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    each = KV_HEADS // shards
    parts = HeadSplit(1, ((each - 1, SPEC),)) if each > 1 else HeadSplit(0, ((1, SPEC),))
    capacity = -(-total // (256 * context)) * 256 * context
    store = empty_kv_array((2, KV_HEADS, capacity, HEAD_DIM), "float32")
    whole = FullCache(store, store, zigzag)
    with jax.set_mesh(mesh):
        small = jax.jit(lambda c: compress(c, jnp.zeros(2, int), parts, shards))(whole)
    step = jax.jit(
        lambda q, k, v, at, c: update_and_attend(mesh, q, k, v, at, jnp.asarray(lengths), c, False)
    )
    found = np.zeros(shape)
    for start in range(0, total, chunk):
        at = start + zigzag.permutation(chunk)
        new = (jnp.asarray(x[:, at]) for x in (q, k, v))
        out, small = step(*new, jnp.broadcast_to(at, (2, chunk)), small)
        found[:, at] = out
    for row, length in enumerate(lengths):
        for position in range(0, length, 7):
            for head in range(KV_HEADS):
                all_kept = head % each < parts.whole
                start = 0 if all_kept else position // chunk * chunk
                own = q[row, position, head], k[row, :, head], v[row, :, head]
                wanted = in_float64(*own, start, position)
                np.testing.assert_allclose(found[row, position, head], wanted, atol=3e-6)
    # What is left is what compressing the whole cache leaves, but that this sums in other orders.
    device, slot = np.divmod(np.arange(capacity), capacity // context)
    position = np.array([zigzag.position(d, s) for d, s in zip(device, slot, strict=True)])
    padded = (np.pad(x, ((0, 0), (0, capacity - total), (0, 0), (0, 0))) for x in (k, v))
    laid = (store.quantize(jnp.asarray(x[:, position].swapaxes(1, 2))) for x in padded)
    whole = FullCache(*laid, zigzag)
    wanted = jax.jit(lambda c, n: compress(c, n, parts, shards))(whole, lengths)
    window, expected = small.groups[-1], wanted.groups[-1]
    kept = np.arange(min(SPEC.slots, lengths.min()))
    for a, b in ((window.k.data, expected.k.data), (window.v.data, expected.v.data)):
        np.testing.assert_array_equal(a[:, :, kept], b[:, :, kept])
    for a, b in zip(
        jax.tree.leaves((window.compensation_token, window.next_evicted)),
        jax.tree.leaves((expected.compensation_token, expected.next_evicted)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def passkeys(count, length, compression, **options):
    lm = lsjax.load(rope_scaling="auto", kv_compression=compression, **options)
    passages = held_out_passages(length, count)
    rows = lm.generate([p.prompt for p in passages], 8, max_batch_size=count)
    right = sum(p.answer in row.text for p, row in zip(passages, rows, strict=True))
    return right, [row.token_ids for row in rows]


@pytest.mark.slow("attention of each chunk is quick, against float64")
def test_pass_keys_are_read():
    assert passkeys(4, 1300, SMALL, prefill_chunk=128)[0] == 4


@pytest.mark.slow("what heads of any reach keep is quick in test_reach")
def test_with_alibi_nothing_is_lost():
    prompt = held_out_passages(1300, 1)[0].prompt
    said = []
    for compression in ("none", {"streaming": True}):
        lm = lsjax.load(str(shipped_model_path("alibi")), kv_compression=compression)
        row = lm.generate(prompt, 24, allow_untrained_length=True)[0]
        said.append(row.token_ids)
    assert said[0] == said[1]


def test_that_it_is_approximate_is_said():
    settings = resolve_options(shipped_model_path(), kv_compression=SMALL)
    requests = batches(settings, [(1, 2, 3)], 8)
    assert any("approximate" in note for note in report.warnings(settings, requests))


def test_it_is_true_or_false():
    with pytest.raises(UserError, match="true or false"):
        resolve_options(shipped_model_path(), kv_compression={"streaming": "yes"})
