"""The parameter tree on a mesh -> a converted folder, or a Hugging Face one."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lsjax.checkpoint.carried import carried_bytes, carry
from lsjax.checkpoint.hf_writer import write_weights, written_paths
from lsjax.checkpoint.new_folder import new_folder
from lsjax.checkpoint.orbax_checkpoint import save_all
from lsjax.compression import HEAD_FILE
from lsjax.families import parse_config
from lsjax.hosts import from_the_first, is_first, to_host
from lsjax.nn.parameters import flatten


def save_parameters(params: dict, like: str | os.PathLike[str], out: str | os.PathLike[str]):
    """Writes a converted folder, which any mesh can restore.

    Of several processes each writes what its own devices hold; they share the disk.

    Args:
      params: the tree that load_parameters returns.
      like: the model folder whose config, tokenizer and generation files go with it.
      out: the folder to make; it appears when it is complete.

    Raises:
      UserError: `out` is taken, or the disk is too small.
    """
    like, out = os.fspath(like), os.fspath(out)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + carried_bytes(like)
    with contextlib.ExitStack() as stack:
        folder = from_the_first(lambda: stack.enter_context(new_folder(out, nbytes)))
        save_all(folder, params)
        if is_first():
            carry(like, folder)
    from_the_first(lambda: out)  # nobody goes on before it is there


def export_parameters(
    params: dict,
    hf_config: Mapping[str, Any],
    like: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
) -> None:
    """Writes a Hugging Face folder, in the dtype that its config.json says.

    Of several processes the first one writes; no more than one parameter is in its memory.

    Args:
      params: the tree, in any dtype, on a mesh or in the host's memory.
      hf_config: what config.json is to hold.
      like: the folder whose tokenizer, generation and licence files go with it; None for none.
        What is known of its heads is not carried along: these are other weights.
      out: the folder to make; it appears when it is complete.

    Raises:
      UserError: `out` is taken, or the disk is too small.
    """
    out, flat, config = os.fspath(out), flatten(params), parse_config(hf_config)
    dtype = jax.numpy.dtype(config.dtype)
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in flat.items()}

    def arrays(paths: list[str]) -> Iterator[np.ndarray]:
        for path in paths:
            yield to_host(jax.numpy.asarray(flat[path], dtype))

    nbytes = dtype.itemsize * sum(leaf.size for leaf in abstract.values())
    nbytes += carried_bytes(os.fspath(like)) if like else 0
    with contextlib.ExitStack() as stack:
        folder = from_the_first(lambda: stack.enter_context(new_folder(out, nbytes)))
        if not is_first():
            for _ in arrays(written_paths(config, abstract)):  # each holds some of it
                continue
        else:
            write_weights(folder, config, abstract, arrays)
            if like:
                carry(os.fspath(like), folder, but=(HEAD_FILE,))  # other weights, other heads
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
                f.write(json.dumps(hf_config, indent=2) + "\n")
    from_the_first(lambda: out)  # nobody goes on before it is there
