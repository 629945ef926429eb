"""Sparse prefill in float64, straight from its definition: the choice of blocks, and the softmax.

Positions are slots, tiles of queries begin at multiples of 128, and so do blocks of keys.
"""

import numpy as np

BLOCK = 128


def block_means(x):
    """[batch, keys, kv_heads, head_dim] -> means [batch, keys // 128, kv_heads, head_dim]."""
    x = np.asarray(x, np.float64)
    whole = x[:, : x.shape[1] // BLOCK * BLOCK]
    return whole.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).mean(axis=2)


def chosen(q, k, alpha, lengths=None, last_tokens=0, dense_length=0):
    """Chooses blocks by the sum of exp(score of the block's mean) over the rows of a tile.

    Args:
      q: [batch, length, heads, head_dim], not scaled; length is a multiple of 128.
      k: [batch, length, kv_heads, head_dim].
      alpha: share of the largest sum that a block needs.
      lengths: [batch]; None for all of the length.
      last_tokens, dense_length: see SparsePrefill.

    Returns:
      [batch, kv_heads, tiles, blocks] bool; False after a tile's own block.
    """
    q, means = np.asarray(q, np.float64), block_means(k)
    batch, length, heads, head_dim = q.shape
    kv_heads, tiles = k.shape[2], length // BLOCK
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    keep = np.zeros((batch, kv_heads, tiles, tiles), bool)
    for row, head, tile in np.ndindex(batch, kv_heads, tiles):
        seen = np.arange(tile + 1)
        group = slice(head * (heads // kv_heads), (head + 1) * (heads // kv_heads))
        rows = q[row, tile * BLOCK : (tile + 1) * BLOCK, group].reshape(-1, head_dim)
        scores = rows @ means[row, seen, head].T / np.sqrt(head_dim)
        sums = np.exp(scores - scores.max()).sum(axis=0)
        end = (tile + 1) * BLOCK
        dense = end <= dense_length or end > lengths[row] - last_tokens
        near = (seen < 2) | (seen >= tile - 4)
        keep[row, head, tile, seen] = dense | near | (sums >= alpha * sums.max())
    return keep


def attention(q, k, v, keep, corrected=True):
    """Softmax over the tokens of kept blocks, and a token for each block that is not kept.

    That token has the mean of the block's keys and of its values, and its score is raised by
    ln(128).

    Args:
      q: [batch, length, heads, head_dim], not scaled.
      k, v: [batch, length, kv_heads, head_dim].
      keep: see `chosen`.
      corrected: whether there are such tokens.

    Returns:
      [batch, length, heads, head_dim] float64, and the share of plain attention's weights that is
      on the kept blocks, [batch, length, heads].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, head_dim = q.shape
    group, values, mass = heads // k.shape[2], np.zeros(q.shape), np.zeros(q.shape[:3])
    mean_k, mean_v = block_means(k), block_means(v)
    for row, at, head in np.ndindex(batch, length, heads):
        of, tile = head // group, at // BLOCK
        blocks = keep[row, of, tile]
        tokens = np.repeat(blocks, BLOCK)[: at + 1]
        pruned = np.flatnonzero(~blocks[:tile]) if corrected else []
        all_scores = k[row, : at + 1, of] @ q[row, at, head] / np.sqrt(head_dim)
        scores = np.concatenate(
            [
                all_scores[tokens],
                mean_k[row, pruned, of] @ q[row, at, head] / np.sqrt(head_dim) + np.log(BLOCK),
            ]
        )
        weights = np.exp(scores - scores.max())
        vectors = np.concatenate([v[row, : at + 1, of][tokens], mean_v[row, pruned, of]])
        values[row, at, head] = weights @ vectors / weights.sum()
        plain = np.exp(all_scores - all_scores.max())
        mass[row, at, head] = plain[tokens].sum() / plain.sum()
    return values, mass
