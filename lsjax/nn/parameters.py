"""The parameter tree: its shapes, dtypes and shardings, known before any weight is."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from lsjax.config import ModelConfig
from lsjax.nn.decoder import Decoder
from lsjax.positions.rotary import rotary_tables
from lsjax.sharding import parameter_spec, sharding

_FIRST_LAYER = "layers_0/"


def abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path in the parameter tree ("layers_0/attn/q/weight") -> shape, dtype and sharding."""
    one = dataclasses.replace(config.traced, num_layers=1, windows=config.windows[:1])
    first, found = {}, {}
    for path, leaf in _abstract_parameters(one, mesh, dtype).items():
        (first if path.startswith(_FIRST_LAYER) else found)[path] = leaf
    for i in range(config.num_layers):  # all are alike
        found |= {path.replace(_FIRST_LAYER, f"layers_{i}/"): leaf for path, leaf in first.items()}
    return found


@functools.lru_cache(maxsize=8)
def _abstract_parameters(
    config: ModelConfig, mesh: Mesh, dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    boxed = jax.eval_shape(lambda: _initialise(config, mesh, dtype, jax.random.key(0)))
    flat = traverse_util.flatten_dict(
        boxed, sep="/", is_leaf=lambda _, x: nn.meta.is_axis_metadata(x)
    )

    def abstract(names: tuple[str | None, ...], value: jax.ShapeDtypeStruct):
        where = sharding(mesh, parameter_spec(mesh, names, value.shape))
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)

    return {path: abstract(box.names, box.value) for path, box in flat.items()}


def random_parameters(config: ModelConfig, mesh: Mesh, dtype: str, seed: int = 0) -> dict:
    """A tree of random parameters, made on the mesh: to train from, or to measure speed."""
    abstract = abstract_parameters(config, mesh, dtype)
    shardings = unflatten({path: leaf.sharding for path, leaf in abstract.items()})

    def init(key: jax.Array) -> dict:
        return nn.meta.unbox(_initialise(config, mesh, dtype, key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def flatten(params: dict) -> dict[str, jax.Array]:
    """Nested tree -> {"layers_0/attn/q/weight": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict) -> dict:
    """The inverse of flatten."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _initialise(config: ModelConfig, mesh: Mesh, dtype: str, key: jax.Array) -> dict:
    """Parameters boxed with what their axes mean; the smallest call reaches them all."""
    decoder = Decoder(config, mesh, jnp.dtype(dtype))
    # A row for each part of a batch, and as few tokens as can be dealt out.
    tokens = jnp.zeros((mesh.shape["data"], 2 * mesh.shape["context"]), jnp.int32)
    tables = rotary_tables(config, [1])

    def everything(module: Decoder) -> jax.Array:
        hidden, _ = module(tokens, tokens, tables, None)
        return module.logits(hidden)

    return nn.init(everything, decoder)(key)["params"]
