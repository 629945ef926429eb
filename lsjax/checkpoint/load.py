"""Loads the parameters of a model folder, Hugging Face or converted, onto a mesh."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.checkpoint.hf_checkpoint import HFCheckpoint, open_hf, warn_unused, without_ignorable
from lsjax.checkpoint.model_folder import read_model_config
from lsjax.checkpoint.orbax_checkpoint import (
    OrbaxCheckpoint,
    holds_int8,
    is_orbax,
    open_orbax,
)
from lsjax.checkpoint.tensor_info import in_groups, total_bytes
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import abstract_mesh
from lsjax.nn.int8_weights import quantize_parameters
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.runtime.errors import UserError


def load_parameters(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    progress: Callable[[int], None] | None = None,
    weight_dtype: str = "auto",
) -> dict:
    """Loads a model's parameters onto a mesh.

    Host memory is bounded by a few tensors beyond the parameters themselves, and each process reads
    only the shards of its own devices. Matrices that are wanted in int8 are quantized as they are
    read, so a device holds a few of them in floats at a time.

    Args:
      folder: Hugging Face folder with safetensors files, or converted folder.
      config: model config, from read_model_config(folder).
      mesh: mesh that has passed check_fits_mesh(config, mesh.shape).
      dtype: dtype of the returned parameters, whatever the stored dtype is.
      progress: called with the number of bytes read since the last call; the calls sum to
        checkpoint_bytes(folder).
      weight_dtype: int8 to have matrices in int8; auto for `dtype`.

    Returns:
      The nested parameter tree, with the shapes, dtypes and shardings of
      abstract_parameters(config, mesh, dtype, weight_dtype).

    Raises:
      UserError: the folder is invalid, names the file and the tensor; or it holds int8 weights and
        others are wanted. It is raised before any weight is read, except for damage inside the data
        of a converted folder.
    """
    folder = os.fspath(folder)
    wanted = abstract_parameters(config, mesh, dtype, weight_dtype)
    if holds_int8(folder):
        if weight_dtype != "int8":
            raise UserError(
                f"{folder} holds int8 weights; use weight_dtype int8, or convert it to a Hugging "
                "Face folder."
            )
        read = wanted
    else:
        read = abstract_parameters(config, mesh, dtype)
    checkpoint = _open(folder, config, read)
    _note_unread(folder, config, checkpoint)
    stored = checkpoint.dtypes()
    read = {  # an int8 matrix as it is stored: it is quantized once it is read
        path: leaf.update(dtype=stored[path]) if wanted[path].dtype == jnp.int8 else leaf
        for path, leaf in read.items()
    }
    params: dict[str, jax.Array] = {}
    for group in in_groups(checkpoint.stored.values()):
        params |= quantize_parameters(checkpoint.load(group, read), wanted)
        if progress is not None:
            progress(total_bytes(group))
    return unflatten(params)


def checkpoint_bytes(folder: str | os.PathLike[str], config: ModelConfig | None = None) -> int:
    """Returns the number of bytes that load_parameters reads from a model folder.

    Args:
      folder: see load_parameters.
      config: result of read_model_config(folder); None to read it here.

    Raises:
      UserError: config.json or the checkpoint cannot be read.
    """
    folder = os.fspath(folder)
    config = config or read_model_config(folder)
    one, kind = abstract_mesh((1, 1, 1)), "int8" if holds_int8(folder) else "auto"
    abstract = abstract_parameters(config, one, config.dtype, kind)
    return total_bytes(_open(folder, config, abstract).stored.values())


def _open(
    folder: str, config: ModelConfig, abstract: dict[str, jax.ShapeDtypeStruct]
) -> HFCheckpoint | OrbaxCheckpoint:
    # config.json is the last file that a conversion writes, so a folder without it is unfinished.
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(
            f"{folder} is not a model folder: it holds no config.json, or its conversion was "
            "interrupted; give another folder or convert the model again."
        )
    return open_orbax(folder, abstract) if is_orbax(folder) else open_hf(folder, config, abstract)


def _note_unread(folder: str, config: ModelConfig, checkpoint: HFCheckpoint | OrbaxCheckpoint):
    unread = checkpoint.unread
    warn_unused(folder, unread if is_orbax(folder) else without_ignorable(config, unread))
