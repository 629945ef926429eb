"""Sparse prefill in float64, straight from its definition: the choice of blocks, and the softmax.

Positions are slots, tiles of queries begin at multiples of 128, and so do blocks of keys.

With dual chunk attention there is a view of the queries for each range of keys: those of their own
chunk of positions, of the one before, and of all earlier ones.
"""

import numpy as np

from helpers.oracle import rotated

BLOCK = 128


def dual_chunk_views(q, k, size, local):
    """Rotates q and k [batch, length, heads, head_dim] as dual chunk attention does.

    Returns:
      Views of q to choose blocks by, whose distances have no limit; views to attend with; and k.
    """
    at, stride = np.arange(q.shape[1]), size - local
    place = at % stride
    limited = np.minimum(place + stride, size), np.full_like(at, min(2 * stride - 1, size))
    choosing = [rotated(q, x) for x in (place, at - (at // stride - 1) * stride, place + size)]
    attending = [rotated(q, x) for x in (place, *limited)]
    return choosing, attending, rotated(k, place)


def _view(queries, at, keys, stride):
    """Index of the view of a query that sees each of some keys."""
    if stride is None:
        return np.zeros(len(keys), int)
    return np.minimum(at // stride - keys // stride, len(queries) - 1)


def block_means(x):
    """[batch, keys, kv_heads, head_dim] -> means [batch, keys // 128, kv_heads, head_dim]."""
    x = np.asarray(x, np.float64)
    whole = x[:, : x.shape[1] // BLOCK * BLOCK]
    return whole.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).mean(axis=2)


def chosen(
    q, k, alpha, lengths=None, last_tokens=0, dense_length=0, sinks=2, before=4, stride=None
):
    """Chooses blocks by the sum of exp(score of the block's mean) over the rows of a tile.

    Args:
      q: [batch, length, heads, head_dim], not scaled; length is a multiple of 128. Or three views.
      k: [batch, length, kv_heads, head_dim].
      alpha: share of the largest sum that a block needs.
      lengths: [batch]; None for all of the length.
      last_tokens, dense_length: see SparsePrefill.
      sinks, before: blocks that every tile keeps: the first ones, and those before its own.
      stride: number of positions in a chunk, if there are views.

    Returns:
      [batch, kv_heads, tiles, blocks] bool; False after a tile's own block.
    """
    views, means = np.asarray(q if stride else [q], np.float64), block_means(k)
    batch, length, heads, head_dim = views[0].shape
    kv_heads, tiles = k.shape[2], length // BLOCK
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    keep = np.zeros((batch, kv_heads, tiles, tiles), bool)
    for row, head, tile in np.ndindex(batch, kv_heads, tiles):
        seen = np.arange(tile + 1)
        group = slice(head * (heads // kv_heads), (head + 1) * (heads // kv_heads))
        rows = views[:, row, tile * BLOCK : (tile + 1) * BLOCK, group]
        rows = rows.reshape(len(views), -1, head_dim)[
            _view(views, tile * BLOCK, seen * BLOCK, stride)
        ]
        scores = np.einsum("srd,sd->rs", rows, means[row, seen, head]) / np.sqrt(head_dim)
        sums = np.exp(scores - scores.max()).sum(axis=0)
        end = (tile + 1) * BLOCK
        dense = end <= dense_length or end > lengths[row] - last_tokens
        near = (seen < sinks) | (seen >= tile - before)
        keep[row, head, tile, seen] = dense | near | (sums >= alpha * sums.max())
    return keep


def attention(q, k, v, keep, corrected=True, stride=None):
    """Softmax over the tokens of kept blocks, and a token for each block that is not kept.

    That token has the mean of the block's keys and of its values, and its score is raised by
    ln(128).

    Args:
      q: [batch, length, heads, head_dim], not scaled. Or three views.
      k, v: [batch, length, kv_heads, head_dim].
      keep: see `chosen`.
      corrected: whether there are such tokens.
      stride: number of positions in a chunk, if there are views.

    Returns:
      [batch, length, heads, head_dim] float64, and the share of plain attention's weights that is
      on the kept blocks, [batch, length, heads].
    """
    views, k, v = (np.asarray(x, np.float64) for x in (q if stride else [q], k, v))
    batch, length, heads, head_dim = shape = views[0].shape
    group, values, mass = heads // k.shape[2], np.zeros(shape), np.zeros(shape[:3])
    mean_k, mean_v = block_means(k), block_means(v)
    for row, at, head in np.ndindex(batch, length, heads):
        of, tile = head // group, at // BLOCK
        blocks = keep[row, of, tile]
        tokens = np.repeat(blocks, BLOCK)[: at + 1]
        pruned = np.flatnonzero(~blocks[:tile]) if corrected else np.zeros(0, int)

        def score(keys, slots, query=views[:, row, at, head], at=at):
            products = keys * query[_view(views, at, slots, stride)]
            return products.sum(axis=-1) / np.sqrt(head_dim)

        all_scores = score(k[row, : at + 1, of], np.arange(at + 1))
        others = score(mean_k[row, pruned, of], pruned * BLOCK)
        scores = np.concatenate([all_scores[tokens], others + np.log(BLOCK)])
        weights = np.exp(scores - scores.max())
        vectors = np.concatenate([v[row, : at + 1, of][tokens], mean_v[row, pruned, of]])
        values[row, at, head] = weights @ vectors / weights.sum()
        plain = np.exp(all_scores - all_scores.max())
        mass[row, at, head] = plain[tokens].sum() / plain.sum()
    return values, mass
