"""Bytes per device by arithmetic: exact for weights and cache, approximate for temporaries.

The formula for temporaries was fitted to compiled programs; tests/ahead compares the two.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lsjax.config import ModelConfig
from lsjax.inference.engine_config import round_up
from lsjax.nn.parameters import abstract_parameters
from lsjax.planning.deployment import Deployment, MemoryUsage


@dataclasses.dataclass(frozen=True)
class _Temporaries:
    """Temporaries of prefill on a platform.

    Pairs hold a value without a model axis and one with it.

    Attributes:
      mlp: number of vectors of the MLP's size (split over the model axis) per token of a chunk.
      hidden: number of vectors of the hidden size per token of a chunk.
      gathered: share of a layer's weights (of one shard of the model axis) that is gathered at
        once if a context axis splits them.
      layer_bytes: further bytes per layer, mostly code.
      elsewhere: bytes that lie in another kind of memory; at most half of the temporaries.
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
    config: ModelConfig, platform: str, deployment: Deployment, input_length: int
) -> dict[str, MemoryUsage]:
    """Returns the memory per device that "prefill" and "decode" need.

    Args:
      config: model configuration.
      platform: "cpu", "gpu" or "tpu".
      deployment: layout of the model on the devices.
      input_length: prompt length in tokens.
    """
    layer, rest = weight_bytes(config, deployment.mesh, deployment.dtype)
    weights = config.num_layers * layer + rest
    cache = cache_bytes(config, platform, deployment, input_length)
    decode = _TEMPORARIES[platform].layer_bytes * config.num_layers
    prefill = _prefill_temporaries(config, platform, deployment, layer)
    if deployment.compression and deployment.compression.by_layer:
        spec = dataclasses.replace(deployment.cache_spec_for(input_length), policy=None)
        one = dataclasses.replace(config, layers=config.layers[:1])
        prefill += spec.nbytes(one, deployment.mesh, platform)
        prefill += hidden_bytes(config, deployment, input_length)
    return {
        "prefill": MemoryUsage(weights, cache, prefill),
        "decode": MemoryUsage(weights, cache, decode),
    }


@functools.lru_cache
def weight_bytes(config: ModelConfig, mesh: AbstractMesh, dtype: str) -> tuple[int, int]:
    """Returns the bytes per device of one layer's weights, and of all weights outside layers."""
    layer = rest = 0
    for path, leaf in abstract_parameters(config, mesh, dtype).items():
        nbytes = _shard_bytes(leaf)
        if path.startswith("layers_0/"):
            layer += nbytes
        elif not path.startswith("layers_"):
            rest += nbytes
    return layer, rest


def cache_bytes(
    config: ModelConfig, platform: str, deployment: Deployment, input_length: int
) -> int:
    """Returns the bytes per device of the whole cache."""
    return deployment.cache_spec_for(input_length).nbytes(config, deployment.mesh, platform)


def hidden_bytes(config: ModelConfig, deployment: Deployment, input_length: int) -> int:
    """Returns the bytes per device of all hidden states, which layer-by-layer prefill holds."""
    data, context, _ = deployment.sizes.values()
    tokens = deployment.batch // data * round_up(input_length, deployment.prefill_chunk) // context
    return tokens * config.hidden_size * jnp.dtype(deployment.dtype).itemsize


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _prefill_temporaries(
    config: ModelConfig, platform: str, deployment: Deployment, layer: int
) -> int:
    data, context, model = deployment.sizes.values()
    takes, split = _TEMPORARIES[platform], int(model > 1)
    tokens = deployment.batch // data * deployment.prefill_chunk // context
    channels = takes.mlp * config.intermediate_size / model
    channels += takes.hidden[split] * config.hidden_size
    total = tokens * channels * jnp.dtype(deployment.dtype).itemsize
    if context > 1:
        # On a CPU, XLA gathers the weights of all layers at once.
        layers = config.num_layers if platform == "cpu" else 1
        total += takes.gathered[split] * layer * context * layers
    total -= min(takes.elsewhere, total / 2)
    if context > 1 and platform == "tpu":  # the ring's buffers for a chunk
        total += 6 * tokens * config.hidden_size * jnp.dtype(deployment.dtype).itemsize
    total += takes.layer_bytes * config.num_layers
    return int(total)
