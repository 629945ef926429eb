"""Prompt lookup: drafts of the next tokens, copied from where the last ones stood before.

A model's answer often repeats what its prompt or the answer says already. What followed there is
taken for a draft, and one step of the model verifies all of it. Greedy tokens stay what they were.
Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), a kind of
speculative decoding (arXiv 2211.17192).
"""

import jax
import jax.numpy as jnp

MOST_DRAFTED = 15  # with the token before them, what attention takes for a decode step
_NGRAM = 3  # last tokens that are looked for, or as many of them as are found


def draft(tokens: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """What followed the last tokens where they stood before.

    Args:
      tokens: [batch, room] ids of each row as far as they are known.
      position: [batch] of each row's last known token.
      count: tokens to draft.

    Returns:
      [batch, count] ids; something where the last token has not stood before. Of several places
      the one counts where most of the last tokens agree, then the latest.
    """
    return jax.vmap(lambda row, at: _draft_row(row, at, count))(tokens, position)


def _draft_row(tokens: jax.Array, position: jax.Array, count: int) -> jax.Array:
    places = jnp.arange(tokens.shape[0])
    agrees, length = places < position, jnp.zeros_like(tokens)
    for back in range(_NGRAM):
        before = jnp.roll(tokens, back)
        agrees &= (places >= back) & (before == tokens[jnp.maximum(position - back, 0)])
        length += agrees
    longest = jnp.max(length)
    found = jnp.max(jnp.where((length == longest) & (places < position), places, 0))
    # Where the draft would reach past the last token, it goes round: a repetition goes on.
    period = jnp.maximum(position - found, 1)
    return tokens[found + 1 + jnp.arange(count) % period]


def agreed(drafted: jax.Array, chosen: jax.Array) -> jax.Array:
    """How many tokens of a step stand.

    Args:
      drafted: [batch, count] ids that the model was run on, after a token that was certain.
      chosen: [batch, count + 1] ids that the model chose after each of these.

    Returns:
      [batch] from 1 to count + 1: `chosen` up to the first that differs from the draft.
    """
    same = jnp.cumprod(drafted == chosen[:, :-1], axis=1)
    return 1 + jnp.sum(same, axis=1)
