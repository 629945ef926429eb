"""StreamingLLM: what each query sees, from its definition in float64, and texts of any length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.attention.kv_array import empty_kv_array
from lsjax.cache import FullCache, RollingCache, update_and_attend
from lsjax.compression.streaming_llm import SinkCache
from lsjax.distributed.sequence_layout import zigzag_of
from lsjax.distributed.sharding import make_mesh
from lsjax.inference.options import resolve_options
from lsjax.positions.rotary import cos_sin, rotary_tables, rotate
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import held_out_passages

HEADS, HEAD_DIM, SINKS, WINDOW = 2, 16, 3, 20


def rotated(x, position):
    """[head_dim] rotated by a position in float64."""
    half = HEAD_DIM // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def in_float64(q, k, v, position):
    """One query over a list of kept tokens, whose positions are their places in that list."""
    seen = [p for p in range(position + 1) if p < SINKS or p > position - WINDOW]
    scores = [
        rotated(q[position], len(seen) - 1) @ rotated(k[p], i) / np.sqrt(HEAD_DIM)
        for i, p in enumerate(seen)
    ]
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum() @ np.array([v[p] for p in seen])


@pytest.mark.parametrize(
    "mesh, chunk",
    [((1, 1, 1), 16), ((1, 1, 1), 1), ((2, 2, 2), 32)],
)
def test_queries_see_the_sinks_and_the_window_at_their_places_in_the_cache(mesh, chunk):
    rng = np.random.default_rng(0)
    sizes = dict(zip(("data", "context", "model"), mesh, strict=True))
    devices, length = make_mesh(sizes), 96
    q, k, v = rng.standard_normal((3, 2, length, HEADS, HEAD_DIM)).astype("f4")
    tables = rotary_tables(config(), [length])
    zigzag = zigzag_of(chunk, mesh[1])
    # It rolls; on two devices it does not have to.
    capacity, kind = (48, RollingCache) if mesh[1] == 1 else (256 * mesh[1], FullCache)
    store = empty_kv_array((2, HEADS, capacity, HEAD_DIM), "float32")
    zeros = jnp.zeros((2, HEADS, SINKS, HEAD_DIM))
    cache = SinkCache(zeros, zeros, kind(store, store, zigzag), WINDOW)

    @jax.jit
    def step(q, k, v, at, cache):
        angles = cos_sin(tables, at)
        q, k = (rotate(x, *angles, interleaved=False) for x in (q, k))
        lengths = jnp.full(2, length)
        return update_and_attend(
            devices, q, k, v, at, lengths, cache, chunk == 1, slopes=None, tables=tables
        )

    found = np.zeros(q.shape)
    for start in range(0, length, chunk):
        at = start + zigzag.permutation(chunk)
        new = (jnp.asarray(x[:, at]) for x in (q, k, v))
        out, cache = step(*new, jnp.broadcast_to(at, (2, chunk)), cache)
        found[:, at] = out
    for row, position, head in np.ndindex(2, length, HEADS):
        own = (x[row, :, head].astype(np.float64) for x in (q, k, v))
        wanted = in_float64(*own, position)
        np.testing.assert_allclose(found[row, position, head], wanted, atol=5e-6)


def config():
    """The shipped model's, with heads of these sizes."""
    shipped = resolve_options(shipped_model_path()).config
    return dataclasses.replace(shipped, head_dim=HEAD_DIM, rotary_dim=HEAD_DIM, rope_theta=10000.0)


def text(lm, length):
    return lm.encode(held_out_passages(length + 16, 1)[0].prompt)[:length]


@pytest.mark.slow("a text of 32 times the trained length; what queries see is quick")
def test_perplexity_stays_flat_past_the_trained_length():
    """Up to 32 times of it, where that of full attention is 24 times as high at the end."""
    streaming, whole = lsjax.load(kv_compression="streaming_llm"), lsjax.load()
    trained = whole.config.trained_length
    ids = text(whole, 32 * trained)
    losses = streaming.token_nll(ids, chunk_size=1024)[0]
    within = np.exp(losses[: trained - 1].mean())
    for end in (2 * trained, 8 * trained, 32 * trained):
        assert np.exp(losses[: end - 1].mean()) < 1.05 * within
        assert np.exp(losses[end - trained : end - 1].mean()) < 1.1 * within
    past = whole.token_nll(ids[: 8 * trained], chunk_size=1024)[0]
    assert np.exp(past.mean()) > 3 * within


slow = pytest.mark.slow("what each query sees is quick, on one device and on eight")


@slow
def test_tokens_depend_on_nothing_but_the_text():
    def tokens(prefill_chunk=512, mesh="", lookup=0):
        lm = lsjax.load(
            kv_compression={"kind": "streaming_llm", "window": 300},
            kv_cache_dtype="int8",
            prefill_chunk=prefill_chunk,
            mesh=mesh,
        )
        ids = text(lm, 1400)
        options = {"ignore_eos": True, "prompt_lookup_num_tokens": lookup}
        return [c.token_ids for c in lm.generate([ids, ids[:700]], 24, **options)]

    assert tokens(prefill_chunk=96, mesh="data=2,context=2,model=2", lookup=5) == tokens()


@slow
def test_a_short_text_is_read_as_with_a_whole_cache():
    prompt = held_out_passages(400, 1)[0].prompt
    found = [lsjax.load(kv_compression=c).generate(prompt, 12) for c in ("none", "streaming_llm")]
    assert found[0][0].token_ids == found[1][0].token_ids


@pytest.mark.parametrize(
    "given, says",
    [
        ({"sinks": -1}, "number of tokens from 0"),
        ({"window": True}, "number of tokens from 1"),
        ({"window": 600}, "make sinks and window smaller"),
        ({"induction": 0.1}, "no setting 'induction'"),
        ({"kind": ["razor"]}, "is not known"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, says):
    with pytest.raises(UserError, match=says):
        resolve_options(shipped_model_path(), kv_compression={"kind": "streaming_llm"} | given)
