"""int8 weights: every matrix is stored in int8 with a float32 scale per output channel.

A matrix [..., out, in] is the pair of parameters `weight` (int8) and `scale` [..., out]; an entry
is weight * scale. Embedding and head are matrices too; norms and biases stay as they are, and so do
the few matrices that a layer's description wants in floats.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lsjax.config import ModelConfig
from lsjax.distributed.sharding import sharding

WEIGHT_DTYPES = ("int8",)  # beside auto, which is the dtype of the activations
_QMAX = 127


def quantize_matrix(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds a matrix [..., out, in] to int8; returns it with its scale [..., out] float32."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=-1) / _QMAX
    steps = weight / jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def float_matrix(params: dict[str, jax.Array]) -> jax.Array:
    """Returns the float32 matrix of a module's parameters, whichever way it is stored."""
    weight = params["weight"].astype(jnp.float32)
    return weight * params["scale"][..., None] if "scale" in params else weight


def scale_path(path: str) -> str:
    """Returns the path of the scale that belongs to a matrix, "layers_0/attn/q/weight"."""
    return path.removesuffix("weight") + "scale"


def int8_shapes(
    abstract: dict[str, jax.ShapeDtypeStruct], config: ModelConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of int8 parameters, from those of float ones, by path."""
    parts = [(x.name, x) for x in config.recurrences] + [("mlp", x) for x in config.mlps]
    floats = tuple(f"/{name}/{end}" for name, part in parts for end in part.float_weights)
    found = {}
    for path, leaf in abstract.items():
        if len(leaf.shape) < 2 or not path.endswith("/weight") or path.endswith(floats):
            found[path] = leaf
            continue
        rows = sharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[:-1]))
        found[path] = leaf.update(dtype=jnp.dtype(jnp.int8))
        found[scale_path(path)] = jax.ShapeDtypeStruct(leaf.shape[:-1], "float32", sharding=rows)
    return found


def quantize_parameters(
    params: dict[str, jax.Array], wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns parameters by path, with those matrices quantized that are `wanted` in int8."""
    found = {}
    for path, x in params.items():
        if wanted[path].dtype == jnp.int8 and x.dtype != jnp.int8:
            pair = path, scale_path(path)
            placed = tuple(wanted[name].sharding for name in pair)
            found |= zip(pair, _quantize(x, placed), strict=True)
        else:
            found[path] = x
    return found


@functools.partial(jax.jit, static_argnums=1)
def _quantize(weight: jax.Array, placed: tuple[NamedSharding, NamedSharding]):
    return jax.lax.with_sharding_constraint(quantize_matrix(weight), placed)
