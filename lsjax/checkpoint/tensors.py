"""A checkpoint's tensor on its way from parameters: what it is as a whole.

A fused tensor holds several parameters, one below the other along its first axis.
"""

import jax

from lsjax.families import Tensor


def abstract_tensor(
    tensor: Tensor, abstract: dict[str, jax.ShapeDtypeStruct]
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a tensor whose parameters are `abstract`."""
    parts = [abstract[path] for path in tensor.params]
    rows = sum(part.shape[0] for part in parts)
    return jax.ShapeDtypeStruct((rows, *parts[0].shape[1:]), parts[0].dtype)
