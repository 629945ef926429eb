"""Converts a GGUF file to a Hugging Face folder."""

import json
import os
from collections.abc import Callable, Iterator

import numpy as np

from lsjax.checkpoint.atomic_directory import atomic_directory
from lsjax.checkpoint.hf_writer import MAX_SHARD_BYTES, Part, write_weights
from lsjax.checkpoint.safetensors_writer import nbytes
from lsjax.distributed.sharding import abstract_mesh
from lsjax.errors import UserError
from lsjax.families import parse_config
from lsjax.gguf.config import hf_config
from lsjax.gguf.file import GGUFFile
from lsjax.gguf.sidecar_files import sidecar_files
from lsjax.gguf.tensors import find_parameters
from lsjax.nn.parameters import abstract_parameters


def convert_gguf_to_hf(
    file: GGUFFile,
    out: str | os.PathLike[str],
    progress: Callable[[int], None] | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder from a GGUF file of llama, qwen2, qwen3 or glm4.

    Tensors are dequantized in blocks of rows, so that host memory is bounded by a block.

    Args:
      file: the file, from open_gguf.
      out: folder to create; it appears only when it is complete.
      progress: called with the number of bytes converted since the last call; the calls sum to
        file.nbytes, less what the RoPE scaling takes.
      dtype: dtype of the weights: float32, which holds every value exactly, or bfloat16, to which
        they are rounded.
      max_shard_bytes: limit on the tensor bytes in one file; a larger tensor gets its own file.

    Raises:
      UserError: the file holds something that is not supported or that a Hugging Face folder cannot
        express, `out` is taken, or the disk is too small.
    """
    raw = hf_config(file, dtype)
    sidecars, token_ids = sidecar_files(file.metadata)
    raw |= token_ids
    file.metadata.refuse_unread(file.metadata.get("general.architecture", str) + ".")
    try:
        config = parse_config(raw)
    except UserError as error:
        raise UserError(f"{file.path}, written as a config.json: {error}") from None
    abstract = abstract_parameters(config, abstract_mesh((1, 1, 1)), dtype)
    found = find_parameters(file, config, abstract)
    sidecars["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()  # the last file

    def arrays(parts: list[Part]) -> Iterator[np.ndarray]:
        for path, _ in parts:
            yield from found[path].read(np.dtype(abstract[path].dtype), progress)

    needed = sum(map(nbytes, abstract.values())) + sum(map(len, sidecars.values()))
    with atomic_directory(out, needed) as folder:
        write_weights(folder, config, abstract, arrays, max_shard_bytes)
        for name, content in sidecars.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(content)
