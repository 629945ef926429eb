"""RazorAttention of a model with recurrent layers, whose state it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.models.parameters import golden_parameters
from helpers.golden_models import build, mesh_of
from helpers.oracle import attention, razor_attention

from lsjax.compression import HEAD_FILE, HeadScores, RazorConfig, write_scores
from lsjax.distributed.sharding import put_on_mesh
from lsjax.language_model import LanguageModel
from lsjax.nn.block import Block
from lsjax.nn.parameters import abstract_parameters, flatten, unflatten

SINKS, LAST, PROMPT, LENGTH = 3, 20, 70, 90
# Whether each KV head of the two layers of attention keeps everything.
WHOLE = np.array([[0, 1, 1, 0], [1, 0, 0, 1]], bool)


def model(mesh="111", razor=None, chunk=24):
    """Four layers: a recurrence, attention, and both again."""
    options = build("qwen3_5", mesh=mesh_of(mesh), chunk=chunk).options
    config = dataclasses.replace(options.config, layers=options.config.layers * 2)
    where = abstract_parameters(config, options.mesh, "float32")
    params = flatten(golden_parameters(config))
    params = unflatten({k: put_on_mesh(params[k], x.sharding) for k, x in where.items()})
    compression = razor and razor.resolve("", config, options.mesh.shape["model"])
    if compression:
        params = compression.reorder_heads(params, config)
    return LanguageModel(
        dataclasses.replace(options, config=config, compression=compression), params
    )


@pytest.fixture
def razor(tmp_path):
    """Settings with a file of head scores from which WHOLE follows."""
    path, induction = str(tmp_path / HEAD_FILE), np.repeat(WHOLE, 2, axis=1)
    write_scores(path, model().config, HeadScores(0.0 * induction, 1.0 * induction))
    return RazorConfig(0.5, 0.0, SINKS, LAST, 0.0, heads=path)


def rows():
    return np.random.default_rng(0).integers(0, 90, (2, LENGTH))


@functools.cache
def expected_nll():
    """Returns the losses of decoded tokens by full attention and by RazorAttention, in float64.

    Layers run one by one over whole rows, all of which are there twice.
    """
    lm, ids = model(), np.concatenate([rows(), rows()])
    decoder, at = lm.engine.decoder, np.arange(LENGTH)[None].repeat(len(ids), 0)

    def attend(whole, mesh, q, k, v, begin, window, slopes):
        def plainly(q, k, v):
            out, half = attention(q, k, v, at)[0], len(q) // 2
            kept = razor_attention(q[half:], k[half:], v[half:], PROMPT, SINKS, LAST)
            every = np.repeat(whole, q.shape[2] // len(whole))[:, None]
            out[half:] = np.where(every, out[half:], kept)
            return out.astype(q.dtype)

        return jax.pure_callback(plainly, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v)

    @functools.partial(jax.jit, static_argnums=0)
    def run(block, weights, x):
        return block.apply({"params": weights}, x, inputs[0], None)[0]

    @jax.jit
    def nll(params, x):
        hidden = decoder.apply({"params": params}, x, method="apply_final_norm")
        logits = decoder.apply({"params": params}, hidden, method="logits")[:, PROMPT:-1]
        targets = ids[:, PROMPT + 1 :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    inputs = decoder.layer_inputs(lm.engine.tables([LENGTH]), jnp.asarray(at))
    x = lm.params["embed"]["weight"][ids]
    for i, kind in enumerate(lm.config.layers):
        of_heads = functools.partial(attend, WHOLE[i // 2])
        attends = {} if kind.recurrence else {"self_attention": of_heads}
        x = run(Block(lm.config, lm.options.mesh, kind, **attends), lm.params[f"layers_{i}"], x)
    return np.split(np.asarray(nll(lm.params, x)), 2)


slow = pytest.mark.slow("one device is quick")


@pytest.mark.parametrize("mesh", ["111", *(pytest.param(m, marks=slow) for m in ("141", "212"))])
def test_attention_is_compressed_and_the_recurrence_is_not(mesh, razor):
    found, (full, kept) = model(mesh, razor).teacher_forced_nll(rows(), PROMPT), expected_nll()
    np.testing.assert_allclose(found, kept, rtol=0, atol=1e-4)
    assert np.abs(found - full).max() > 0.1


@pytest.mark.slow("prefill layer by layer is quick; this is the same cache, filled in chunks")
def test_a_prompt_in_one_chunk_may_be_compressed_as_it_comes(razor):
    streaming = dataclasses.replace(razor, streaming=True)
    lm = model(razor=streaming, chunk=PROMPT)
    np.testing.assert_allclose(
        lm.teacher_forced_nll(rows(), PROMPT), expected_nll()[1], rtol=0, atol=1e-4
    )
