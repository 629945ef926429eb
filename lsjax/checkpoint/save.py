"""Saves a parameter tree on a mesh as a converted folder or a Hugging Face folder."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lsjax.checkpoint.atomic_directory import atomic_directory
from lsjax.checkpoint.hf_writer import Part, write_weights, written_parts
from lsjax.checkpoint.orbax_checkpoint import save_all
from lsjax.checkpoint.sidecar_files import copy_sidecar_files, sidecar_bytes
from lsjax.distributed.multihost import broadcast_from_primary, to_host
from lsjax.families import parse_config
from lsjax.nn.parameters import flatten
from lsjax.runtime.primary import is_primary


def save_parameters(params: dict, like: str | os.PathLike[str], out: str | os.PathLike[str]):
    """Writes a converted folder, which can be loaded onto any mesh.

    Each process writes the shards of its own devices, so all processes must share the disk.

    Args:
      params: parameter tree, as load_parameters returns it.
      like: model folder whose config, tokenizer and generation files are copied.
      out: folder to create; it appears only when it is complete.

    Raises:
      UserError: `out` is taken, or the disk is too small.
    """
    like, out = os.fspath(like), os.fspath(out)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + sidecar_bytes(like)
    with contextlib.ExitStack() as stack:
        folder = broadcast_from_primary(lambda: stack.enter_context(atomic_directory(out, nbytes)))
        save_all(folder, params)
        if is_primary():
            copy_sidecar_files(like, folder)
    broadcast_from_primary(lambda: out)  # no process continues before the folder exists


def export_parameters(
    params: dict,
    hf_config: Mapping[str, Any],
    like: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    without: Collection[str] = (),
) -> None:
    """Writes a Hugging Face folder, in the dtype that its config.json names.

    Only the primary process writes. Parameters are gathered into host memory one at a time.

    Args:
      params: parameter tree in any dtype, on a mesh or in host memory.
      hf_config: content of config.json.
      like: folder whose tokenizer, generation and license files are copied; None copies none.
      out: folder to create; it appears only when it is complete.
      without: names of files in `like` that are not copied.

    Raises:
      UserError: `out` is taken, or the disk is too small.
    """
    out, flat, config = os.fspath(out), flatten(params), parse_config(hf_config)
    dtype = jax.numpy.dtype(config.dtype)
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in flat.items()}

    def arrays(parts: list[Part]) -> Iterator[np.ndarray]:
        for path, index in parts:
            part = flat[path] if index is None else flat[path][index]
            yield to_host(jax.numpy.asarray(part, dtype))

    nbytes = dtype.itemsize * sum(leaf.size for leaf in abstract.values())
    nbytes += sidecar_bytes(os.fspath(like)) if like else 0
    with contextlib.ExitStack() as stack:
        folder = broadcast_from_primary(lambda: stack.enter_context(atomic_directory(out, nbytes)))
        if not is_primary():
            for _ in arrays(written_parts(config, abstract)):  # gathering needs every process
                continue
        else:
            write_weights(folder, config, abstract, arrays)
            if like:
                copy_sidecar_files(os.fspath(like), folder, without)
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
                f.write(json.dumps(hf_config, indent=2) + "\n")
    broadcast_from_primary(lambda: out)  # no process continues before the folder exists
