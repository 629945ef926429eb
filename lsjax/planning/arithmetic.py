"""Bytes a device by arithmetic: weights and cache exactly, temporaries nearly.

How temporaries follow from a model's sizes was read off programs that were compiled; tests/ahead
compares.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.cache import CacheSpec, empty_layer
from lsjax.compression.shapes import compressed_shapes
from lsjax.config import ModelConfig
from lsjax.nn.parameters import abstract_parameters
from lsjax.planning.layout import Layout
from lsjax.planning.needs import Needs
from lsjax.requests import round_up
from lsjax.sharding import compressed_cache_spec, layer_cache_spec, sharding


@dataclasses.dataclass(frozen=True)
class _Temporaries:
    """Of prefill on a platform; what comes in pairs is without and with a model axis.

    Attributes:
      mlp: how many vectors of the MLP's size each token of a chunk takes.
      hidden: the same, of the hidden size.
      gathered: how much of a layer's weights, or of a model axis' part of them, is whole at once
        where a context axis splits them.
      layer_bytes: of each layer's own, code above all.
      elsewhere: bytes, at most half of all, that lie in memory of another kind.
    """

    mlp: float
    hidden: tuple[float, float]
    gathered: tuple[float, float]
    layer_bytes: int = 0
    elsewhere: int = 0


_TEMPORARIES = {
    "cpu": _Temporaries(mlp=3, hidden=(2, 2), gathered=(1, 1)),
    "gpu": _Temporaries(mlp=2, hidden=(3, 5), gathered=(0.9, 0.9)),
    "tpu": _Temporaries(2, (0.5, 7), (0.4, 2.5), layer_bytes=2 * 2**20, elsewhere=100 * 2**20),
}


def needs_of(
    config: ModelConfig, platform: str, layout: Layout, input_length: int
) -> dict[str, Needs]:
    """What "prefill" and "decode" take on a platform, "cpu", "gpu" or "tpu"."""
    layer, rest = weight_bytes(config, layout.mesh, layout.dtype)
    weights = config.num_layers * layer + rest
    cache = cache_bytes(config, platform, layout, input_length)
    decode = _TEMPORARIES[platform].layer_bytes * config.num_layers
    prefill = _prefill_temporaries(config, platform, layout, layer)
    if layout.compression and not layout.compression.razor.streaming:
        spec = layout.cache_spec(input_length)
        prefill += _layer_bytes(config, platform, layout, spec)
        prefill += hidden_bytes(config, layout, input_length)
    return {
        "prefill": Needs(weights, cache, prefill),
        "decode": Needs(weights, cache, decode),
    }


@functools.lru_cache
def weight_bytes(config: ModelConfig, mesh: tuple[int, int, int], dtype: str) -> tuple[int, int]:
    """Of a layer, and of what is not in layers, a device."""
    devices = Layout(mesh, dtype, dtype, 1, 1, 1).abstract_mesh
    layer = rest = 0
    for path, leaf in abstract_parameters(config, devices, dtype).items():
        nbytes = _shard_bytes(leaf, leaf.sharding)
        if path.startswith("layers_0/"):
            layer += nbytes
        elif not path.startswith("layers_"):
            rest += nbytes
    return layer, rest


def cache_bytes(config: ModelConfig, platform: str, layout: Layout, input_length: int) -> int:
    """Of the whole cache, a device."""
    spec = layout.cache_spec(input_length)
    if layout.compression is None:
        return config.num_layers * _layer_bytes(config, platform, layout, spec)
    context = layout.sizes["context"]
    layers = compressed_shapes(config, spec, layout.compression, input_length, context, platform)
    return sum(_bytes(layer, compressed_cache_spec(layer), layout) for layer in layers)


def _layer_bytes(config: ModelConfig, platform: str, layout: Layout, spec: CacheSpec) -> int:
    """Of one layer's cache with all positions, a device."""
    layer = jax.eval_shape(lambda: empty_layer(config, spec, platform))
    return _bytes(layer, layer_cache_spec(layer), layout)


def hidden_bytes(config: ModelConfig, layout: Layout, input_length: int) -> int:
    """Of the hidden states of all tokens, which a prefill layer by layer holds, a device."""
    data, context, _ = layout.mesh
    tokens = layout.batch // data * round_up(input_length, layout.prefill_chunk) // context
    return tokens * config.hidden_size * jnp.dtype(layout.dtype).itemsize


def _bytes(tree: Any, specs: Any, layout: Layout) -> int:
    """Of arrays that lie as their specs say, a device."""
    placed = jax.tree.map(lambda s: sharding(layout.abstract_mesh, s), specs)
    return sum(map(_shard_bytes, *map(jax.tree.leaves, (tree, placed))))


def _shard_bytes(x: jax.ShapeDtypeStruct, placed: jax.sharding.NamedSharding) -> int:
    return math.prod(placed.shard_shape(x.shape)) * x.dtype.itemsize


def _prefill_temporaries(config: ModelConfig, platform: str, layout: Layout, layer: int) -> int:
    data, context, model = layout.mesh
    takes, split = _TEMPORARIES[platform], int(model > 1)
    tokens = layout.batch // data * layout.prefill_chunk // context
    channels = takes.mlp * config.intermediate_size / model
    channels += takes.hidden[split] * config.hidden_size
    total = tokens * channels * jnp.dtype(layout.dtype).itemsize
    if context > 1:
        # XLA gathers the weights of all layers at once on a CPU.
        layers = config.num_layers if platform == "cpu" else 1
        total += takes.gathered[split] * layer * context * layers
    total -= min(takes.elsewhere, total / 2)
    if context > 1 and platform == "tpu":  # what the ring holds of a chunk
        total += 6 * tokens * config.hidden_size * jnp.dtype(layout.dtype).itemsize
    total += takes.layer_bytes * config.num_layers
    return int(total)
