"""Token-wise functions, applied to one chunk of tokens at a time.

Intermediates, such as the wide middle of an MLP, exist for one chunk only, forward and backward:
the forward pass keeps nothing but its input.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.distributed.sharding import CHUNK_SPEC

# Mesh axes that tokens are sharded over.
TOKEN_AXES = ("data", "context")


def split(x: jax.Array, tokens: int) -> jax.Array:
    """Splits [batch, length, ...] into [chunks, batch, tokens per chunk, ...], zero-padded.

    Chunks have one size: about `tokens` over all rows, and at least one token per row.
    """
    batch, length = x.shape[:2]
    chunks = min(length, -(-batch * length // tokens))
    size = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * size - length), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(batch, chunks, size, *x.shape[2:]).swapaxes(0, 1)


def join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `split`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def in_chunks(
    f: Callable[[dict, jax.Array], jax.Array], mesh: Mesh, tokens: int, weights: dict, x: jax.Array
) -> jax.Array:
    """Computes f(weights, x), `tokens` at a time per device.

    Args:
      f: token-wise function, (weights, [batch, length, hidden]) -> [batch, length, hidden].
      mesh: the devices.
      tokens: tokens per chunk and device.
      weights: weights of f, not sharded over TOKEN_AXES.
      x: [batch, length, hidden], sharded over TOKEN_AXES.
    """

    def local(weights: dict, x: jax.Array) -> jax.Array:
        out = jax.lax.map(functools.partial(f, weights), split(x, tokens))
        return join(out, x.shape[1])

    return _mapped(mesh, local, (PartitionSpec(), CHUNK_SPEC), CHUNK_SPEC)(weights, x)


def _keep(f, mesh, tokens, weights, x):
    return in_chunks(f, mesh, tokens, weights, x), (weights, x)


def _gradients(f, mesh, tokens, kept, d_out):
    def local(weights: dict, x: jax.Array, d_out: jax.Array) -> tuple[dict, jax.Array]:
        def chunk(sums: dict, of_chunk: tuple[jax.Array, jax.Array]) -> tuple[dict, jax.Array]:
            x, d_out = of_chunk
            _, pull = jax.vjp(f, weights, x)
            d_weights, d_x = pull(d_out)
            return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, d_weights), d_x

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        sums, d_x = jax.lax.scan(chunk, zeros, (split(x, tokens), split(d_out, tokens)))
        sums = jax.lax.psum(sums, TOKEN_AXES)
        d_weights = jax.tree.map(lambda s, w: s.astype(w.dtype), sums, weights)
        return d_weights, join(d_x, x.shape[1])

    specs = PartitionSpec(), CHUNK_SPEC
    return _mapped(mesh, local, (*specs, CHUNK_SPEC), specs)(*kept, d_out)


in_chunks.defvjp(_keep, _gradients)


def _mapped(mesh: Mesh, local: Callable, in_specs, out_specs) -> Callable:
    """Maps over TOKEN_AXES, so that devices run on local tokens; XLA handles the model axis."""
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(TOKEN_AXES),
        check_vma=False,
    )
