"""The gated delta rule: a recurrence over tokens whose state is one matrix per value head.

    S <- g S;  d = beta (v - S k);  S <- S + d k^T;  y = S q

A token with beta 0 and g 1 leaves the state as it is. Everything is float32. In einsums b is a row,
h a key head, r one of the value heads that share it, d and e channels of keys and of values, n a
chunk, and i and j tokens of a chunk.
Source: Gated DeltaNet (arXiv 2412.06464); transformers' modeling_qwen3_5.py.
"""

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.families.qwen3_5 import DELTA_CHUNK
from lsjax.runtime.loops import scan
from lsjax.runtime.precision import einsum

_PIECE = 2048  # tokens whose chunks are solved at once, to bound memory


@flax.struct.dataclass
class DeltaInputs:
    """What tokens bring to the recurrence, float32.

    Attributes:
      q, k: [batch, length, key_heads, key_dim] queries, scaled, and keys of norm 1.
      v: [batch, length, key_heads, group, value_dim]; value heads in groups that share a key head.
      log_decay: [batch, length, key_heads, group] log of g, at most 0.
      beta: [batch, length, key_heads, group], from 0 to 1.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    beta: jax.Array


def run_steps(state: jax.Array, inputs: DeltaInputs) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence token by token.

    Args:
      state: [batch, key_heads, group, value_dim, key_dim] float32 state before the first token.
      inputs: the tokens.

    Returns:
      [batch, length, key_heads, group, value_dim] float32 outputs, and the state after the last
      token.
    """
    if inputs.k.shape[1] == 1:
        state, y = _step(state, jax.tree.map(lambda x: x[:, 0], inputs))
        return y[:, None], state
    by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), inputs)
    state, y = scan(_step, state, by_token, inputs.v)
    return y.swapaxes(0, 1), state


def _step(state: jax.Array, token: DeltaInputs) -> tuple[jax.Array, jax.Array]:
    """Runs one token, whose arrays have no axis for the length."""
    decay = jnp.exp(token.log_decay)[..., None]
    # Both products are with the old state, so that it is read once for them.
    pair = jnp.stack([token.k, token.q], axis=2)
    found, y = jnp.moveaxis(einsum("bhred,bhnd->bhrne", state, pair), 3, 0) * decay
    change = token.beta[..., None] * (token.v - found)
    y = y + change * jnp.sum(token.k * token.q, axis=-1)[..., None, None]
    return state * decay[..., None] + change[..., None] * token.k[:, :, None, None], y


def run_chunks(
    state: jax.Array, inputs: DeltaInputs, starts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Does what `run_steps` does in chunks of tokens, whose work is matrix products.

    Where `starts` [batch, length] is true a document starts, from an empty state.

    Within a chunk the changes d are the solution of a unit lower-triangular system, in which the
    state before the chunk is linear. The systems of a few thousand tokens are solved at once; a
    scan then carries the state from chunk to chunk. Gradients keep the state before each such piece
    alone, and run it again.
    """
    batch, length = inputs.k.shape[:2]
    chunk = min(DELTA_CHUNK, length)
    size = min(_PIECE, -(-length // chunk) * chunk)  # of a piece, whose systems are solved at once

    def pieces(x: jax.Array) -> jax.Array:
        """Returns [pieces, batch, chunks, chunk, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, -1, size // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    run = jax.checkpoint(_run_piece, prevent_cse=False)
    state, y = scan(run, state, jax.tree.map(pieces, (inputs, starts)), inputs.v)
    return y.swapaxes(0, 1).reshape(batch, -1, *inputs.v.shape[2:])[:, :length], state


def _run_piece(
    state: jax.Array, tokens: tuple[DeltaInputs, jax.Array | None]
) -> tuple[jax.Array, jax.Array]:
    """Runs [batch, chunks, chunk, ...] tokens; the outputs are of that shape."""
    inputs, starts = tokens
    # As [chunks, batch, key_heads, group, chunk, channels].
    q, k, v = (jnp.moveaxis(x, (1, 2), (0, -2)) for x in (inputs.q, inputs.k, inputs.v))
    log_decay, beta = (jnp.moveaxis(x, (1, 2), (0, -1)) for x in (inputs.log_decay, inputs.beta))
    total = jnp.cumsum(log_decay, axis=-1)  # up to each token, from the chunk's start
    seen = jnp.tril(jnp.ones((total.shape[-1],) * 2, bool))
    # Whether a token sees the state before the chunk, and the state after it sees the token.
    sees_state = in_state = True
    if starts is not None:  # as [chunks, batch, 1, 1, chunk]
        document = jnp.cumsum(starts, axis=-1).swapaxes(0, 1)[:, :, None, None]
        seen = seen & (document[..., :, None] == document[..., None, :])
        sees_state, in_state = document == 0, document == document[..., -1:]
    decay = jnp.exp(jnp.where(seen, total[..., :, None] - total[..., None, :], -jnp.inf))
    left = jnp.where(sees_state, jnp.exp(total), 0)[..., None]
    kept = jnp.where(in_state, jnp.exp(total[..., -1:] - total), 0)[..., None]
    queries, keys, beta = q[:, :, :, None], k[:, :, :, None], beta[..., None]

    system = beta * decay * einsum("nbhid,nbhjd->nbhij", k, k)[:, :, :, None]
    right = jnp.concatenate([beta * v, beta * left * keys], axis=-1)
    solved = einsum("nbhrij,nbhrjc->nbhric", _inverse_of_unit_lower(system), right)
    changes, of_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    near = decay * einsum("nbhid,nbhjd->nbhij", q, k)[:, :, :, None]

    def run(state: jax.Array, of_chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        changes, of_state, near, queries, kept, left = of_chunk
        changes = changes - einsum("bhrid,bhred->bhrie", of_state, state)
        y = einsum("bhrid,bhred->bhrie", queries, state)
        y = y + einsum("bhrij,bhrje->bhrie", near, changes)
        return left * state + einsum("bhrie,bhrid->bhred", changes, kept), y

    per_chunk = changes, of_state, near, left * queries, kept * keys, left[..., -1:, :]
    state, y = scan(run, state, per_chunk, inputs.v)
    return state, jnp.moveaxis(y, (0, -2), (1, 2))


def _inverse_of_unit_lower(system: jax.Array) -> jax.Array:
    """Inverts matrices [..., size, size] of ones on the diagonal and `system` below it.

    Diagonal blocks of 1, 2, 4 ... rows are inverted in turn, each from two of half its size. These
    are matrix products. LAPACK's solver shares the threads of a CPU with the programs that call it,
    and waits forever if many devices of one CPU do.
    """
    size = system.shape[-1]
    at = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), system.shape)
    rows = 1
    while rows < size:
        block, half = at // (2 * rows), at // rows
        below = (block[:, None] == block) & (half[:, None] > half)
        half_way = einsum("...ij,...jk->...ik", jnp.where(below, system, 0), inverse)
        inverse = inverse - einsum("...ij,...jk->...ik", inverse, half_way)
        rows *= 2
    return inverse
