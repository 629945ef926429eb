"""Reads only those parts of a safetensors file that the devices of this process hold.

Orbax and safetensors read more: whole tensors, or a whole matrix row for a part of it.
"""

import io
import math

import jax
import numpy as np

from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.errors import UserError

Ranges = tuple[tuple[int, int], ...]


def read_rows(stored: TensorInfo, first: int, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads consecutive rows of a tensor onto the devices.

    Args:
      stored: tensor in the file.
      first: index of the first row to read.
      wanted: shape, dtype and sharding of the result.

    Raises:
      UserError: the file ends too early.
    """
    parts: dict[Ranges, np.ndarray] = {}
    with open(stored.path, "rb", buffering=0) as file:

        def part(index: tuple[slice, ...]) -> np.ndarray:
            sizes = zip(index, wanted.shape, strict=True)
            ranges = tuple(where.indices(size)[:2] for where, size in sizes)
            if ranges not in parts:  # several devices may hold the same part
                found = _read(file, stored, first, wanted.shape, ranges)
                parts[ranges] = found.astype(wanted.dtype, copy=False)
            return parts[ranges]

        return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)


def _read(
    file: io.RawIOBase, stored: TensorInfo, first: int, shape: tuple[int, ...], ranges: Ranges
) -> np.ndarray:
    out = np.empty([end - begin for begin, end in ranges], stored.numpy_dtype)
    itemsize = out.dtype.itemsize
    row_bytes = math.prod(shape[1:]) * itemsize
    at = stored.offset + (first + ranges[0][0]) * row_bytes
    if out.shape[1:] == shape[1:]:
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
