"""Vectors of tokens that are dealt out over data and context, from a table over model."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.nn.linear import found_here
from lsjax.sharding import CHUNK
from lsjax.training.chunks import TOKEN_AXES

_VOCAB = PartitionSpec("model")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embed(mesh: Mesh, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """[batch, length] ids -> [batch, length, features], rows of the table [vocab, features].

    The gradient of a row is summed in float32 over the tokens that have it, which may be many.
    """
    found = jax.shard_map(
        functools.partial(found_here, axes=("model",)),
        mesh=mesh,
        in_specs=(_VOCAB, CHUNK),
        out_specs=CHUNK,
        check_vma=False,
    )
    return found(table, tokens)


def _keep(mesh, table, tokens):
    return embed(mesh, table, tokens), (table, tokens)


def _gradients(mesh, kept, d_out):
    def local(table, tokens, d_out):
        at = tokens - jax.lax.axis_index("model") * table.shape[0]
        at = jnp.where(at < 0, table.shape[0], at)  # of another device: past the end, and dropped
        sums = jnp.zeros(table.shape, jnp.float32)
        sums = sums.at[at].add(d_out.astype(jnp.float32), mode="drop")
        return jax.lax.psum(sums, TOKEN_AXES).astype(table.dtype)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(_VOCAB, CHUNK, CHUNK), out_specs=_VOCAB, check_vma=False
    )
    return mapped(*kept, d_out), None


embed.defvjp(_keep, _gradients)
