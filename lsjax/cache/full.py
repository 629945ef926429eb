"""A cache of all tokens."""

from typing import Self

import flax.struct
import jax

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial
from lsjax.cache.protocol import Step
from lsjax.cache.slots import (
    attend_by_chunk,
    attend_to_slots,
    merge_devices,
    quantize_both,
    write_slots,
)
from lsjax.distributed.sequence_layout import ONE_DEVICE, Zigzag
from lsjax.distributed.sharding import CACHE_SPEC


@flax.struct.dataclass
class FullCache:
    """Keys and values of all positions; with a window, queries see the last of them.

    Attributes:
      k, v: [batch, kv_heads, capacity, head_dim]; slot s holds position s of `zigzag`.
      zigzag: layout of positions along the mesh's context axis.
      chunk: positions of which each prefill chunk's first one is a multiple, and at most that many
        are in a chunk; 0 if chunks may start anywhere.
    """

    k: KVArray
    v: KVArray
    zigzag: Zigzag = flax.struct.field(pytree_node=False, default=ONE_DEVICE)
    chunk: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def block(self) -> None:
        return None

    def partition_specs(self) -> "FullCache":
        return jax.tree.map(lambda _: CACHE_SPEC, self)

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "FullCache"]:
        cache, new_k, new_v = self._written(k, v, step)
        if not step.within_chunks(self.chunk):
            step = step.replace(blocks=None)
        if step.around_ring(self.zigzag) and step.blocks:
            args = q, cache.k, cache.v, new_k, new_v, step, self.zigzag
            return attend_by_chunk(*args), cache
        device = jax.lax.axis_index("context")
        first = step.positions[0, 0]
        count = self.zigzag.num_local_slots_before(device, first) + k.shape[2]
        partial = attend_to_slots(
            q, cache.k, cache.v, step, self.zigzag, step.begin, step.end, count
        )
        return merge_devices(partial, step, self.zigzag), cache

    def _written(self, k: jax.Array, v: jax.Array, step: Step) -> tuple[Self, KVArray, KVArray]:
        """Returns the cache with a step's keys and values, and these in its format."""
        first = step.positions[:, 0]
        new_k, new_v = quantize_both(self.k, k, v)
        cache = self.replace(
            k=write_slots(self.k, new_k, first, step, self.zigzag),
            v=write_slots(self.v, new_v, first, step, self.zigzag),
        )
        return cache, new_k, new_v
