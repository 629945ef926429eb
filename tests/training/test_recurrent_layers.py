"""Training of models with recurrent layers, against the recurrence token by token."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from golden.models.parameters import golden_parameters
from helpers.delta_rule import gated_delta_net
from helpers.golden_models import changed_config, mesh_of
from helpers.qwen3_5 import logits
from helpers.tiny_models import documents, in_parts

from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import CHUNK_SPEC, make_mesh, put_on_mesh, sharding
from lsjax.nn.attention import LayerInputs
from lsjax.nn.delta_net import GatedDeltaNet
from lsjax.nn.parameters import abstract_parameters, flatten, random_parameters, unflatten
from lsjax.training.layer_groups import repeated_groups
from lsjax.training.loss import ChunkSizes
from lsjax.training.step import Trainer

MESHES = ("111", "141", "212")
LENGTH = 96


def model():
    """A recurrence and a layer of attention, and both again."""
    config = changed_config("qwen3_5", 0)
    return dataclasses.replace(config, layers=config.layers * 2)


def parameters(config, mesh="111"):
    where = abstract_parameters(config, make_mesh(mesh_of(mesh)), "float32")
    found = flatten(golden_parameters(config))
    return unflatten({path: put_on_mesh(found[path], x.sharding) for path, x in where.items()})


def assert_close(found, expected, share):
    for name, grad in flatten(expected).items():
        room = share * np.abs(grad).max()
        np.testing.assert_allclose(flatten(found)[name], grad, rtol=0, atol=room, err_msg=name)


@functools.cache
def of_a_layer():
    """Inputs, begins and weights of the output; it and the gradients of the layer in float64."""
    config, rng = model(), np.random.default_rng(0)
    x, ways = rng.standard_normal((2, 2, LENGTH, config.hidden_size)).astype(np.float32)
    begin = documents(2, LENGTH, seed=1).begin
    weights = golden_parameters(config)["layers_0"]["delta_net"]
    (net,) = config.recurrences

    def loss(weights, x):
        y = gated_delta_net(net, weights, x, begin, config.norm_eps)
        return (y * ways).sum(), y

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (weights, x))
        (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*wide)
    return (x, begin, ways), jax.device_get((y, grads))


slow = pytest.mark.slow("a context axis is quick, where tokens are exchanged for heads")


@pytest.mark.parametrize("mesh", ["141", *(pytest.param(m, marks=slow) for m in ("111", "212"))])
def test_a_layers_gradients_are_those_of_float64(mesh):
    (x, begin, ways), (wanted, (of_weights, of_x)) = of_a_layer()
    config, devices = model(), make_mesh(mesh_of(mesh))
    assert len(np.unique(begin[0])) > 1
    module = GatedDeltaNet(*config.recurrences, config, devices)
    order = Zigzag(devices.shape["context"], LENGTH).permutation(LENGTH)
    x, begin, ways = (
        put_on_mesh(a[:, order], sharding(devices, CHUNK_SPEC)) for a in (x, begin, ways)
    )

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(weights, x):
        y, _ = module.apply({"params": weights}, x, LayerInputs(begin, begin=begin), None)
        return (y * ways).sum(), y

    params = parameters(config, mesh)["layers_0"]["delta_net"]
    (_, y), found = jax.device_get(jax.jit(loss)(params, x))
    back = np.argsort(order)
    np.testing.assert_allclose(y[:, back], wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
    assert_close({"x": found[1][:, back], **found[0]}, {"x": of_x, **of_weights}, 1e-5)


@functools.cache
def plain():
    """The loss and its gradients in float64, and how far those in float32 are from them."""
    config, batch = model(), documents(2, LENGTH)

    @jax.jit
    @jax.value_and_grad
    def of(params):
        scores = logits(config, params, batch.tokens, batch.begin)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
        return (losses * batch.weights).sum() / batch.weights.sum()

    narrow = golden_parameters(config)
    with jax.enable_x64(True):
        loss, grads = of(jax.tree.map(lambda x: np.asarray(x, np.float64), narrow))
        loss, grads = float(loss), jax.device_get(flatten(grads))
    found = jax.device_get(flatten(of(narrow)[1]))
    return loss, grads, {name: np.linalg.norm(found[name] - x) for name, x in grads.items()}


def trainer(mesh, optimizer):
    # So that a device has several chunks, and the last of them is filled up.
    chunks = ChunkSizes(mlp=10, logits=14)
    return Trainer(model(), make_mesh(mesh_of(mesh)), optimizer, "float32", chunks)


@pytest.mark.slow("half a minute of compiling; layers' gradients on a mesh are quick")
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_of_a_step_are_as_near_float64_as_the_plain_models(mesh):
    t = trainer(mesh, optax.trace(decay=0.0))  # whose state is the gradients
    state = t.init(parameters(t.config, mesh))
    state, metrics = t.step(state, in_parts(documents(2, LENGTH), 1), t.tables(LENGTH))
    loss, grads, errors = plain()
    assert float(metrics.loss) == pytest.approx(loss, rel=1e-5)
    for name, found in jax.device_get(flatten(state.opt_state.trace)).items():
        room = 2 * errors[name] + 1e-5 * np.linalg.norm(grads[name])
        assert np.linalg.norm(found - grads[name]) < room, name


@pytest.mark.slow("a minute of compiling; layers' gradients on a mesh are quick")
def test_a_run_of_training_is_the_same_on_every_mesh():
    runs = []
    for mesh in MESHES:
        t = trainer(mesh, optax.adamw(1e-3))
        state, tables, losses = t.init(parameters(t.config, mesh)), t.tables(LENGTH), []
        for _ in range(5):
            state, metrics = t.step(state, in_parts(documents(2, LENGTH), 1), tables)
            losses.append(float(metrics.loss))
        runs.append(losses)
    np.testing.assert_allclose(runs[1:], [runs[0]] * 2, rtol=1e-4)
    assert runs[0][-1] < 0.9 * runs[0][0]


def test_layers_are_scanned_in_the_groups_that_cover_most():
    sizes = [[len(groups), len(groups[0])] for groups in repeated_groups("DDDA" * 8)]
    assert sizes == [[8, 4]]
    groups = repeated_groups("MDDDADDDAX")
    assert groups == [[(0,)], [(1, 2, 3, 4), (5, 6, 7, 8)], [(9,)]]
    assert repeated_groups("AAAB") == [[(0,), (1,), (2,)], [(3,)]]


def test_fresh_layers_begin_as_their_modules_do():
    config = changed_config("qwen3_5", 0)
    params = flatten(random_parameters(config, make_mesh(""), "float32"))
    ones = ("delta_net/norm/weight", "A_log", "dt_bias")
    assert [name for name, x in params.items() if x.ndim == 1 and not x.any()] == [
        name for name in params if "norm" in name and not name.endswith(ones)
    ]
    assert all((x == 1).all() for name, x in params.items() if name.endswith(ones))
