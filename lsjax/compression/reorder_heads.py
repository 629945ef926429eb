"""Reorders the heads of a model without changing its outputs."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lsjax.config import ModelConfig

HeadOrder = tuple[tuple[int, ...], ...]  # of each layer


def reorder_heads(params: dict, config: ModelConfig, kv_heads: HeadOrder) -> dict:
    """Returns the parameters with each layer's KV heads, and their query heads, in a new order.

    The output of a layer does not depend on the order of its heads.

    Args:
      params: parameters of the model, a nested dict; reordered projections are donated.
      config: model configuration.
      kv_heads: KV heads of each layer in their new order.
    """
    out = dict(params)
    for i, (order, queries) in enumerate(zip(kv_heads, query_heads(config, kv_heads), strict=True)):
        if order == tuple(range(config.num_kv_heads)):
            continue
        layer = dict(params[f"layers_{i}"])
        attention = dict(layer["attn"])
        for name, heads in (("q", queries), ("k", order), ("v", order)):
            parts = 1 + (name == "q" and config.gated_attention)  # a query and its gate
            channels = _channels(parts * config.head_dim, heads)
            attention[name] = {
                kind: _taken(x, channels, 0, x.sharding) for kind, x in attention[name].items()
            }
        weight = attention["o"]["weight"]  # each column has one input channel; a scale has none
        weight = _taken(weight, _channels(config.head_dim, queries), 1, weight.sharding)
        attention["o"] = attention["o"] | {"weight": weight}
        out[f"layers_{i}"] = layer | {"attn": attention}
    return out


def query_heads(config: ModelConfig, kv_heads: HeadOrder) -> HeadOrder:
    """Returns the query heads of each layer in their new order."""
    group = config.num_heads // config.num_kv_heads
    return tuple(
        tuple(head * group + j for head in order for j in range(group)) for order in kv_heads
    )


def _channels(width: int, heads: Sequence[int]) -> np.ndarray:
    return (np.asarray(heads)[:, None] * width + np.arange(width)).ravel()


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def _taken(x: jax.Array, channels: np.ndarray, axis: int, where: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.take(x, channels, axis=axis), where)
