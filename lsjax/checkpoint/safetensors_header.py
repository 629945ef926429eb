"""Reads the header of a safetensors file and finds all faults before the data is read."""

import json
import math
import os

import jax.numpy as jnp

from lsjax.checkpoint.tensor_info import TensorInfo
from lsjax.runtime.errors import UserError

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# The limit of the safetensors library. A larger number means that the file is of another kind.
_MAX_HEADER_BYTES = 100 * 10**6


def read_header(file: str) -> dict[str, TensorInfo]:
    """Returns the tensors of a safetensors file by name, in the order of their data.

    Raises:
      UserError: the file is not a safetensors file, is truncated, or has a corrupt header.
    """
    header, data_at, file_bytes = _read(file)
    try:
        return _parse(file, header, data_at, file_bytes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a corrupt safetensors header; download it again.") from None


def read_metadata(file: str) -> dict[str, str]:
    """Returns the metadata of a safetensors file, {} if it has none."""
    return _read(file)[0].get("__metadata__") or {}


def _read(file: str) -> tuple[dict, int, int]:
    """Returns the header, the offset of the data and the size of the file, both in bytes."""
    try:
        with open(file, "rb") as f:
            file_bytes = os.fstat(f.fileno()).st_size
            header_bytes = int.from_bytes(f.read(8), "little")
            if header_bytes > _MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
                raise UserError(
                    f"{file} is cut off within its header or is not a safetensors file "
                    f"({file_bytes} bytes); download it again."
                )
            header = f.read(header_bytes)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        found = json.loads(header)
        if not isinstance(found, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{file} has a corrupt safetensors header; download it again.") from None
    return found, 8 + header_bytes, file_bytes


def _parse(file: str, header: dict, data_at: int, file_bytes: int) -> dict[str, TensorInfo]:
    data_bytes = file_bytes - data_at
    tensors = {}
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        dtype = FLOATS.get(entry["dtype"], entry["dtype"])
        if not 0 <= begin <= end or (
            entry["dtype"] in FLOATS and end - begin != math.prod(shape) * jnp.dtype(dtype).itemsize
        ):
            raise UserError(
                f"{file} has a corrupt safetensors header: {name!r} does not take the bytes of its "
                "shape; download it again."
            )
        if end > data_bytes:
            raise UserError(
                f"{file} is cut off: {name!r} needs {end} bytes of data, but {data_bytes} are "
                "there; download it again."
            )
        tensors[name] = TensorInfo(name, file, shape, dtype, end - begin, data_at + begin)
    return tensors
