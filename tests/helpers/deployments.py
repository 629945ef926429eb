"""Layouts on devices, written on one line."""

from lsjax.distributed.sharding import abstract_mesh
from lsjax.planning import Deployment


def deployment(mesh, dtype, kv, chunk, batch, output, compression=None):
    return Deployment(
        mesh=abstract_mesh(mesh),
        dtype=dtype,
        kv_cache_dtype=kv,
        prefill_chunk=chunk,
        compression=compression,
        batch=batch,
        output_length=output,
    )
