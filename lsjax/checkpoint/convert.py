"""Converts a Hugging Face folder to a converted folder and back, bit for bit both ways.

A converted folder holds `params/`, an Orbax checkpoint of the parameter tree in the dtypes of the
original or with int8 matrices, and unchanged copies of the original's config, tokenizer and
generation files.
"""

import os
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from lsjax.checkpoint.atomic_directory import atomic_directory
from lsjax.checkpoint.hf_checkpoint import HFCheckpoint, open_hf, warn_unused
from lsjax.checkpoint.hf_writer import MAX_SHARD_BYTES, Abstract, Part, write_weights
from lsjax.checkpoint.model_folder import read_model_config
from lsjax.checkpoint.orbax_checkpoint import (
    OrbaxCheckpoint,
    finish_saving,
    holds_int8,
    is_orbax,
    open_orbax,
    save_part,
)
from lsjax.checkpoint.safetensors_writer import nbytes
from lsjax.checkpoint.sidecar_files import copy_sidecar_files, note_left_out, sidecar_bytes
from lsjax.checkpoint.tensor_info import in_groups, total_bytes
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import make_mesh
from lsjax.nn.int8_weights import float_matrix, int8_shapes, quantize_parameters, scale_path
from lsjax.nn.parameters import abstract_parameters
from lsjax.runtime.errors import UserError

Path = str | os.PathLike[str]
Progress = Callable[[int], None]


def convert_hf_to_orbax(
    hf_folder: Path, out: Path, progress: Progress | None = None, weight_dtype: str = "auto"
) -> None:
    """Writes a converted folder from a Hugging Face folder.

    Args:
      hf_folder: folder with config.json, safetensors files and the files that belong to them.
      out: folder to create; it appears only when it is complete.
      progress: called with the number of bytes converted since the last call; the calls sum to
        checkpoint_bytes(hf_folder).
      weight_dtype: int8 to quantize all matrices; auto to keep them as they are.

    Raises:
      UserError: the input is invalid, `out` is taken, or the disk is too small.
    """
    hf_folder, out = os.fspath(hf_folder), os.fspath(out)
    config = read_model_config(hf_folder)
    if is_orbax(hf_folder):
        raise UserError(f"{hf_folder} is converted already; give a Hugging Face folder.")
    abstract = _on_one_device(config)
    checkpoint = open_hf(hf_folder, config, abstract)
    abstract = _as_stored(abstract, checkpoint)
    wanted = int8_shapes(abstract, config) if weight_dtype == "int8" else abstract
    needed = sum(map(nbytes, wanted.values())) + sidecar_bytes(hf_folder)
    note_left_out(hf_folder)
    with atomic_directory(out, needed) as folder:
        warn_unused(hf_folder, checkpoint.unread)
        for group in in_groups(checkpoint.stored.values()):
            save_part(folder, quantize_parameters(checkpoint.load(group, abstract), wanted))
            if progress is not None:
                progress(total_bytes(group))
        finish_saving(folder)
        copy_sidecar_files(hf_folder, folder)


def convert_orbax_to_hf(
    orbax_folder: Path,
    out: Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder from a converted folder.

    int8 matrices become floats of the dtype that config.json names.

    Args:
      orbax_folder: folder that convert_hf_to_orbax wrote.
      out: folder to create; it appears only when it is complete.
      progress: called with the number of bytes converted since the last call; the calls sum to
        checkpoint_bytes(orbax_folder).
      max_shard_bytes: limit on the tensor bytes in one file; a larger tensor gets its own file.

    Raises:
      UserError: the input is invalid, `out` is taken, or the disk is too small.
    """
    orbax_folder, out = os.fspath(orbax_folder), os.fspath(out)
    if max_shard_bytes < 1:
        raise UserError(f"a file must be allowed at least 1 byte, not {max_shard_bytes}.")
    config = read_model_config(orbax_folder)
    if not is_orbax(orbax_folder):
        raise UserError(f"{orbax_folder} is not a converted folder: it holds no params folder.")
    abstract = _on_one_device(config)
    stored = int8_shapes(abstract, config) if holds_int8(orbax_folder) else abstract
    checkpoint = open_orbax(orbax_folder, stored)
    stored = _as_stored(stored, checkpoint)
    abstract = {
        path: leaf if stored[path].dtype == jnp.int8 else stored[path]
        for path, leaf in abstract.items()
    }
    needed = sum(map(nbytes, abstract.values())) + sidecar_bytes(orbax_folder)
    note_left_out(orbax_folder)
    with atomic_directory(out, needed) as folder:
        warn_unused(orbax_folder, checkpoint.unread)

        def arrays(parts: list[Part]) -> Iterator[np.ndarray]:
            return _arrays(checkpoint, parts, stored, abstract, progress)

        write_weights(folder, config, abstract, arrays, max_shard_bytes)
        copy_sidecar_files(orbax_folder, folder)


def _on_one_device(config: ModelConfig) -> Abstract:
    return abstract_parameters(config, make_mesh(""), config.dtype)


def _as_stored(abstract: Abstract, checkpoint: HFCheckpoint | OrbaxCheckpoint) -> Abstract:
    dtypes = checkpoint.dtypes()
    return {path: leaf.update(dtype=dtypes[path]) for path, leaf in abstract.items()}


def _arrays(
    checkpoint: OrbaxCheckpoint,
    parts: list[Part],
    stored: Abstract,
    wanted: Abstract,
    progress: Progress | None,
) -> Iterator[np.ndarray]:
    """Yields parts of parameters in order, holding a group and the parameters still in use."""
    last_use = {path: i for i, (path, _) in enumerate(parts)}
    paths = [p for path in last_use for p in (scale_path(path), path) if p in stored]
    groups = in_groups(checkpoint.stored[path] for path in dict.fromkeys(paths))
    held: dict[str, np.ndarray] = {}
    for i, (path, index) in enumerate(parts):
        while path not in held:
            group = next(groups)
            held |= {p: np.asarray(x) for p, x in checkpoint.load(group, stored).items()}
            if progress is not None:
                progress(total_bytes(group))
        if scale_path(path) in held:
            pair = {"weight": held[path], "scale": held.pop(scale_path(path))}
            held[path] = np.asarray(float_matrix(pair).astype(wanted[path].dtype))
        whole = held.pop(path) if last_use[path] == i else held[path]
        yield whole if index is None else whole[index]
