"""A step of training is the same on every mesh, however its batch is cut and packed."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from helpers.plain_attention import causal_attention
from helpers.tiny_models import documents, in_parts, parameters, tiny

from lsjax.distributed.sharding import make_mesh
from lsjax.nn.decoder import Decoder
from lsjax.nn.parameters import flatten
from lsjax.runtime.errors import UserError
from lsjax.training.loss import ChunkSizes
from lsjax.training.step import Trainer

LENGTH, ALL_AXES = 32, "data=2,context=2,model=2"


# So that a device has several chunks, and the last of them is filled up.
SMALL = ChunkSizes(mlp=6, logits=5)


@functools.cache
def trainer(kind, mesh="", dtype="float32", chunks=SMALL):
    return Trainer(tiny(kind), make_mesh(mesh), optax.sgd(1.0), dtype, chunks)


def gradients(t, mesh, batch):
    """The loss, and the gradients by name: what a step of plain descent takes off."""
    before = jax.device_get(flatten(parameters(t.config, mesh)))
    state, metrics = t.step(t.init(parameters(t.config, mesh)), batch, t.tables(LENGTH))
    after = jax.device_get(flatten(state.params))
    taken = {name: before[name] - after[name] for name in before}
    norm = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in taken.values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    assert metrics.tokens == np.count_nonzero(batch.weights)
    return float(metrics.loss), taken


def plain_loss(kind, tables, params, batch):
    """Returns the loss and each token's loss, from all scores and all logits at once."""

    def whole(mesh, q, k, v, begin, window, slopes):
        return causal_attention(q, k, v, window, slopes, batch.begin)

    decoder = Decoder(tiny(kind), make_mesh(""), np.dtype("float32"), self_attention=whole)
    variables = {"params": params}
    hidden, _ = decoder.apply(variables, batch.tokens, batch.positions, tables, None)
    logits = decoder.apply(variables, hidden, method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return (losses * batch.weights).sum() / batch.weights.sum(), losses


@functools.cache
def expected(kind):
    """The loss, its gradients by name and all losses, plainly."""
    tables = trainer(kind).tables(LENGTH)
    of = jax.jit(jax.value_and_grad(functools.partial(plain_loss, kind, tables), has_aux=True))
    (mean, losses), grads = of(parameters(tiny(kind)), documents(4, LENGTH))
    return float(mean), jax.device_get(flatten(grads)), np.asarray(losses)


def assert_close(got, wanted):
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    for name, grad in wanted[1].items():
        room = 2e-5 * np.abs(grad).max() + 1e-7
        np.testing.assert_allclose(got[1][name], grad, rtol=0, atol=room, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "mesh", "parts"),
    [
        ("rotary", ALL_AXES, 2),
        pytest.param(
            *("alibi", "context=4,model=2", 2),
            marks=pytest.mark.slow("gradients with slopes are those of attention's tests"),
        ),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_model(kind, mesh, parts):
    t = trainer(kind, mesh)
    batch = documents(4, LENGTH)
    assert_close(gradients(t, mesh, in_parts(batch, parts)), expected(kind))
    losses = t.losses(parameters(t.config, mesh), batch, t.tables(LENGTH))
    np.testing.assert_allclose(losses, expected(kind)[2], rtol=2e-5, atol=2e-5)


def test_bfloat16_is_near_float32():
    t = trainer("rotary", dtype="bfloat16")
    mean, grads = gradients(t, "", in_parts(documents(4, LENGTH), 1))
    wanted, wanted_grads, _ = expected("rotary")
    assert mean == pytest.approx(wanted, rel=0.01)
    for name, grad in wanted_grads.items():
        cosine = np.vdot(grads[name], grad) / np.linalg.norm(grads[name]) / np.linalg.norm(grad)
        assert cosine > 0.99, name


def test_packed_documents_lose_what_each_loses_alone():
    """Those of the first of four rows."""
    t = trainer("rotary", ALL_AXES)
    params, tables = parameters(t.config, ALL_AXES), t.tables(LENGTH)
    packed = documents(4, LENGTH, seed=3, most=5)
    together = np.asarray(t.losses(params, packed, tables))[0]
    starts = [*np.unique(packed.begin[0]), LENGTH]
    assert len(starts) > 3
    for first, end in itertools.pairwise(starts):
        alone = jax.tree.map(lambda x: np.zeros_like(x), packed)
        for field in ("tokens", "targets"):
            getattr(alone, field)[0, : end - first] = getattr(packed, field)[0, first:end]
        alone.positions[:] = np.arange(LENGTH)
        losses = np.asarray(t.losses(params, alone, tables))[0, : end - first]
        np.testing.assert_allclose(losses, together[first:end], rtol=1e-5, atol=1e-5)


@pytest.mark.slow("a resumed run, whose state is restored by these shapes, is quick")
def test_state_lies_where_shapes_say():
    mesh = "context=2,model=2"
    t = Trainer(tiny("rotary"), make_mesh(mesh), optax.adamw(1e-3), "float32")
    state = t.init(parameters(t.config, mesh))
    state, _ = t.step(state, in_parts(documents(1, LENGTH), 1), t.tables(LENGTH))
    for x, like in zip(*map(jax.tree.leaves, (state, t.shapes())), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    moments = flatten(state.opt_state[0].mu)["layers_0/mlp/gate/weight"]
    assert moments.addressable_shards[0].data.size * 4 == moments.size
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("rows", "length", "said"),
    [(3, 32, "data=2"), (2, 30, "multiple of 4"), (2, 8196, "multiple of 512")],
)
def test_refuses_what_cannot_be_dealt_out(rows, length, said):
    t = trainer("rotary", "data=2,context=2")
    with pytest.raises(UserError, match=said):
        t.lower(rows, length)
    with pytest.raises(UserError, match=said):
        t.losses({}, documents(rows, length), None)


@pytest.mark.slow("what it would miss is memory; results are as they were")
def test_temporaries_of_a_device_shrink_as_devices_double():
    sizes = []
    for context in (1, 4):
        program = (
            trainer("rotary", f"context={context}", chunks=ChunkSizes()).lower(1, 2**18).compile()
        )
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert 0.18 < sizes[1] / sizes[0] < 0.33, sizes
