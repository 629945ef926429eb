"""Qwen3.5 over whole rows of packed documents, plainly: in the dtype of its weights."""

import jax
import jax.numpy as jnp
import numpy as np

from helpers.delta_rule import gated_delta_net


def logits(config, params, tokens, begin):
    """Returns [batch, length, vocab] logits of a dense model.

    Args:
      config: model configuration, without RoPE scaling.
      params: parameters.
      tokens: [batch, length] ids.
      begin: [batch, length] first token of each token's document.
    """
    x = params["embed"]["weight"][tokens]
    for i, kind in enumerate(config.layers):
        weights = params[f"layers_{i}"]
        y = _norm(config, weights["attn_norm"], x)
        if kind.recurrence:
            x += gated_delta_net(kind.recurrence, weights["delta_net"], y, begin, config.norm_eps)
        else:
            x += _attention(config, weights["attn"], y, begin)
        y, mlp = _norm(config, weights["mlp_norm"], x), weights["mlp"]
        x += _times(jax.nn.silu(_times(y, mlp["gate"])) * _times(y, mlp["up"]), mlp["down"])
    return _times(_norm(config, params["final_norm"], x), params["lm_head"])


def _attention(config, weights, x, begin):
    batch, length, _ = x.shape
    q, k, v = (_times(x, weights[n]).reshape(batch, length, -1, config.head_dim) for n in "qkv")
    q, gate = q[:, :, 0::2], q[:, :, 1::2]
    at = jnp.arange(length)
    q = _rotated(config, _norm(config, weights["q_norm"], q), at - begin)
    k = _rotated(config, _norm(config, weights["k_norm"], k), at - begin)
    k, v = (jnp.repeat(y, config.num_heads // config.num_kv_heads, axis=2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * config.head_dim**-0.5
    seen = (at <= at[:, None]) & (at >= begin[..., None])
    weight = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bhqk,bkhd->bqhd", weight, v, precision="highest") * jax.nn.sigmoid(gate)
    return _times(y.reshape(batch, length, -1), weights["o"])


def _rotated(config, x, positions):
    pairs = config.rotary_dim // 2
    frequencies = config.rope_theta ** -(np.arange(pairs) / pairs)
    angles = (positions[..., None] * frequencies)[:, :, None].astype(x.dtype)
    a, b, rest = jnp.split(x, [pairs, 2 * pairs], axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _norm(config, weights, x):
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    return x * scale * (1 + weights["weight"])


def _times(x, weights):
    return jnp.dot(x, weights["weight"].T, precision="highest")
