"""Bytes per device by arithmetic: exact for weights and cache, approximate for temporaries.

Temporaries are one reserve for all platforms; tests/ahead compares it with compiled programs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from lsjax.attention.sparse.rule import TILE
from lsjax.cache import CacheSpec
from lsjax.config import ModelConfig
from lsjax.inference.engine_config import round_up
from lsjax.nn.parameters import abstract_parameters
from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.shared_document import (
    document_specs,
    held_bytes,
    own_bytes,
    shared_bytes,
)

# What a prefill program holds beside weights and cache, and beside what an MLP or a recurrence says
# that it holds: this many vectors of the hidden size per token of a chunk; and this share of a
# layer's weights, which a context axis splits and prefill gathers: all, if its MLP multiplies by
# them at once. On a CPU, XLA gathers all layers whole.
_HIDDEN_VECTORS, _GATHERED = 5, 0.2
# Float32 vectors of the queries' size, of rows that attend to a document and to their own tokens:
# the two Partials, and what they are made of.
_BESIDE_DOCUMENT_VECTORS = 10
_ALL: Mapping[str, float] = {}
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
    layers, rest = weight_bytes(config, deployment.mesh, deployment.dtype, deployment.weight_dtype)
    weights = sum(layers) + rest
    cache = cache_bytes(config, platform, deployment, input_length)
    decode = _code_bytes(config, platform)
    prefill = _prefill_temporaries(config, platform, deployment, layers)
    if deployment.sparse_prefill:
        prefill += _choice_bytes(config, deployment, input_length)
    by_layer = deployment.compression is not None and deployment.compression.by_layer
    if by_layer and not deployment.document_length:
        spec = deployment.cache_spec_for(input_length)
        prefill += _one_layer_bytes(config, platform, deployment, spec)
        prefill += hidden_bytes(config, deployment, input_length)
    programs = {
        "prefill": MemoryUsage(weights, cache, prefill),
        "decode": MemoryUsage(weights, cache, decode),
    }
    if not deployment.document_length:
        return programs
    alone = dataclasses.replace(deployment, batch=deployment.sizes["data"], document_length=0)
    document = document_specs(config, deployment, 1).document
    read = _prefill_temporaries(config, platform, alone, layers)
    if by_layer:
        cache = shared_bytes(config, platform, deployment)
        read += _one_layer_bytes(config, platform, deployment, document)
        read += hidden_bytes(config, alone, deployment.document_length)
    else:
        cache = document.nbytes(config, deployment.mesh, platform)
    return {"read": MemoryUsage(weights, cache, read), **programs}


def _one_layer_bytes(
    config: ModelConfig, platform: str, deployment: Deployment, spec: CacheSpec
) -> int:
    """Returns the bytes per device of the largest whole cache of a layer, not yet compressed."""
    whole = dataclasses.replace(spec, policy=None)
    alone = [dataclasses.replace(config, layers=(kind,)) for kind in set(config.layers)]
    return max(whole.nbytes(one, deployment.mesh, platform) for one in alone)


@functools.lru_cache
def weight_bytes(
    config: ModelConfig, mesh: AbstractMesh, dtype: str, weight_dtype: str = "auto"
) -> tuple[tuple[int, ...], int]:
    """Returns the bytes per device of each layer's weights, and of all weights outside layers."""
    return _sum_by_layer(config, abstract_parameters(config, mesh, dtype, weight_dtype))


@functools.lru_cache
def active_weight_bytes(
    config: ModelConfig, mesh: AbstractMesh, dtype: str, weight_dtype: str, tokens: int
) -> tuple[tuple[int, ...], int]:
    """Does what weight_bytes does, for those that a step of some tokens reads.

    An MLP may read a share of its weights; see MLP.share_read.
    """

    def share(path: str) -> float:
        layer, _, name = path.partition("/mlp/")
        if not name:
            return 1.0
        kind = config.layers[int(layer.removeprefix("layers_"))]
        return config.mlp_of(kind).share_read(name, tokens)

    leaves = abstract_parameters(config, mesh, dtype, weight_dtype)
    return _sum_by_layer(config, leaves, {path: share(path) for path in leaves})


def _sum_by_layer(
    config: ModelConfig, leaves: dict[str, jax.ShapeDtypeStruct], shares: Mapping[str, float] = _ALL
) -> tuple[tuple[int, ...], int]:
    sums = dict.fromkeys((f"layers_{i}" for i in range(config.num_layers)), 0)
    rest = 0
    for path, leaf in leaves.items():
        nbytes, layer = int(_shard_bytes(leaf) * shares.get(path, 1)), path.split("/")[0]
        if layer in sums:
            sums[layer] += nbytes
        else:
            rest += nbytes
    return tuple(sums.values()), rest


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
    config: ModelConfig, platform: str, deployment: Deployment, layers: tuple[int, ...]
) -> int:
    data, context, model = deployment.sizes.values()
    tokens = deployment.batch // data * deployment.prefill_chunk // context
    itemsize = jnp.dtype(deployment.dtype).itemsize
    widest = max(x.held_channels(config.hidden_size, model) * itemsize for x in config.mlps)
    if deployment.document_length:
        query_channels = config.num_heads * config.head_dim / model
        widest += 4 * _BESIDE_DOCUMENT_VECTORS * query_channels
    widest = max(widest, *(x.held_bytes / model for x in config.recurrences), 0)
    total = tokens * (widest + _HIDDEN_VECTORS * config.hidden_size * itemsize)
    if context > 1:
        at_once = [config.mlp_of(kind).multiplies_at_once for kind in config.layers]
        gathered = [n * (1 if x else _GATHERED) for n, x in zip(layers, at_once, strict=True)]
        total += context * (sum(layers) if platform == "cpu" else max(gathered))
    return int(total) + _code_bytes(config, platform)


def _choice_bytes(config: ModelConfig, deployment: Deployment, input_length: int) -> int:
    """Returns the bytes of the scores by which a tile of queries chooses its blocks of keys.

    They are held as they are and as weights. With dual chunk attention others choose.
    """
    data, _, model = deployment.sizes.values()
    blocks = deployment.cache_spec_for(input_length).capacity // TILE
    arrays = 3 if config.rope_scaling.kind == "dual_chunk" else 2
    return arrays * deployment.batch // data * config.num_heads // model * TILE * blocks * 4


def _code_bytes(config: ModelConfig, platform: str) -> int:
    return _TPU_CODE_BYTES * config.num_layers if platform == "tpu" else 0
