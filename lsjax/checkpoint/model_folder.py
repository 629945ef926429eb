"""Reads a model folder's config and corrects it from the weights in the folder."""

import dataclasses
import os

from lsjax.checkpoint.hf_checkpoint import vocabulary_tensors
from lsjax.checkpoint.hf_folder import aliases, stored_tensors
from lsjax.checkpoint.orbax_checkpoint import is_orbax, stored_parameters
from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.config import ModelConfig
from lsjax.families import read_config
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_COMPARED = 2**24  # bytes compared at a time


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads a model folder's config.json and sets tie_embeddings as the weights require.

    If the folder stores an embedding and a head that differ, they are untied even where config.json
    ties them, as in transformers. If one is stored and the other is its alias, they are tied even
    where config.json does not tie them.

    Raises:
      UserError: config.json is missing or invalid, or the folder holds an adapter.
    """
    folder = os.fspath(folder)
    for name in _ADAPTERS:
        if os.path.exists(os.path.join(folder, name)):
            raise UserError(
                f"{folder} holds an adapter ({name}), which is not applied; merge it into the "
                "model (peft's merge_and_unload), or remove it to run the model without."
            )
    config = read_config(folder)
    if is_orbax(folder):
        tied = config.tie_embeddings and "lm_head/weight" not in stored_parameters(folder)
    else:
        tied = _tied(folder, config)
    return (
        config
        if tied == config.tie_embeddings
        else dataclasses.replace(config, tie_embeddings=tied)
    )


def _tied(folder: str, config: ModelConfig) -> bool:
    found = stored_tensors(folder)
    names = vocabulary_tensors(config)
    here = [found[name] for name in names if name in found]
    if len(here) == 1 and not config.tie_embeddings:
        (missing,) = set(names) - {here[0].name}
        return aliases(here[0].path).get(missing) == here[0].name
    if len(here) < 2 or not config.tie_embeddings or _same(*here):
        return config.tie_embeddings
    note(
        f"config.json ties {names[0]} and {names[1]}, but the two differ: the second is used as "
        "the output head."
    )
    return False


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    """Returns whether two tensors have the same shape, dtype and bytes."""
    if (a.shape, a.dtype, a.nbytes) != (b.shape, b.dtype, b.nbytes):
        return False
    with open(a.path, "rb") as one, open(b.path, "rb") as other:
        for at in range(0, a.nbytes, _COMPARED):
            size = min(_COMPARED, a.nbytes - at)
            one.seek(a.offset + at)
            other.seek(b.offset + at)
            if one.read(size) != other.read(size):
                return False
    return True
