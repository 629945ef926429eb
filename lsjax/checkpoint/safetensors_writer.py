"""Writes safetensors files as a stream, so that no more than one array is in memory.

The writer of the safetensors library takes all tensors of a file at once.
"""

import json
import os
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lsjax.checkpoint.safetensors_header import FLOATS

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def aligned(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the tensors in file order: widest dtypes first, so that all of them are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def write_safetensors(
    file: str, tensors: Mapping[str, jax.ShapeDtypeStruct], arrays: Iterable[np.ndarray]
) -> None:
    """Writes one safetensors file.

    Args:
      file: path of the file.
      tensors: tensor name -> shape and dtype (one of lsjax.config.DTYPES).
      arrays: contents of the tensors, in the order of aligned(tensors). A tensor may come as
        several arrays, concatenated along the first axis.

    Raises:
      ValueError: the total size of the arrays is not that of `tensors`.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in aligned(tensors).items():
        begin, end = end, end + nbytes(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        written = 0
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            f.write(data)
            written += data.nbytes
    if written != end:
        raise ValueError(f"{os.path.basename(file)} takes {end} bytes, not {written}.")


def nbytes(tensor: jax.ShapeDtypeStruct) -> int:
    return tensor.size * tensor.dtype.itemsize
