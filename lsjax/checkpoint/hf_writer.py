"""Writes the weights of a Hugging Face folder."""

import json
import os
from collections.abc import Callable, Iterable

import jax
import numpy as np

from lsjax.checkpoint.hf_checkpoint import abstract_tensor
from lsjax.checkpoint.hf_folder import INDEX
from lsjax.checkpoint.safetensors_writer import aligned, nbytes, write_safetensors
from lsjax.config import ModelConfig
from lsjax.families import family_of

MAX_SHARD_BYTES = 5 * 10**9

Abstract = dict[str, jax.ShapeDtypeStruct]
Part = tuple[str, int | None]  # path of a parameter, and the index along its first axis or None


def write_weights(
    folder: str,
    config: ModelConfig,
    abstract: Abstract,
    arrays: Callable[[list[Part]], Iterable[np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the safetensors files, and an index if there are several.

    Args:
      folder: existing folder to write into.
      config: model config.
      abstract: shapes and dtypes of the parameters, by path.
      arrays: returns the given parts of parameters, in that order and with those dtypes.
      max_shard_bytes: limit on the tensor bytes in one file; a larger tensor gets its own file.
    """
    shards = _shards(config, abstract, max_shard_bytes)
    for file, shard in shards.items():
        write_safetensors(os.path.join(folder, file), shard, arrays(_parts(config, shard)))
    if len(shards) > 1:
        _write_index(os.path.join(folder, INDEX), shards)


def written_parts(
    config: ModelConfig, abstract: Abstract, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Part]:
    """Returns the parts that write_weights asks for, in the same order."""
    shards = _shards(config, abstract, max_shard_bytes).values()
    return [part for shard in shards for part in _parts(config, shard)]


def _parts(config: ModelConfig, shard: Abstract) -> list[Part]:
    """Returns the parts of parameters that a file's tensors hold, in the order of the file."""
    tensors = {tensor.name: tensor for tensor in family_of(config).tensors(config)}
    names = aligned(shard)
    return [(path, tensors[name].index) for name in names for path in tensors[name].params]


def _shards(config: ModelConfig, abstract: Abstract, max_shard_bytes: int) -> dict[str, Abstract]:
    """Returns file name -> its tensors, split and named as in transformers."""
    tensors = {t.name: abstract_tensor(t, abstract) for t in family_of(config).tensors(config)}
    shards: list[Abstract] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + nbytes(tensor) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes(tensor)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }


def _write_index(file: str, shards: dict[str, Abstract]) -> None:
    total = sum(nbytes(tensor) for shard in shards.values() for tensor in shard.values())
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
