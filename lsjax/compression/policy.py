"""What every way of keeping less of the KV cache has in common."""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from lsjax.cache import CacheSpec, HeadSplit, KVCache, LayerCache
from lsjax.config import ModelConfig
from lsjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Compression:
    """What the layers of a model keep of their KV cache, resolved for the model and its mesh.

    Attributes:
      by_layer: whether prompts are prefilled layer by layer, each layer's cache being compressed as
        soon as the layer is done; see inference.layerwise_prefill.
      scores_prompts: whether a prompt's own tokens see what is kept, so that their scores show
        what it costs.
      keeps_drafts: whether a draft that is refused leaves what is kept as it was.
      reorders_heads: whether the model's heads are in another order than the checkpoint's.
    """

    by_layer = False
    scores_prompts = False
    keeps_drafts = False
    reorders_heads = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it follows from, as `kv_compression` takes them."""
        raise NotImplementedError

    def empty_cache(self, config: ModelConfig, spec: CacheSpec, platform: str) -> KVCache:
        """Creates the cache of each layer, filled with zeros; see CachePolicy."""
        raise NotImplementedError

    def split(self, layer: int, prompt_capacity: int) -> HeadSplit:
        """Returns a layer's head groups, for prompts of up to `prompt_capacity` tokens.

        Asked only if `by_layer`, as `compress` and `head_order`, and of layers of attention.
        """
        raise NotImplementedError

    def compress(self, cache: LayerCache, lengths: jax.Array, split: HeadSplit) -> LayerCache:
        """Compresses the full cache of a layer with `lengths` [batch] tokens in each row."""
        raise NotImplementedError

    def head_order(self, layer: int) -> tuple[int, ...]:
        """Returns a layer's KV heads in the order in which the model runs them."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """What decides which tokens a head keeps, in any order of heads and on any mesh."""
        return str(self.settings)

    def moved_channels(self, config: ModelConfig) -> dict[str, tuple[int, np.ndarray]]:
        """Returns, by path, the axis of a weight that is in another order, and its channels.

        Those are the channels of the checkpoint in the order in which the model has them.
        """
        return {}

    def query_heads(self, config: ModelConfig) -> tuple[tuple[int, ...], ...] | None:
        """Returns each layer's query heads in their new order; None if the order is as it was."""
        return None

    def reorder_heads(self, params: dict, config: ModelConfig) -> dict:
        """Returns the parameters with their heads in the new order."""
        return params

    def served_length(self, config: ModelConfig) -> int:
        """Returns the longest sequence, in tokens, that the model serves with this cache.

        Dual chunk attention needs all keys of a prompt while it is read.
        """
        forgets = config.rope_scaling.kind == "dual_chunk" and not self.by_layer
        return config.trained_length if forgets else config.served_length

    def span(self, length: int) -> int:
        """Returns how far apart positions get in a text of `length` tokens, at most."""
        return length

    def summary(self, config: ModelConfig, prompt_capacity: int) -> str:
        """Says in a few words what is kept of prompts of up to `prompt_capacity` tokens."""
        raise NotImplementedError

    def warning(self, config: ModelConfig) -> str | None:
        """Says what it costs, if users should know."""
        return None


class CompressionSettings(Protocol):
    """Settings of one kind of compression, as given in `kv_compression`."""

    def check(self) -> None:
        """Refuses settings out of range with a UserError."""

    def resolve(self, folder: str, config: ModelConfig, shards: int) -> Compression:
        """Returns the compression of the model in `folder`.

        Args:
          folder: model folder.
          config: model configuration.
          shards: number of devices on the model axis.

        Raises:
          UserError: the model does not support it, or a file that it needs is missing.
        """

    def estimate(self, config: ModelConfig, shards: int) -> Compression:
        """Returns a compression of the same size without a folder; errors are as in `resolve`."""


def served_length(config: ModelConfig, compression: Compression | None) -> int:
    """Returns the longest sequence, in tokens, that a model serves, compressed or not."""
    return config.served_length if compression is None else compression.served_length(config)


def check_tokens(name: str, count: Any, least: int) -> None:
    """Refuses a setting that is not a number of tokens from `least` on with a UserError."""
    if not has_type(count, int) or count < least:
        raise UserError(
            f"kv_compression: {name} is a number of tokens from {least}, not {count!r}."
        )


def check_no_windows(kind: str, config: ModelConfig) -> None:
    """Refuses a model with sliding windows with a UserError."""
    if any(config.windows):
        raise UserError(
            f"kv_compression {kind} does not go with sliding windows, whose layers keep no more "
            "than their window sees; use kv_compression none."
        )


def has_type(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Returns whether a setting has a type; true and false are not numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
