"""The gated delta rule in float64, token by token, straight from its definition."""

import numpy as np

from lsjax.nn.delta_rule import DeltaInputs


def delta_rule(state, inputs):
    """S <- g S; d = beta (v - S k); S <- S + d k^T; y = S q; shapes as in lsjax.nn.delta_rule."""
    state = np.asarray(state, np.float64)
    q, k, v, log_decay, beta = (
        np.asarray(getattr(inputs, name), np.float64)
        for name in ("q", "k", "v", "log_decay", "beta")
    )
    found = []
    for t in range(k.shape[1]):
        key = k[:, t, :, None, None]
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
