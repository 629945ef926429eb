"""Rotary frequencies, computed in float64 on the host.

Source: transformers' modeling_rope_utils.py; YaRN (arXiv 2309.00071); Llama 3.1.
"""

import math

import numpy as np

from lsjax.config import ModelConfig, RopeScaling


def rotary_frequencies(config: ModelConfig, request_length: int) -> tuple[np.ndarray, float]:
    """Returns the rotary frequencies that a whole request uses.

    Args:
      config: model configuration.
      request_length: prompt plus requested output, in tokens. dynamic, longrope and auto depend on
        it. It is fixed before the first token, so that all keys in the cache are rotated alike.

    Returns:
      inv_freq: [rotary_dim / 2] float64, radians per token.
      attention_factor: factor for cos and sin.
    """
    scaling, theta = resolve(config, request_length)
    inv = _inverse(theta, config.rotary_dim)
    if scaling.kind == "linear":
        return inv / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(inv, scaling, theta), _yarn_attention_factor(scaling)
    if scaling.kind == "llama3":
        return _llama3(inv, scaling), 1.0
    if scaling.kind == "longrope":
        long = request_length > scaling.original_length
        extension = np.array(scaling.long_factor if long else scaling.short_factor)
        return inv / extension, _longrope_attention_factor(scaling)
    return inv, 1.0


def resolve(config: ModelConfig, request_length: int) -> tuple[RopeScaling, float]:
    """Returns the scaling and the base theta that a request of this length uses.

    auto is replaced by the scaling that it chooses. ntk and dynamic raise theta.
    """
    scaling, theta, dim = config.rope_scaling, config.rope_theta, config.rotary_dim
    if scaling.kind == "auto":
        scaling = automatic_scaling(config, request_length)
    if scaling.kind == "ntk":
        theta = _stretched(theta, scaling.factor, dim)
    if scaling.kind == "dynamic":
        trained = config.max_position_embeddings
        stretch = scaling.factor * max(request_length, trained) / trained - (scaling.factor - 1)
        theta = _stretched(theta, stretch, dim)
    return scaling, theta


def automatic_scaling(config: ModelConfig, request_length: int) -> RopeScaling:
    """Returns the scaling that rope_scaling "auto" chooses for one request.

    There is no scaling up to the trained length. Above it, the scaling is YaRN with the smallest
    factor that covers the request: of all kinds it loses least, see docs/evaluation.md.
    """
    trained = config.max_position_embeddings
    if request_length <= trained:
        return RopeScaling()
    factor = request_length / trained
    return RopeScaling(kind="yarn", factor=factor, original_length=trained)


def _stretched(theta: float, factor: float, dim: int) -> float:
    """Returns the NTK-aware base theta.

    The slowest channel then rotates `factor` times slower, and the fastest as before.
    """
    return theta * factor ** (dim / (dim - 2))


def _inverse(theta: float, dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def _yarn(inv: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    dim = 2 * inv.size

    def channel_turning(rotations: float) -> float:
        """Returns the channel that makes this many rotations over the original length."""
        turns = scaling.original_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = channel_turning(scaling.beta_fast), channel_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(inv.size) - low) / (high - low), 0, 1)
    return inv / scaling.factor * ramp + inv * (1 - ramp)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length))


def _llama3(inv: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_length * inv / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inv / scaling.factor + smooth * inv
