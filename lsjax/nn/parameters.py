"""The parameter tree: its shapes, dtypes and shardings, known before any weights are loaded."""

import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.nn.initializers import Initializer
from jax.sharding import Mesh, NamedSharding

from lsjax.config import ModelConfig
from lsjax.distributed.sharding import abstract_mesh, parameter_spec, sharding
from lsjax.nn.decoder import Decoder
from lsjax.nn.int8_weights import int8_shapes
from lsjax.positions.rotary import rotary_tables

_FIRST_LAYER = "layers_0/"
_NORMAL = nn.initializers.normal(0.02)


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: str, weight_dtype: str = "auto"
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of each parameter, by path ("layers_0/attn/q/weight").

    Args:
      config: model configuration.
      mesh: device mesh.
      dtype: dtype of the parameters.
      weight_dtype: int8 to have matrices in int8, see int8_weights; auto for `dtype`.
    """
    found = {}
    for i, kind in enumerate(config.layers):  # layers of one kind are traced once
        one = dataclasses.replace(config.traced, layers=(kind,))
        for path, box in _boxed_parameters(one, dtype).items():
            shape = box.value.shape
            where = sharding(mesh, parameter_spec(mesh, box.names, shape))
            path = path.replace(_FIRST_LAYER, f"layers_{i}/")
            if path not in found:
                found[path] = jax.ShapeDtypeStruct(shape, box.value.dtype, sharding=where)
    return int8_shapes(found, config) if weight_dtype == "int8" else found


def random_parameters(config: ModelConfig, mesh: Mesh, dtype: str, seed: int = 0) -> dict:
    """Creates random parameters on the mesh, for training from scratch or measuring speed.

    They are drawn from the modules' own initial distributions. But the modules' `init` is one
    program for all layers, which XLA takes minutes to compile for a GPU; this function compiles one
    program per shape.
    """
    key, flat = jax.random.key(seed), {}
    for path, leaf in abstract_parameters(config, mesh, dtype).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        initializer = _initializer(config, path, leaf)
        flat[path] = _draw(initializer, own, leaf.shape, leaf.dtype, leaf.sharding)
    return unflatten(flat)


def _initializer(config: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct) -> Initializer:
    in_recurrence = any(f"/{x.name}/" in path for x in config.recurrences)
    centered = config.zero_centered_norms and not in_recurrence
    if path.endswith("/bias") or (path.endswith("norm/weight") and centered):
        return nn.initializers.zeros
    return _NORMAL if len(leaf.shape) > 1 else nn.initializers.ones


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _draw(
    initializer: Initializer,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    where: NamedSharding,
) -> jax.Array:
    return jax.lax.with_sharding_constraint(initializer(key, shape, dtype), where)


def flatten(params: dict) -> dict[str, jax.Array]:
    """Flattens a nested tree to {"layers_0/attn/q/weight": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict) -> dict:
    """Inverts `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.lru_cache(maxsize=32)
def _boxed_parameters(config: ModelConfig, dtype: str) -> dict[str, nn.Partitioned]:
    """Returns shape and dtype of each parameter by path, boxed with the names of its axes.

    The smallest possible call reaches all parameters, and their shapes do not depend on a mesh.
    """
    mesh = abstract_mesh((1, 1, 1))
    decoder = Decoder(config, mesh, jnp.dtype(dtype))

    def everything(module: Decoder) -> jax.Array:
        tokens = jnp.zeros((1, 1), jnp.int32)
        hidden, _ = module(tokens, tokens, rotary_tables(config, [1]), None)
        return module.logits(hidden)

    boxed = jax.eval_shape(lambda: nn.init(everything, decoder)(jax.random.key(0))["params"])
    return traverse_util.flatten_dict(
        boxed, sep="/", is_leaf=lambda _, x: nn.meta.is_axis_metadata(x)
    )
