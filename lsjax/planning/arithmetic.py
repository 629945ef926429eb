"""Bytes per device by arithmetic: exact for weights and cache, approximate for temporaries.

Temporaries are one reserve for all platforms; tests/ahead compares it with compiled programs.
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
from lsjax.planning.shared_document import document_specs, held_bytes, own_bytes

# What a prefill program holds beside weights and cache: this many vectors per token of a chunk, of
# the MLP's size (split over the model axis) and of the hidden size; and this share of a layer's
# weights, which a context axis splits and prefill gathers. On a CPU, XLA gathers all layers whole.
_MLP_VECTORS, _HIDDEN_VECTORS, _GATHERED = 2, 5, 0.2
_TPU_CODE_BYTES = 2 * 2**20  # of a layer's code, which lies in the memory of the data


def needs_of(
    config: ModelConfig, platform: str, deployment: Deployment, input_length: int
) -> dict[str, MemoryUsage]:
    """Returns the memory per device that "prefill" and "decode" need, and "read" of a document.

    Args:
      config: model configuration.
      platform: "cpu", "gpu" or "tpu".
      deployment: layout of the model on the devices.
      input_length: prompt length in tokens, without the document.
    """
    layer, rest = weight_bytes(config, deployment.mesh, deployment.dtype, deployment.weight_dtype)
    weights = config.num_layers * layer + rest
    cache = cache_bytes(config, platform, deployment, input_length)
    decode = _code_bytes(config, platform)
    prefill = _prefill_temporaries(config, platform, deployment, layer)
    if deployment.compression and deployment.compression.by_layer:
        spec = dataclasses.replace(deployment.cache_spec_for(input_length), policy=None)
        one = dataclasses.replace(config, layers=config.layers[:1])
        prefill += spec.nbytes(one, deployment.mesh, platform)
        prefill += hidden_bytes(config, deployment, input_length)
    programs = {
        "prefill": MemoryUsage(weights, cache, prefill),
        "decode": MemoryUsage(weights, cache, decode),
    }
    if not deployment.document_length:
        return programs
    alone = dataclasses.replace(deployment, batch=deployment.sizes["data"])
    document = document_specs(config, deployment, 1).document
    cache = document.nbytes(config, deployment.mesh, platform)
    read = _prefill_temporaries(config, platform, alone, layer)
    return {"read": MemoryUsage(weights, cache, read), **programs}


@functools.lru_cache
def weight_bytes(
    config: ModelConfig, mesh: AbstractMesh, dtype: str, weight_dtype: str = "auto"
) -> tuple[int, int]:
    """Returns the bytes per device of one layer's weights, and of all weights outside layers."""
    layer = rest = 0
    for path, leaf in abstract_parameters(config, mesh, dtype, weight_dtype).items():
        nbytes = _shard_bytes(leaf)
        if path.startswith("layers_0/"):
            layer += nbytes
        elif not path.startswith("layers_"):
            rest += nbytes
    return layer, rest


def cache_bytes(
    config: ModelConfig, platform: str, deployment: Deployment, input_length: int
) -> int:
    """Returns the bytes per device of the whole cache, with that of the document."""
    if deployment.document_length:
        own = own_bytes(config, platform, deployment, input_length)
        return held_bytes(config, platform, deployment) + own
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
    tokens = deployment.batch // data * deployment.prefill_chunk // context
    channels = _MLP_VECTORS * config.intermediate_size / model
    channels += _HIDDEN_VECTORS * config.hidden_size
    total = tokens * channels * jnp.dtype(deployment.dtype).itemsize
    if context > 1:
        layers = config.num_layers if platform == "cpu" else _GATHERED
        total += layer * context * layers
    return int(total) + _code_bytes(config, platform)


def _code_bytes(config: ModelConfig, platform: str) -> int:
    return _TPU_CODE_BYTES * config.num_layers if platform == "tpu" else 0
