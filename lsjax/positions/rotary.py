"""Rotary position embedding with angles that stay exact at any position.

`position * inv_freq` in float32 is off by up to 0.09 rad at position 2^20. Here the position is
split, p = 2048 * high + low. cos and sin of both parts come from two small tables computed in
float64, and the angle addition formulas combine them. The error is below 1e-6 everywhere.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.positions.dual_chunk import DualChunk, chunks_for, score_factor
from lsjax.positions.frequencies import rotary_frequencies

_LOW = 2048  # positions that the low table covers
_HIGH = 2048  # rows of the high table
assert _LOW * _HIGH == MAX_POSITIONS

# Scaling kinds whose frequencies depend on the length of the request.
_FREQUENCIES_BY_LENGTH = ("dynamic", "longrope", "auto")


def depends_on_length(config: ModelConfig) -> bool:
    """Returns whether the rotation depends on the length of the request."""
    return config.rope_scaling.kind in (*_FREQUENCIES_BY_LENGTH, "dual_chunk")


@flax.struct.dataclass
class RotaryTables:
    """cos and sin of both parts of a position, shared by a batch or for each of its rows.

    Attributes:
      high, low: [rows, 2048, 2, rotary_dim / 2] float32. rows is 1 if all rows of the batch share
        their frequencies. The axis of size 2 holds cos and sin. `low` includes the attention
        factor.
      score_factor: [batch] float32 factor of each row's scores; None without dual chunk attention.
      chunks: the chunks of dual chunk attention; None if positions are rotated as they are.
    """

    high: jax.Array
    low: jax.Array
    score_factor: jax.Array | None = None
    chunks: DualChunk | None = flax.struct.field(pytree_node=False, default=None)


def rotary_tables(config: ModelConfig, request_lengths: Sequence[int]) -> RotaryTables:
    """Computes the tables for a batch.

    Args:
      config: model configuration.
      request_lengths: each row's prompt plus requested output, in tokens.
    """
    by_length = config.rope_scaling.kind in _FREQUENCIES_BY_LENGTH
    frequencies_of = request_lengths if by_length else request_lengths[:1]
    rows = [_tables(*rotary_frequencies(config, length)) for length in frequencies_of]
    high, low = (jnp.asarray(np.stack(part)) for part in zip(*rows, strict=True))
    chunks = chunks_for(config, max(request_lengths))
    if chunks is None:
        return RotaryTables(high, low)
    factors = [score_factor(config, length) for length in request_lengths]
    return RotaryTables(high, low, jnp.asarray(factors, jnp.float32), chunks)


def _tables(inv_freq: np.ndarray, attention_factor: float) -> tuple[np.ndarray, np.ndarray]:
    def cos_sin(positions: np.ndarray, scale: float) -> np.ndarray:
        angle = positions[:, None] * inv_freq
        return (scale * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)

    return cos_sin(np.arange(_HIGH) * float(_LOW), 1.0), cos_sin(np.arange(_LOW), attention_factor)


def cos_sin(tables: RotaryTables, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin at [batch, length] positions: [batch, length, rotary_dim / 2] float32."""

    def take(table: jax.Array, index: jax.Array) -> jax.Array:
        if table.shape[0] == 1:
            return table[0][index]
        return jax.vmap(lambda row, i: row[i])(table, index)

    high, low = take(tables.high, positions // _LOW), take(tables.low, positions % _LOW)
    cos_high, sin_high = high[..., 0, :], high[..., 1, :]
    cos_low, sin_low = low[..., 0, :], low[..., 1, :]
    return cos_high * cos_low - sin_high * sin_low, sin_high * cos_low + cos_high * sin_low


def rotation_back(tables: RotaryTables, distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin that rotate back by [batch, length] positions, shaped as of `cos_sin`.

    They have no attention factor, which rotated vectors have already.
    """
    cos, sin = cos_sin(tables, distance)
    factor = tables.low[:, :1, 0, :]  # the cosine at position 0
    return cos / factor, -sin / factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates the first 2 * cos.shape[-1] channels of each head.

    Args:
      x: [batch, length, heads, head_dim].
      cos, sin: [batch, length, rotary_dim / 2] float32.
      interleaved: whether pairs of channels are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).

    Returns:
      Rotated x, of the same shape and dtype; the rotation is computed in float32.
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
