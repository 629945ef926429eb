"""Tokens after a compressed document against the definition in float64: what they see of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import (
    DocumentCache,
    FloatBlock,
    FloatTail,
    FullCache,
    HeadSplit,
    WindowSpec,
    attach,
    compress,
    detach,
    shared_layers,
    shared_prefix,
    update_and_attend,
)
from lsjax.config import LayerKind
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh, sharding

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
DOCUMENT, CHUNK, DECODED = 192, 32, 4
LENGTHS = (50, 29, 32, 1)  # of the questions
SPEC = WindowSpec(3, 70)


def in_float64(q, k, v, position):
    """Attention of a head to what it keeps of the document, to a compensation token for what it
    dropped, and to all that follows. Tokens that follow drive nothing out."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    at = np.arange(position + 1)
    gone = (at >= SPEC.sinks) & (at < DOCUMENT - SPEC.last)
    keys = np.concatenate([k[at][~gone], k[at][gone].mean(axis=0)[None]])
    values = np.concatenate([v[at][~gone], v[at][gone].mean(axis=0)[None]])
    scores = keys @ q / np.sqrt(HEAD_DIM)
    scores[-1] += np.log(gone.sum())
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ values


def on_mesh(mesh, cache):
    return jax.device_put(
        cache, jax.tree.map(lambda spec: sharding(mesh, spec), cache.partition_specs())
    )


def document(mesh, k, v, dtype, parts):
    """What a layer keeps of [length, kv_heads, head_dim], with a row on each data device."""
    rows, context, shards = mesh.shape.values()
    zigzag = zigzag_of(CHUNK, context)
    store = empty_kv_array((rows, KV_HEADS, 256 * context, HEAD_DIM), dtype)
    order = zigzag.permutation(256 * context)

    def laid(x):
        x = np.pad(x, ((0, 256 * context - DOCUMENT), (0, 0), (0, 0)))[order]
        return store.quantize(jnp.broadcast_to(jnp.asarray(x).swapaxes(0, 1), store.data.shape))

    if store.scale is not None:
        k = np.asarray(hadamard_transform(jnp.asarray(k)))
    whole = on_mesh(mesh, FullCache(laid(k), laid(v), zigzag))
    with jax.set_mesh(mesh):
        kept = jax.jit(lambda c, n: compress(c, n, parts, shards))(whole, jnp.full(rows, DOCUMENT))
    return DocumentCache(shared_layers((kept,), [LayerKind()]), np.int32(DOCUMENT), ())


def own_cache(mesh, dtype):
    context = mesh.shape["context"]
    shape = len(LENGTHS), KV_HEADS, 256 * context, HEAD_DIM
    store = empty_kv_array(shape, dtype)
    cache = FullCache(store, store, zigzag_of(CHUNK, context))
    if store.scale is not None:
        zeros = jnp.zeros((*shape[:2], 64, HEAD_DIM))
        cache = FloatTail(cache, FloatBlock(zeros, zeros))
    return on_mesh(mesh, cache)


@pytest.mark.parametrize(
    "sizes, dtype, error",
    [
        ((2, 2, 2), "float32", 3e-6),
        *(
            pytest.param(*case, marks=pytest.mark.slow("all axes together are quick"))
            for case in (
                ((1, 1, 1), "float32", 3e-6),
                ((2, 1, 2), "float32", 3e-6),
                ((1, 1, 1), "int8", 3e-2),
                ((1, 4, 2), "int8", 3e-2),
            )
        ),
    ],
)
def test_they_see_what_is_kept_and_what_was_dropped_as_one(sizes, dtype, error, monkeypatch):
    monkeypatch.setattr(shared_prefix, "_GATHERED_QUERIES", 24)  # a chunk takes several pieces
    rng = np.random.default_rng(0)
    mesh = make_mesh(dict(zip(("data", "context", "model"), sizes, strict=True)))
    per_shard = KV_HEADS // sizes[2]
    parts = HeadSplit(1, ((per_shard - 1, SPEC),))
    shape = len(LENGTHS), DOCUMENT + max(LENGTHS) + CHUNK + DECODED, KV_HEADS, HEAD_DIM
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((*shape[:2], HEADS, HEAD_DIM)).astype(np.float32)
    k[:, :DOCUMENT], v[:, :DOCUMENT] = k[0, :DOCUMENT], v[0, :DOCUMENT]
    held = document(mesh, k[0, :DOCUMENT], v[0, :DOCUMENT], dtype, parts)
    lengths = DOCUMENT + np.array(LENGTHS)

    def step(decode):
        def run(q, k, v, at, lengths, own):
            (cache,) = attach((own,), held)
            out, cache = update_and_attend(mesh, q, k, v, at, lengths, cache, decode)
            return out, detach((cache,))[0]

        return jax.jit(run)

    own, prefill, decode = own_cache(mesh, dtype), step(False), step(True)
    rows, found = np.arange(len(LENGTHS))[:, None], {}
    for start in range(DOCUMENT, lengths.max(), CHUNK):
        at = np.tile(start + zigzag_of(CHUNK, sizes[1]).permutation(CHUNK), (len(rows), 1))
        out, own = prefill(*(x[rows, at] for x in (q, k, v)), at, lengths, own)
        out = np.asarray(out)
        found |= {(i, p): out[i, n] for i, row in enumerate(at) for n, p in enumerate(row)}
    for n in range(DECODED):
        at = lengths[:, None] + n
        out, own = decode(*(x[rows, at] for x in (q, k, v)), at, None, own)
        out = np.asarray(out)
        found |= {(i, p): out[i, 0] for i, (p,) in enumerate(at)}
    for row, length in enumerate(lengths):
        for position in [*range(DOCUMENT, length, 7), *range(length, length + DECODED)]:
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                each = q[row, position, head], k[row, :, kv], v[row, :, kv]
                if kv % per_shard < parts.whole:
                    scores = each[1][: position + 1] @ each[0].astype(float) / np.sqrt(HEAD_DIM)
                    weights = np.exp(scores - scores.max())
                    wanted = weights / weights.sum() @ each[2][: position + 1]
                else:
                    wanted = in_float64(*each, position)
                got = found[row, position].reshape(HEADS, HEAD_DIM)[head]
                np.testing.assert_allclose(got, wanted, atol=error)
