"""Reads only those parts of a safetensors file that the devices of this process hold.

Orbax and safetensors read more: whole tensors, or a whole matrix row for a part of it.
"""

import io
import math
from collections.abc import Sequence

import jax
import numpy as np

from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.runtime.errors import UserError

Ranges = tuple[tuple[int, int], ...]


def read_parts(stored: Sequence[TensorInfo], wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads a parameter onto the devices.

    Args:
      stored: where it is, or where its parts along the first axis are.
      wanted: shape, dtype and sharding of the parameter.

    Raises:
      UserError: a file ends too early.
    """
    parts: dict[Ranges, np.ndarray] = {}
    is_stack = len(stored[0].shape) < len(wanted.shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        sizes = zip(index, wanted.shape, strict=True)
        ranges = tuple(where.indices(size)[:2] for where, size in sizes)
        if ranges not in parts:  # several devices may hold the same part
            if is_stack:
                found = np.stack([_read(x, ranges[1:]) for x in stored[slice(*ranges[0])]])
            else:
                found = _read(stored[0], ranges)
            parts[ranges] = found.astype(wanted.dtype, copy=False)
        return parts[ranges]

    return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)


def _read(stored: TensorInfo, ranges: Ranges) -> np.ndarray:
    out = np.empty([end - begin for begin, end in ranges], stored.numpy_dtype)
    itemsize = out.dtype.itemsize
    row_bytes = math.prod(stored.shape[1:]) * itemsize
    at = stored.offset + ranges[0][0] * row_bytes
    with open(stored.path, "rb", buffering=0) as file:
        if out.shape[1:] == stored.shape[1:]:
            _fill(file, stored, at, out)
        else:
            at += ranges[1][0] * itemsize
            for i, row in enumerate(out):
                _fill(file, stored, at + i * row_bytes, row)
    return out


def _fill(file: io.RawIOBase, stored: TensorInfo, at: int, out: np.ndarray) -> None:
    left = memoryview(out.reshape(-1).view(np.uint8))
    file.seek(at)
    while left:
        count = file.readinto(left)
        if not count:
            raise UserError(f"{stored.path} ends within {stored.name!r}; download it again.")
        left = left[count:]
