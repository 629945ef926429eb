"""The gated delta rule against its definition in float64: steps, chunks and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.delta_rule import delta_rule, random_inputs

from lsjax.nn import delta_rule as rule

run_steps, run_chunks = jax.jit(rule.run_steps), jax.jit(rule.run_chunks)


def in_float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def errors(found, expected):
    """Largest error of outputs and state, as a share of the largest entry."""
    return [
        np.max(np.abs(np.asarray(x, np.float64) - y)) / np.max(np.abs(y))
        for x, y in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("length", [1, 7, 150])
def test_steps_and_chunks_are_the_definition(length):
    tokens = in_float32(random_inputs(length, batch=2))
    expected = delta_rule(*tokens)
    for run in (run_steps, run_chunks):
        assert max(errors(run(*tokens), expected)) < 2e-6


def documents(length, *begins):
    """Where documents start in two rows, [2, length]."""
    return np.stack([np.isin(np.arange(length), begin) for begin in begins])


def test_a_document_sees_nothing_of_those_before_it():
    tokens = in_float32(random_inputs(150, batch=2))
    starts = documents(150, [0, 3, 4, 64, 140], [70])
    expected = delta_rule(*tokens, starts)
    assert max(errors(run_chunks(*tokens, starts), expected)) < 2e-6


def test_tokens_of_nearly_one_key_are_the_definition():
    """Each of them takes back nearly all that the one before it wrote."""
    state, inputs = in_float32(random_inputs(130))
    one = inputs.k[:, :1] + 1e-3 * inputs.k
    inputs = inputs.replace(k=one, beta=np.ones_like(inputs.beta))
    expected = delta_rule(state, inputs)
    plain = max(errors(run_steps(state, inputs), expected))
    assert max(errors(run_chunks(state, inputs), expected)) < max(2 * plain, 2e-6)


def test_tokens_without_beta_and_decay_leave_the_state():
    state, inputs = in_float32(random_inputs(100, batch=2))
    padding = jnp.arange(100) >= jnp.array([100, 30])[:, None]
    inputs = inputs.replace(
        beta=jnp.where(padding[..., None, None], 0, inputs.beta),
        log_decay=jnp.where(padding[..., None, None], 0, inputs.log_decay),
    )
    _, after = run_chunks(state, inputs)
    first = jax.tree.map(lambda x: x[1:, :30], inputs)
    np.testing.assert_allclose(after[1:], run_chunks(state[1:], first)[1], atol=2e-6)
    _, same = run_steps(state, jax.tree.map(lambda x: x[:, 30:31], inputs))
    np.testing.assert_array_equal(same[1], state[1])


@pytest.mark.parametrize("starts", [None, documents(70, [0, 5, 6, 67], [64])])
def test_gradients_are_those_of_the_definition(starts):
    """Against central differences in float64, along random directions."""
    tokens = random_inputs(70, batch=2, heads=1, value_dim=4)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape) for x in delta_rule(*tokens)]

    def loss(run, *tokens):
        return sum((x * w).sum() for x, w in zip(run(*tokens, starts), weights, strict=True))

    grads = jax.jit(jax.grad(lambda *t: loss(run_chunks, *t), argnums=(0, 1)))(*in_float32(tokens))
    flat, where = jax.tree.flatten(tokens)
    for i, x in enumerate(flat):
        way = rng.standard_normal(x.shape)
        ends = [
            loss(delta_rule, *where.unflatten([*flat[:i], x + h * way, *flat[i + 1 :]]))
            for h in (1e-5, -1e-5)
        ]
        expected = (ends[0] - ends[1]) / 2e-5
        found = np.sum(np.asarray(jax.tree.leaves(grads)[i], np.float64) * way)
        scale = np.linalg.norm(np.asarray(jax.tree.leaves(grads)[i])) * np.linalg.norm(way)
        assert abs(found - expected) < 2e-6 * scale


@pytest.mark.slow("what an error would grow from is in 150 tokens as well")
def test_the_error_does_not_grow_with_the_length():
    """Over 65,536 tokens, with heads that hardly forget."""
    state, inputs = in_float32(random_inputs(65536, heads=1, decay=1e-3))
    expected, after = delta_rule(state, inputs)
    for run in (run_chunks, run_steps):
        y, end = run(state, inputs)
        error = np.abs(np.asarray(y, np.float64) - expected).reshape(16, -1).max(axis=-1)
        assert error.max() < 2e-6 * np.abs(expected).max()
        assert error[8:].max() < 1.5 * error[:8].max()
        assert errors([end], [after])[0] < 2e-6
