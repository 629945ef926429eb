"""Gated DeltaNet, token by token, straight from its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.nn.delta_rule import DeltaInputs


def delta_rule(state, inputs, starts=None):
    """In float64: S <- g S; d = beta (v - S k); S <- S + d k^T; y = S q. Shapes are the library's.

    S <- 0 before a token that starts a document.
    """
    state = np.asarray(state, np.float64)
    q, k, v, log_decay, beta = (
        np.asarray(getattr(inputs, name), np.float64)
        for name in ("q", "k", "v", "log_decay", "beta")
    )
    found = []
    for t in range(k.shape[1]):
        key = k[:, t, :, None, None]
        if starts is not None:
            state = np.where(starts[:, t, None, None, None, None], 0, state)
        state = np.exp(log_decay[:, t])[..., None, None] * state
        change = beta[:, t, ..., None] * (v[:, t] - np.sum(state * key, axis=-1))
        state = state + change[..., None] * key
        found.append(np.sum(state * q[:, t, :, None, None], axis=-1))
    return np.stack(found, axis=1), state


def random_inputs(length, batch=1, heads=2, group=2, key_dim=16, value_dim=8, seed=0, decay=0.02):
    """Tokens as layers make them: keys of norm 1, some heads that forget and some that hardly do.

    The state before them comes first.
    """
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, batch, length, heads, key_dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * key_dim**0.5
    rate = decay * 10.0 ** -np.arange(group)
    shape = batch, length, heads, group
    inputs = DeltaInputs(
        q=q,
        k=k,
        v=rng.standard_normal((*shape, value_dim)),
        log_decay=-rate * rng.exponential(size=shape),
        beta=rng.uniform(size=shape),
    )
    return rng.standard_normal((batch, heads, group, value_dim, key_dim)), inputs


def gated_delta_net(net, weights, x, begin, epsilon):
    """A Gated DeltaNet over whole rows, token by token, in the dtype of its weights.

    Args:
      net: sizes.
      weights: parameters of the layer.
      x: [batch, length, hidden].
      begin: [batch, length] first token of each token's document.
      epsilon: of the norm of the outputs.

    Returns:
      [batch, length, hidden].
    """
    batch, length, _ = x.shape
    since = jnp.arange(length) - begin
    keys, values = (net.key_heads, net.key_dim), (net.value_heads, net.value_dim)

    def project(name, shape):
        return jnp.dot(x, weights[name]["weight"].T, precision="highest").reshape(
            batch, length, *shape
        )

    def convolved(name, shape):
        y = project(name, (-1,))
        taps = weights[f"{name}_conv"][:, 0]
        total = 0
        for back in range(taps.shape[-1]):
            earlier = jnp.pad(y, ((0, 0), (back, 0), (0, 0)))[:, :length]
            total += jnp.where((since >= back)[..., None], earlier, 0) * taps[:, -1 - back]
        return jax.nn.silu(total).reshape(batch, length, *shape)

    def shared(x):  # by value head
        unit = x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
        return jnp.repeat(unit, net.group, axis=2)

    q = shared(convolved("q", keys)) / net.key_dim**0.5
    k, v = shared(convolved("k", keys)), convolved("v", values)
    beta = jax.nn.sigmoid(project("b", (net.value_heads,)))
    rate = jax.nn.softplus(project("a", (net.value_heads,)) + weights["dt_bias"])
    decay = jnp.exp(-jnp.exp(weights["A_log"]) * rate)

    def step(state, token):
        q, k, v, beta, decay, since = token
        state = jnp.where((since == 0)[:, None, None, None], 0, state)
        state = decay[..., None, None] * state
        change = beta[..., None] * (v - jnp.sum(state * k[:, :, None], axis=-1))
        state = state + change[..., None] * k[:, :, None]
        return state, jnp.sum(state * q[:, :, None], axis=-1)

    start = jnp.zeros((batch, *values, net.key_dim), x.dtype)
    tokens = (q, k, v, beta, decay, since)
    _, y = jax.lax.scan(step, start, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
    y = y.swapaxes(0, 1)
    y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    y = y * weights["norm"]["weight"] * jax.nn.silu(project("z", values))
    return jnp.dot(y.reshape(batch, length, -1), weights["o"]["weight"].T, precision="highest")
