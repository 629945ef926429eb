"""A checkpoint's tensor on its way to parameters: how it is read, and how it is laid out then.

A fused tensor holds several parameters, one below the other along its first axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lsjax.families import Tensor


def abstract_tensor(
    tensor: Tensor, abstract: dict[str, jax.ShapeDtypeStruct]
) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding to read a tensor with.

    One parameter is read as it will lie. Shards of a fused tensor's rows would not be shards of
    its parameters, so its rows stay together; splitting it then moves nothing between devices.
    """
    parts = [abstract[path] for path in tensor.params]
    first = parts[0]
    if len(parts) == 1:
        return first
    return jax.ShapeDtypeStruct(
        (sum(part.shape[0] for part in parts), *first.shape[1:]),
        first.dtype,
        sharding=NamedSharding(first.sharding.mesh, PartitionSpec(None, *first.sharding.spec[1:])),
    )


def split(
    tensor: Tensor, value: jax.Array, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The parameters that a tensor holds, each in its own sharding."""
    if len(tensor.params) == 1:
        return {tensor.params[0]: value}
    parts = [abstract[path] for path in tensor.params]
    sizes = tuple(part.shape[0] for part in parts)
    splitter = _splitter(sizes, tuple(part.sharding for part in parts))
    return dict(zip(tensor.params, splitter(value), strict=True))


@functools.cache
def _splitter(sizes: tuple[int, ...], shardings: tuple[NamedSharding, ...]):
    ends = np.cumsum(sizes)[:-1].tolist()
    return jax.jit(lambda value: tuple(jnp.split(value, ends)), out_shardings=shardings)
