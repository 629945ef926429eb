"""StreamingLLM: the first tokens and a window of the last ones, for texts of any length.

Attention needs the first tokens, on which models put weight that they have no use for (attention
sinks). Positions are those within the cache: a query is never farther from a key than the cache is
long, so a model reads on past its trained length as it reads within it. What lies between the sinks
and the window is forgotten. Source: StreamingLLM (arXiv 2309.17453).
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge
from lsjax.cache import CacheSpec, KVCache, LayerCache, Step, empty_layer
from lsjax.compression.policy import Compression, check_no_windows, check_tokens
from lsjax.config import MAX_POSITIONS, ModelConfig
from lsjax.distributed.sequence_layout import Zigzag
from lsjax.distributed.sharding import FLOAT_TAIL_SPEC
from lsjax.positions.rotary import rotate, rotation_back
from lsjax.runtime.errors import UserError


@flax.struct.dataclass
class SinkCache:
    """The first tokens of a layer, and a rolling cache of the last ones.

    Keys of the window are rotated by their positions in the text, which are as far from the query's
    as their positions in the cache are. For the sinks, queries are rotated back to their positions
    in the cache.

    Attributes:
      k, v: [batch, kv_heads, sinks, head_dim] floats; every device has all of them.
      last_tokens: cache of the last tokens.
      window: number of last tokens that a query sees, itself included.
    """

    k: jax.Array
    v: jax.Array
    last_tokens: LayerCache
    window: int = flax.struct.field(pytree_node=False)

    @property
    def zigzag(self) -> Zigzag:
        return self.last_tokens.zigzag

    @property
    def block(self) -> int | None:
        return self.last_tokens.block

    def partition_specs(self) -> "SinkCache":
        last_tokens = self.last_tokens.partition_specs()
        return self.replace(k=FLOAT_TAIL_SPEC, v=FLOAT_TAIL_SPEC, last_tokens=last_tokens)

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "SinkCache"]:
        sinks = self.k.shape[2]
        begin = jnp.maximum(step.positions + 1 - self.window, sinks)
        partial, last_tokens = self.last_tokens.update_and_attend(
            q, k, v, step.replace(begin=begin, blocks=None)
        )
        if not sinks:
            return partial, self.replace(last_tokens=last_tokens)
        cache = self.replace(
            k=self._with_sinks(self.k, k, step),
            v=self._with_sinks(self.v, v, step),
            last_tokens=last_tokens,
        )
        # Where the query stands in the cache, and how far that is before its place in the text.
        at = jnp.minimum(step.positions, sinks + self.window - 1)
        if step.tables is not None:
            angles = rotation_back(step.tables, step.positions - at)
            turn = functools.partial(rotate, interleaved=step.rope_interleaved)
            heads = q.reshape(q.shape[0], -1, *q.shape[3:]).swapaxes(1, 2)
            q = turn(heads, *angles).swapaxes(1, 2).reshape(q.shape)
        arrays = KVArray(cache.k, None), KVArray(cache.v, None)
        seen = jnp.minimum(step.positions + 1, sinks)
        first = step.replace(positions=at).attend(q, *arrays, None, seen, jnp.arange(sinks))
        return merge(partial, first), cache

    def _with_sinks(self, held: jax.Array, new: jax.Array, step: Step) -> jax.Array:
        """Writes those of the new tokens that are sinks."""
        is_sink = step.positions[:, :, None] == jnp.arange(held.shape[2])  # [batch, length, sinks]
        if step.lengths is not None:
            is_sink &= (step.positions < step.lengths[:, None])[:, :, None]
        chosen = jnp.argmax(is_sink, axis=1)[:, None, :, None]
        found = jnp.take_along_axis(new, chosen, axis=2).astype(held.dtype)
        here = jnp.any(is_sink, axis=1)
        if step.around_ring(self.zigzag):  # each sink is on one device
            found = jax.lax.psum(jnp.where(here[:, None, :, None], found, 0), "context")
            here = jax.lax.psum(here.astype(jnp.int32), "context") > 0
        return jnp.where(here[:, None, :, None], found, held)


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Compression):
    """Settings of StreamingLLM, which need nothing of the model and are their own resolution.

    Attributes:
      sinks: number of first tokens that are kept.
      window: number of last tokens that are kept; None for as many as fit the trained length.
    """

    sinks: int = 4
    window: int | None = None

    scores_prompts = True
    keeps_drafts = True

    def check(self) -> None:
        """Refuses settings out of range with a UserError."""
        check_tokens("sinks", self.sinks, 0)
        if self.window is not None:
            check_tokens("window", self.window, 1)

    def resolve(self, folder: str, config: ModelConfig, shards: int) -> "StreamingLLM":
        """Returns the settings with their window.

        Raises:
          UserError: the model has sliding windows or recurrent layers, or serves less than sinks
            and window.
        """
        check_no_windows("streaming_llm", config)
        if config.recurrences:
            raise UserError(
                "kv_compression streaming_llm does not go with recurrent layers, whose state does "
                "not forget what lies between the sinks and the window; use kv_compression razor."
            )
        window = self.window or config.trained_length - self.sinks
        if window < 1 or self.sinks + window > config.served_length:
            raise UserError(
                f"kv_compression streaming_llm keeps {self.sinks} sinks and {window} last tokens, "
                f"but the model serves {config.served_length}; make sinks and window smaller."
            )
        return dataclasses.replace(self, window=window)

    def estimate(self, config: ModelConfig, shards: int) -> "StreamingLLM":
        """Returns the same as `resolve`."""
        return self.resolve("", config, shards)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "streaming_llm", **dataclasses.asdict(self)}

    def empty_cache(self, config: ModelConfig, spec: CacheSpec, platform: str) -> KVCache:
        last_tokens = empty_layer(config, spec, platform, self.window)
        shape = spec.batch, config.num_kv_heads, self.sinks, config.head_dim
        zeros = jnp.zeros(shape, spec.compute_dtype)
        return (SinkCache(zeros, zeros, last_tokens, self.window),) * config.num_layers

    def served_length(self, config: ModelConfig) -> int:
        return MAX_POSITIONS

    def span(self, length: int) -> int:
        return min(length, self.sinks + self.window)

    def summary(self, config: ModelConfig, prompt_capacity: int) -> str:
        return f"the first {self.sinks} tokens and the last {self.window:,} are kept"

    def warning(self, config: ModelConfig) -> str | None:
        return (
            f"kv_compression streaming_llm forgets what lies between the first {self.sinks} tokens "
            f"and the last {self.window:,}"
        )
