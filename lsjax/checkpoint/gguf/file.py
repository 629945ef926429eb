"""Opens a GGUF file."""

import dataclasses
import os
import sys

import gguf
import numpy as np

from lsjax.checkpoint.gguf.metadata import Metadata
from lsjax.runtime.errors import UserError

_MAGIC = b"GGUF"


class _Reader(gguf.GGUFReader):
    """The package's reader, over a plain array.

    It takes a slice for each token of the vocabulary, which takes much longer of a memmap.
    """

    @property
    def data(self) -> np.ndarray:
        return self._mapped

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._mapped = mapped.view(np.ndarray)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file, whose tensors are mapped into memory and not yet read.

    Attributes:
      path: path of the file.
      metadata: its key-value pairs.
      tensors: name -> tensor.
    """

    path: str
    metadata: Metadata
    tensors: dict[str, gguf.ReaderTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a GGUF file, reading all but the data of its tensors.

    Raises:
      UserError: the file cannot be read, is of another kind, cut off, or a part of several.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as f:
            magic = f.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if magic != _MAGIC:
        raise UserError(f"{path} is not a GGUF file; give one, or a model folder.")
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        raise UserError(
            f"{path} is cut off or damaged, or of a GGUF version that is not known; download it "
            "again."
        ) from None
    if (reader.endianess == gguf.GGUFEndian.BIG) != (sys.byteorder == "big"):
        raise UserError(f"{path} is in the byte order of other machines; use a usual GGUF file.")
    metadata = Metadata(path, reader.fields)
    parts = metadata.get("split.count", int, 1)
    if parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts; join them first with llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
