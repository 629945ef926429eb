"""The model in a GGUF file, and the Hugging Face folder that it becomes."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lsjax.checkpoint.atomic_directory import atomic_directory
from lsjax.checkpoint.gguf.config import hf_config
from lsjax.checkpoint.gguf.file import open_gguf
from lsjax.checkpoint.gguf.sidecar_files import sidecar_files
from lsjax.checkpoint.gguf.tensors import Rows, find_parameters
from lsjax.checkpoint.hf_writer import MAX_SHARD_BYTES, Part, write_weights
from lsjax.checkpoint.safetensors_writer import nbytes
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import abstract_mesh
from lsjax.families import parse_config
from lsjax.nn.parameters import abstract_parameters
from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A model in a GGUF file that has passed all checks; its weights are not read yet.

    Attributes:
      config: model config.
      abstract: shapes of the parameters, by path, and the dtype in which they will be written.
      rows: where the parameters are in the file, by path.
      files: content of the other files of a Hugging Face folder, by name; config.json comes last.
    """

    config: ModelConfig
    abstract: dict[str, jax.ShapeDtypeStruct]
    rows: dict[str, Rows]
    files: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes, as they are stored."""
        return sum(rows.nbytes for rows in self.rows.values())

    def save_hf(
        self,
        out: str | os.PathLike[str],
        progress: Callable[[int], None] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Writes a Hugging Face folder.

        Weights are dequantized in blocks of rows, so that host memory is bounded by a block.

        Args:
          out: folder to create; it appears only when it is complete.
          progress: called with the number of bytes read since the last call; the calls sum to
            nbytes.
          max_shard_bytes: limit on the tensor bytes in one file; a larger tensor gets its own file.

        Raises:
          UserError: `out` is taken, or the disk is too small.
        """

        def arrays(parts: list[Part]) -> Iterator[np.ndarray]:
            for path, _ in parts:
                yield from self.rows[path].read(self.abstract[path].dtype, progress)

        needed = sum(map(nbytes, self.abstract.values())) + sum(map(len, self.files.values()))
        with atomic_directory(os.fspath(out), needed) as folder:
            write_weights(folder, self.config, self.abstract, arrays, max_shard_bytes)
            for name, content in self.files.items():
                with open(os.path.join(folder, name), "wb") as f:
                    f.write(content)


def read_gguf(path: str | os.PathLike[str], dtype: str = "bfloat16") -> GGUFModel:
    """Reads all but the weights of a GGUF file of llama, qwen2, qwen3 or glm4.

    Args:
      path: path of the file.
      dtype: dtype in which the weights will be written: float32, which holds every value exactly,
        or bfloat16, to which they are rounded.

    Raises:
      UserError: the file cannot be read, or holds something that is not supported or that a Hugging
        Face folder cannot express.
    """
    file = open_gguf(path)
    raw = hf_config(file, dtype)
    files, token_ids = sidecar_files(file.metadata, raw["vocab_size"])
    raw |= token_ids
    file.metadata.refuse_unread(file.metadata.get("general.architecture", str) + ".")
    try:
        config = parse_config(raw)
    except UserError as error:
        raise UserError(f"{file.path}, as a config.json: {error}") from None
    abstract = abstract_parameters(config, abstract_mesh((1, 1, 1)), dtype)
    files["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
    return GGUFModel(config, abstract, find_parameters(file, config, abstract), files)
