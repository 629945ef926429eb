"""A model folder, of either layout -> the parameter tree on a mesh."""

import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lsjax.checkpoint.hf_checkpoint import HFCheckpoint, expendable, open_hf, warn_unread
from lsjax.checkpoint.model_folder import read_model_config
from lsjax.checkpoint.orbax_checkpoint import OrbaxCheckpoint, is_orbax, open_orbax
from lsjax.checkpoint.stored import in_groups, total_bytes
from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.nn.parameters import abstract_parameters, unflatten
from lsjax.sharding import abstract_mesh


def load_parameters(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Reads a model's parameters onto a mesh.

    Host memory is bounded by a few tensors beyond what the parameters themselves take, and each
    process reads only what its own devices hold.

    Args:
      folder: a Hugging Face folder with safetensors files, or a converted one.
      config: the model, from read_config(folder).
      mesh: the devices; check_fits_mesh(config, mesh) has passed.
      dtype: the dtype that the parameters are wanted in, whatever they are stored in.
      progress: called with the bytes that were read since the last call; they sum up to
        checkpoint_bytes(folder).

    Returns:
      The nested tree of abstract_parameters(config, mesh, dtype), filled.

    Raises:
      UserError: whatever is wrong with the folder, naming the file and the tensor; found before
        any weight is read, except for damage within the data of a converted folder.
    """
    folder = os.fspath(folder)
    abstract = abstract_parameters(config, mesh, dtype)
    checkpoint = _open(folder, config, abstract)
    _note_unread(folder, config, checkpoint)
    params: dict[str, jax.Array] = {}
    for group in in_groups(checkpoint.stored.values()):
        params |= checkpoint.load(group, abstract)
        if progress is not None:
            progress(total_bytes(group))
    return unflatten(params)


def checkpoint_bytes(folder: str | os.PathLike[str], config: ModelConfig | None = None) -> int:
    """The bytes that load_parameters will read from a model folder.

    Args:
      folder: see load_parameters.
      config: from read_model_config(folder), which is called without it.

    Raises:
      UserError: its config.json or its checkpoint cannot be read.
    """
    folder = os.fspath(folder)
    config = config or read_model_config(folder)
    abstract = abstract_parameters(config, abstract_mesh((1, 1, 1)), config.dtype)
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
    silent = () if is_orbax(folder) else expendable(config)
    warn_unread(folder, tuple(name for name in checkpoint.unread if name not in silent))
