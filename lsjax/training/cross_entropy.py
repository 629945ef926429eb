"""Cross-entropy over a vocabulary, one chunk of tokens at a time: [length, vocab] never exists.

The forward pass keeps the log-sum-exp of each token; the backward pass recomputes the logits.
Tokens are sharded over the data and context axes, the vocabulary over the model axis.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lsjax.distributed.sharding import CHUNK_SPEC
from lsjax.runtime.precision import einsum
from lsjax.training.token_chunks import TOKEN_AXES, join, split

_VOCAB = PartitionSpec("model")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    mesh: Mesh, tokens: int, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> jax.Array:
    """Returns -log softmax(hidden head^T)[target] of each token, in nats.

    Args:
      mesh: the devices.
      tokens: tokens per chunk and device.
      hidden: [batch, length, features], sharded over the data and context axes.
      head: [vocab, features] in hidden's dtype.
      targets: [batch, length] ids, sharded like hidden.

    Returns:
      [batch, length] float32.
    """
    return _forward(mesh, tokens, hidden, head, targets)[0]


def _forward(mesh, tokens, hidden, head, targets):
    def local(hidden, head, targets):
        def chunk(of_chunk):
            hidden, targets = of_chunk
            logits = _logits(hidden, head)
            highest = jax.lax.pmax(jnp.max(logits, axis=-1), "model")
            total = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
            lse = highest + jnp.log(jax.lax.psum(total, "model"))
            own = jnp.sum(jnp.where(_is_target(head, targets), logits, 0), axis=-1)
            return lse - jax.lax.psum(own, "model"), lse

        chunks = split(hidden, tokens), split(targets, tokens)
        return tuple(join(x, hidden.shape[1]) for x in jax.lax.map(chunk, chunks))

    return _mapped(mesh, local, (CHUNK_SPEC, _VOCAB, CHUNK_SPEC), (CHUNK_SPEC, CHUNK_SPEC))(
        hidden, head, targets
    )


def _keep(mesh, tokens, hidden, head, targets):
    losses, lse = _forward(mesh, tokens, hidden, head, targets)
    return losses, (hidden, head, targets, lse)


def _gradients(mesh, tokens, residuals, d_losses):
    def local(hidden, head, targets, lse, d_losses):
        def chunk(d_head, of_chunk):
            hidden, targets, lse, d_losses = of_chunk
            shares = jnp.exp(_logits(hidden, head) - lse[..., None])
            d_logits = (shares - _is_target(head, targets)) * d_losses[..., None]
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden = jax.lax.psum(einsum("btv,vd->btd", d_logits, head), "model")
            d_head += einsum("btv,btd->vd", d_logits, hidden)
            return d_head, d_hidden.astype(hidden.dtype)

        chunks = tuple(split(x, tokens) for x in (hidden, targets, lse, d_losses))
        d_head, d_hidden = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), chunks)
        d_head = jax.lax.psum(d_head, TOKEN_AXES).astype(head.dtype)
        return join(d_hidden, hidden.shape[1]), d_head

    mapped = _mapped(
        mesh, local, (CHUNK_SPEC, _VOCAB, CHUNK_SPEC, CHUNK_SPEC, CHUNK_SPEC), (CHUNK_SPEC, _VOCAB)
    )
    return *mapped(*residuals, d_losses), None


cross_entropy.defvjp(_keep, _gradients)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Returns [batch, tokens, local vocabulary] float32."""
    return einsum("btd,vd->btv", hidden, head)


def _is_target(head: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns [batch, tokens, local vocabulary] bools."""
    first = jax.lax.axis_index("model") * head.shape[0]
    return jnp.arange(head.shape[0]) == (targets - first)[..., None]


def _mapped(mesh: Mesh, local, in_specs, out_specs):
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
