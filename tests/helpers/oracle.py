"""Causal attention in float64, straight from its definition."""

import ml_dtypes
import numpy as np


def attention(q, k, v, positions, window=None):
    """softmax(q k^T / sqrt(head_dim)) v over the keys that each query sees.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, keys, kv_heads, head_dim]; key s stands at position s.
      positions: [batch, length] of the queries.
      window: a query sees itself and the window - 1 positions before it; None: all before it.

    Returns:
      [batch, length, heads, head_dim] float64, and the log of the softmax's denominator,
      [batch, length, heads].
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    positions = np.asarray(positions)
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    distance = positions[:, :, None] - np.arange(k.shape[1])
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    scores = np.einsum("blhd,bshd->blhs", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible[:, :, None], scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    values = np.einsum("blhs,bshd->blhd", weights / total, v)
    return values, (highest + np.log(total))[..., 0]


def razor_attention(q, k, v, prompt, sinks, last):
    """What RazorAttention's heads of a window give whole rows, by definition.

    Tokens of the prompt see everything before them. Each later one sees the first `sinks` tokens
    and the `last` ones, and the mean of the keys and values that it no longer sees, which gets the
    weight of as many tokens.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      prompt: number of tokens of the prompt, more than sinks and window.
      sinks, last: number of first and last tokens that are kept.

    Returns:
      [batch, length, heads, head_dim] float64.
    """
    out = attention(q, k, v, np.arange(q.shape[1])[None].repeat(len(q), 0))[0]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    for at in range(prompt, q.shape[1]):
        gone = np.arange(sinks, at - last + 1)
        kept = np.delete(np.arange(at + 1), gone)
        counts = np.array([1] * len(kept) + [len(gone)])
        keys, values = (
            np.concatenate([x[:, kept], x[:, gone].mean(axis=1, keepdims=True)], axis=1)
            for x in (k, v)
        )
        scores = np.einsum("bhd,bshd->bhs", q[:, at], keys) / np.sqrt(q.shape[-1])
        weights = counts * np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, at] = np.einsum("bhs,bshd->bhd", weights, values)
    return out


def rotated(x, positions, theta=1e4, interleaved=False):
    """Rotates [..., length, heads, head_dim] to [length] positions, in float64, by definition."""
    x = np.asarray(x, np.float64)
    pairs = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None, None] * theta ** -(np.arange(pairs) / pairs)
    halves = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    turned = (halves[0] + 1j * halves[1]) * np.exp(1j * angle)
    parts = turned.real, turned.imag
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)


def dual_chunk_distance(at, size, local):
    """Distance that the rotation of query i and key j shows, [queries, keys], for queries `at`.

    Written from the paper's three cases, not from the positions that the two are rotated to.
    """
    chunk = size - local
    i, j = np.asarray(at)[:, None], np.arange(np.max(at) + 1)
    apart = i // chunk - j // chunk
    own, before = i - j, np.minimum(i % chunk + chunk, size) - j % chunk
    earlier = min(2 * chunk - 1, size) - j % chunk
    return np.where(apart == 0, own, np.where(apart == 1, before, earlier))


def dual_chunk_attention(q, k, v, size, local, original=None, length=None, theta=1e4):
    """Dual chunk attention of whole rows to themselves, by definition.

    Args:
      q: [batch, length, heads, head_dim], not rotated.
      k, v: [batch, length, kv_heads, head_dim], not rotated.
      size, local: chunk_size and local_size.
      original: past how many tokens all scores grow; None for never.
      length: prompt and output of the request; None for as many as there are.
      theta: base of the frequencies; halves of the channels are rotated.

    Returns:
      [batch, length, heads, head_dim] float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, at = q.shape[2] // k.shape[2], np.arange(q.shape[1])
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    pairs = q.shape[3] // 2
    frequencies = theta ** -(np.arange(pairs) / pairs)
    q, k = (x[..., :pairs] + 1j * x[..., pairs:] for x in (q, k))
    products = np.einsum("blhp,bshp->bhlsp", q, k.conj())
    turns = np.exp(1j * dual_chunk_distance(at, size, local)[..., None] * frequencies)
    scores = np.einsum("bhlsp,lsp->bhls", products, turns).real / np.sqrt(2 * pairs)
    if original and (length or len(at)) > original:
        scores *= (0.1 * np.log((length or len(at)) / original) + 1) ** 2
    scores = np.where(at <= at[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(axis=-1, keepdims=True), v)


def attention_gradients(q, k, v, d_out, begin, slopes=None):
    """What attention of whole rows to themselves gives, and its gradients, by the chain rule.

    Args:
      q: [batch, length, heads, head_dim].
      k, v: [batch, length, kv_heads, head_dim].
      d_out: like q, the gradient of the result.
      begin: [batch, length]; token i sees the tokens begin[i] .. i.
      slopes: [heads] of ALiBi, or None.

    Returns:
      The result, and the gradients of q, k and v, all float64.
    """
    q, k, v, d_out = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out))
    shape, group = k.shape, q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    at = np.arange(q.shape[1])
    scores = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])
    if slopes is not None:
        scores -= np.asarray(slopes, np.float64)[:, None, None] * (at[:, None] - at)
    visible = (at <= at[:, None]) & (at >= np.asarray(begin)[..., None])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("blhd,bshd->bhls", d_out, v)
    d_scores = weights * (d_weights - np.sum(weights * d_weights, axis=-1, keepdims=True))
    d_scores /= np.sqrt(q.shape[-1])
    return (
        np.einsum("bhls,bshd->blhd", weights, v),
        np.einsum("bhls,bshd->blhd", d_scores, k),
        np.einsum("bhls,blhd->bshd", d_scores, q).reshape(*shape[:3], group, -1).sum(axis=3),
        np.einsum("bhls,blhd->bshd", weights, d_out).reshape(*shape[:3], group, -1).sum(axis=3),
    )


def dequantised(store):
    """Returns a KVArray's keys or values as [batch, keys, kv_heads, head_dim] float64."""
    data = _floats(np.asarray(store.data))
    if data.dtype == np.uint8:  # halves of the channels, with a scale for each 32 or fewer
        data = np.concatenate([data % 16, data // 16], axis=-1) - 7.5
    x = data.astype(np.float64)
    if store.scale is not None:
        scale = _floats(np.asarray(store.scale)).astype(np.float64)
        groups = scale[..., None] if scale.ndim < x.ndim else scale
        x = x * np.repeat(groups, x.shape[-1] // groups.shape[-1], axis=-1)
    return x.swapaxes(1, 2)


def _floats(x):
    """uint16 are the bits of bfloat16."""
    return x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x
