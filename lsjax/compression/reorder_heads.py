"""Reorders the heads of a model without changing its outputs."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lsjax.config import ModelConfig
from lsjax.nn.parameters import flatten, unflatten

HeadOrder = tuple[tuple[int, ...], ...]  # of each layer; a recurrent one has none


def reorder_heads(params: dict, config: ModelConfig, kv_heads: HeadOrder) -> dict:
    """Returns the parameters with each layer's KV heads, and their query heads, in a new order.

    The output of a layer does not depend on the order of its heads.

    Args:
      params: parameters of the model, a nested dict; reordered projections are donated.
      config: model configuration.
      kv_heads: KV heads of each layer in their new order.
    """
    flat = flatten(params)
    for path, (axis, channels) in moved_channels(config, kv_heads).items():
        if path in flat:
            flat[path] = _taken(flat[path], channels, axis, flat[path].sharding)
    return unflatten(flat)


def moved_channels(config: ModelConfig, kv_heads: HeadOrder) -> dict[str, tuple[int, np.ndarray]]:
    """Returns the parameters that a new order of heads moves, some of which a model may not have.

    By path, it is the axis that moves, and the old channel of each new one.
    """
    moved = {}
    for i, (order, queries) in enumerate(zip(kv_heads, query_heads(config, kv_heads), strict=True)):
        if order == tuple(range(len(order))):
            continue
        for name, heads in (("q", queries), ("k", order), ("v", order)):
            parts = 1 + (name == "q" and config.gated_attention)  # a query and its gate
            channels = _channels(parts * config.head_dim, heads)
            for kind in ("weight", "scale", "bias"):
                moved[f"layers_{i}/attn/{name}/{kind}"] = 0, channels
        # Each column has one input channel; a scale has none.
        moved[f"layers_{i}/attn/o/weight"] = 1, _channels(config.head_dim, queries)
    return moved


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
