"""One array as a checkpoint stores it, and how many of them are read at a time."""

import dataclasses
from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from lsjax.config import DTYPES
from lsjax.errors import UserError

# Arrays are read this many bytes at a time (or one by one where one is larger), so that host
# memory is bounded by this and not by the checkpoint.
GROUP_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where an array lies, and what it is; known before its content is read.

    Attributes:
      name: its name in the checkpoint.
      path: the file or folder that holds it.
      shape: its shape.
      dtype: numpy's name of its dtype, or the checkpoint's where numpy has none.
      nbytes: its size in bytes.
      offset: where its data begins, in bytes from the beginning of the file; 0 in a folder.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int = 0

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses an array that the model cannot take.

        Raises:
          UserError: its shape is not `shape`, or its dtype is none of lsjax.config.DTYPES.
        """
        if self.shape != shape:
            raise UserError(
                f"{self.path}: {self.name!r} has the shape {list(self.shape)}, but config.json "
                f"asks for {list(shape)}; the two files are not of one model."
            )
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: {self.name!r} holds {self.dtype} values; supported are "
                f"{', '.join(DTYPES)}, so use a checkpoint that is not quantised."
            )

    @property
    def numpy_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def total_bytes(stored: Iterable[Stored]) -> int:
    return sum(item.nbytes for item in stored)


def in_groups(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Neighbours of one `path`, up to GROUP_BYTES of them or a single larger one."""
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
