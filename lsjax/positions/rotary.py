"""Rotary position embedding with angles that stay exact at any position.

`position * inv_freq` in float32 is off by up to 0.09 rad at position 2^20. Here the position is
split, p = 2048 * high + low; cos and sin of both parts come from two small tables made in
float64, and the angles are added by the addition theorem: under 1e-6 off everywhere.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.positions.frequencies import rotary_frequencies

_LOW = 2048  # positions that the low table covers
_HIGH = 2048  # rows of the high table
assert _LOW * _HIGH == MAX_POSITIONS

# Kinds whose frequencies depend on the length of the request.
_BY_LENGTH = ("dynamic", "longrope", "auto")


@flax.struct.dataclass
class RotaryTables:
    """cos and sin of both parts of a position, for one request or for each row of a batch.

    `high` and `low` are [rows, 2048, 2, rotary_dim / 2] float32, rows being 1 where all rows of
    the batch share their frequencies; the axis of 2 holds cos and sin. The attention factor is
    in `low`.
    """

    high: jax.Array
    low: jax.Array


def rotary_tables(config: ModelConfig, request_lengths: Sequence[int]) -> RotaryTables:
    """Tables for a batch whose row i is served `request_lengths[i]` tokens in all."""
    if config.rope_scaling.kind not in _BY_LENGTH:
        request_lengths = request_lengths[:1]
    rows = [_tables(*rotary_frequencies(config, length)) for length in request_lengths]
    high, low = (jnp.asarray(np.stack(part)) for part in zip(*rows, strict=True))
    return RotaryTables(high=high, low=low)


def _tables(inv_freq: np.ndarray, attention_factor: float) -> tuple[np.ndarray, np.ndarray]:
    def cos_sin(positions: np.ndarray, scale: float) -> np.ndarray:
        angle = positions[:, None] * inv_freq
        return (scale * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)

    return cos_sin(np.arange(_HIGH) * float(_LOW), 1.0), cos_sin(np.arange(_LOW), attention_factor)


def cos_sin(tables: RotaryTables, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin at [batch, length] positions: two [batch, length, rotary_dim / 2] float32."""

    def take(table: jax.Array, index: jax.Array) -> jax.Array:
        if table.shape[0] == 1:
            return table[0][index]
        return jax.vmap(lambda row, i: row[i])(table, index)

    high, low = take(tables.high, positions // _LOW), take(tables.low, positions % _LOW)
    cos_high, sin_high = high[..., 0, :], high[..., 1, :]
    cos_low, sin_low = low[..., 0, :], low[..., 1, :]
    return cos_high * cos_low - sin_high * sin_low, sin_high * cos_low + cos_high * sin_low


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates the first 2 * cos.shape[-1] channels of each head.

    Args:
      x: [batch, length, heads, head_dim].
      cos, sin: [batch, length, rotary_dim / 2] float32.
      interleaved: pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2).

    Returns:
      Like x; the rotation is computed in float32.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
