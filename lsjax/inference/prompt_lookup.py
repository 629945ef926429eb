"""Prompt lookup: drafts the next tokens from an earlier occurrence of the last tokens.

An answer often repeats text from its prompt or from itself. The tokens that followed the earlier
occurrence become a draft, and one decode step verifies all of it. Greedy output does not change.
Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), a kind of
speculative decoding (arXiv 2211.17192).
"""

import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import MAX_DECODE_QUERIES

MAX_DRAFT_TOKENS = MAX_DECODE_QUERIES - 1  # the last token comes first
_NGRAM = 3  # longest suffix that is looked up; shorter matches are used if there is none longer


def draft(tokens: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """Drafts the tokens that followed an earlier occurrence of each row's last tokens.

    The occurrence with the longest match is used, and the latest one among equals.

    Args:
      tokens: [batch, room] ids of each row, known up to `position`.
      position: [batch] position of each row's last known token.
      count: number of tokens to draft.

    Returns:
      [batch, count] ids; arbitrary in a row whose last token has not occurred before.
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
    # A draft that would reach past the last token wraps around, which continues a repetition.
    period = jnp.maximum(position - found, 1)
    return tokens[found + 1 + jnp.arange(count) % period]


def num_accepted(drafted: jax.Array, chosen: jax.Array) -> jax.Array:
    """Counts the tokens that a step accepts.

    Args:
      drafted: [batch, count] drafted ids, which the model was run on after the last known token.
      chosen: [batch, count + 1] ids that the model chose after the known and each drafted token.

    Returns:
      [batch] number of ids of `chosen` up to and including the first that differs from the draft,
      from 1 to count + 1.
    """
    same = jnp.cumprod(drafted == chosen[:, :-1], axis=1)
    return 1 + jnp.sum(same, axis=1)
