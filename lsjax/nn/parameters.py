"""The parameter tree: its shapes, dtypes and shardings, known before any weight is."""

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
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import rotary_tables
from lsjax.sharding import abstract_mesh, parameter_spec, sharding

_FIRST_LAYER = "layers_0/"
_NORMAL = nn.initializers.normal(0.02)


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path in the parameter tree ("layers_0/attn/q/weight") -> shape, dtype and sharding."""
    one = dataclasses.replace(config.traced, num_layers=1, windows=config.windows[:1])
    first, found = {}, {}
    for path, box in _boxed_parameters(one, dtype).items():
        shape = box.value.shape
        where = sharding(mesh, parameter_spec(mesh, box.names, shape))
        leaf = jax.ShapeDtypeStruct(shape, box.value.dtype, sharding=where)
        (first if path.startswith(_FIRST_LAYER) else found)[path] = leaf
    for i in range(config.num_layers):  # all are alike
        found |= {path.replace(_FIRST_LAYER, f"layers_{i}/"): leaf for path, leaf in first.items()}
    return found


def random_parameters(config: ModelConfig, mesh: Mesh, dtype: str, seed: int = 0) -> dict:
    """A tree of random parameters, made on the mesh: to train from, or to measure speed.

    They are drawn as the modules would draw them. But the modules' own `init` is one program for
    all layers, which XLA takes minutes to compile for a GPU; here is one for each shape.
    """
    key, flat = jax.random.key(seed), {}
    for path, leaf in abstract_parameters(config, mesh, dtype).items():
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        flat[path] = _draw(_initializer(path, leaf), own, leaf.shape, leaf.dtype, leaf.sharding)
    return unflatten(flat)


def _initializer(path: str, leaf: jax.ShapeDtypeStruct) -> Initializer:
    if path.endswith("bias"):
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
    """Nested tree -> {"layers_0/attn/q/weight": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict) -> dict:
    """The inverse of flatten."""
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.lru_cache(maxsize=32)
def _boxed_parameters(config: ModelConfig, dtype: str) -> dict[str, nn.Partitioned]:
    """Path -> shape and dtype, boxed with what the axes mean.

    The smallest call reaches all parameters, and their shapes do not depend on a mesh.
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
