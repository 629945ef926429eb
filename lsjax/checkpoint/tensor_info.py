"""Describes stored arrays and groups them for reading."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from lsjax.config import DTYPES
from lsjax.runtime.errors import UserError

# Arrays are read in groups of up to this many bytes (a larger array is a group by itself), so that
# host memory is bounded by the group and not by the checkpoint.
GROUP_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Location, shape and dtype of a stored array, known before its data is read.

    Attributes:
      name: name in the checkpoint.
      path: file or folder that holds the array.
      shape: shape of the array.
      dtype: numpy's name of the dtype, or the checkpoint's name if numpy has none.
      nbytes: size in bytes.
      offset: start of the data, in bytes from the beginning of the file; 0 in a folder.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int = 0

    def check(self, wanted: jax.ShapeDtypeStruct) -> None:
        """Refuses an array that the model cannot load.

        Raises:
          UserError: the array's shape is not that of `wanted`, or its dtype is not in
            lsjax.config.DTYPES, or not int8 where `wanted` is int8.
        """
        if self.shape != wanted.shape:
            raise UserError(
                f"{self.path}: {self.name!r} has the shape {list(self.shape)}, but config.json "
                f"asks for {list(wanted.shape)}; the two files are not of one model."
            )
        allowed = ("int8",) if wanted.dtype == jnp.int8 else DTYPES
        if self.dtype not in allowed:
            raise UserError(
                f"{self.path}: {self.name!r} holds {self.dtype} values; supported are "
                f"{', '.join(allowed)}, so use a checkpoint that is not quantized."
            )

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """Where a parameter is stored.

    Attributes:
      name: path of the parameter.
      parts: its parts along the first axis if it stacks tensors; else a single one, all of it.
    """

    name: str
    parts: tuple[TensorInfo, ...]

    @property
    def path(self) -> str:
        return self.parts[0].path

    @property
    def nbytes(self) -> int:
        return total_bytes(self.parts)

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return self.parts[0].numpy_dtype


Stored = TensorInfo | StoredParameter


def total_bytes(stored: Iterable[Stored]) -> int:
    return sum(item.nbytes for item in stored)


def in_groups(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Yields groups of adjacent arrays with one `path`: up to GROUP_BYTES, or one larger array."""
    group: list[Stored] = []
    size = 0
    for item in stored:
        if group and (item.path != group[0].path or size + item.nbytes > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(item)
        size += item.nbytes
    if group:
        yield group
