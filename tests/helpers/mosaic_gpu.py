"""Pallas' interpreter for Mosaic GPU, with what JAX 0.10's lacks."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state.types import TransposeTransform


class _Transposed(tuple):
    """A range of a buffer that is read transposed."""


@contextlib.contextmanager
def interpreter() -> Iterator[InterpretGPUParams]:
    """Yields parameters of an interpreter that takes transposed operands of products."""
    if jax.__version_info__ >= (0, 11):
        yield InterpretGPUParams()
        return
    to_range, read = utils.to_range, shared_memory.GPUSharedMemory.get_buffer_content

    def to_range_of_rows(transforms):
        kept = tuple(x for x in transforms if not isinstance(x, TransposeTransform))
        found = to_range(kept)
        return found if len(kept) == len(transforms) else _Transposed(found)

    def read_either_way(self, key, at, *args, **kwargs):
        content, *rest = read(self, key, at, *args, **kwargs)
        return (content.T if isinstance(at, _Transposed) else content), *rest

    with (
        mock.patch.object(utils, "to_range", to_range_of_rows),
        mock.patch.object(shared_memory.GPUSharedMemory, "get_buffer_content", read_either_way),
    ):
        yield InterpretGPUParams()
