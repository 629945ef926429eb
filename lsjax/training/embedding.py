"""Embedding of tokens sharded over data and context, from a table sharded over model."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.distributed.sharding import CHUNK_SPEC
from lsjax.nn.linear import sharded_embedding_lookup
from lsjax.training.token_chunks import TOKEN_AXES

_VOCAB = PartitionSpec("model")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embed(mesh: Mesh, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks up [batch, length] ids in a table [vocab, features] -> [batch, length, features].

    The gradient of a table row is summed in float32, because many tokens may share the row.
    """
    found = jax.shard_map(
        functools.partial(sharded_embedding_lookup, axes=("model",), dtype=table.dtype),
        mesh=mesh,
        in_specs=(_VOCAB, None, CHUNK_SPEC),
        out_specs=CHUNK_SPEC,
        check_vma=False,
    )
    return found(table, None, tokens)


def _keep(mesh, table, tokens):
    return embed(mesh, table, tokens), (table, tokens)


def _gradients(mesh, residuals, d_out):
    def local(table, tokens, d_out):
        at = tokens - jax.lax.axis_index("model") * table.shape[0]
        at = jnp.where(at < 0, table.shape[0], at)  # other devices' rows: out of range, dropped
        sums = jnp.zeros(table.shape, jnp.float32)
        sums = sums.at[at].add(d_out.astype(jnp.float32), mode="drop")
        return jax.lax.psum(sums, TOKEN_AXES).astype(table.dtype)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_VOCAB, CHUNK_SPEC, CHUNK_SPEC),
        out_specs=_VOCAB,
        check_vma=False,
    )
    return mapped(*residuals, d_out), None


embed.defvjp(_keep, _gradients)
