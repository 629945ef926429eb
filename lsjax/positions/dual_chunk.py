"""Dual chunk attention: rotations that stay within the trained distances at any length.

Positions are in chunks of `stride`. A key is rotated by its place in its chunk, whichever query
sees it. A query is rotated in three ways, each for a range of keys: those of its own chunk, of the
chunk before, and of all earlier ones. Within the chunk size that is plain rotation. Past the
original length all scores grow by a factor that follows from the length of the request.
Source: ChunkLlama (arXiv 2402.17463); the factor is Qwen2.5-1M's (arXiv 2501.15383).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lsjax.config import MAX_POSITIONS, ModelConfig


@dataclasses.dataclass(frozen=True)
class DualChunk:
    """The chunks of positions.

    Attributes:
      size: largest distance, in tokens, that any rotation shows.
      stride: number of positions in a chunk; `size` less those that stay exact across its border.
    """

    size: int
    stride: int

    def key_position(self, position: jax.Array) -> jax.Array:
        """Returns the position that the key at `position` is rotated to."""
        return position % self.stride

    def query_positions(self, position: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the position that a query is rotated to for each range of keys."""
        place = position % self.stride
        farthest = jnp.full_like(position, min(2 * self.stride - 1, self.size))
        return farthest, jnp.minimum(place + self.stride, self.size), place

    def holds_whole(self, size: int) -> bool:
        """Returns whether positions from one multiple of `size` to the next are in one chunk."""
        return size > 0 and self.stride % size == 0

    def unlimited_offsets(self) -> tuple[int, ...]:
        """Returns how far beyond its place in its chunk a query is rotated to choose among keys.

        There is one for each range of keys. Unlike `query_positions` they tell distances apart that
        are larger than the chunk size.
        """
        return self.size, self.stride, 0

    def key_ranges(self, position: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Returns the first key of each range and the one after its last.

        They are those of the earlier chunks, of the chunk before and of the query's own, which
        tile the positions up to the query's. At the start of a text some are empty.
        """
        own = position // self.stride * self.stride
        before = jnp.maximum(own - self.stride, 0)
        return (jnp.zeros_like(own), before), (before, own), (own, position + 1)


def chunks_for(config: ModelConfig, request_length: int) -> DualChunk | None:
    """Returns the chunks that a request has; None if plain rotation gives the same.

    `request_length` is the prompt plus the requested output, in tokens.
    """
    scaling = config.rope_scaling
    if scaling.kind != "dual_chunk":
        return None
    size = scaling.chunk_size
    if request_length <= min(size, config.trained_length):
        return None
    return DualChunk(size, size - scaling.local_size)


def score_factor(config: ModelConfig, request_length: int) -> float:
    """Returns the factor of all scores of a request of this length."""
    scaling = config.rope_scaling
    original = scaling.original_length if scaling.kind == "dual_chunk" else None
    if not original or request_length <= original:
        return 1.0
    return (0.1 * math.log(request_length / original) + 1) ** 2


def settled_length(config: ModelConfig, length: int) -> int:
    """Returns the longest request whose keys are those of a request of `length` tokens.

    Up to the trained length all requests are alike. Past it only those without the factor are.
    """
    trained, scaling = config.trained_length, config.rope_scaling
    if scaling.kind == "dual_chunk" and not scaling.original_length and length > trained:
        return MAX_POSITIONS
    return max(length, trained)
