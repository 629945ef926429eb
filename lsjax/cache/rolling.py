"""A cache of the last tokens, for layers whose queries see a sliding window."""

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.kv_array import KVArray
from lsjax.attention.partial import Partial, merge
from lsjax.cache.full import FullCache
from lsjax.cache.protocol import Step
from lsjax.cache.slots import attend_to_slots, merge_devices, quantize_both, write_slots


@flax.struct.dataclass
class RollingCache(FullCache):
    """Keys and values of the last positions: position p is kept at p modulo the capacity.

    Slots hold the positions of the present lap so far, and the rest of the lap before; `zigzag` is
    the layout of a lap. The capacity is at least the window and a prefill chunk, which never wraps
    around the end.
    """

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "RollingCache"]:
        capacity = self.k.capacity * self.zigzag.devices
        lap = step.positions // capacity * capacity  # each token's lap, by its first position
        cache = self._written(k, v, step, lap, capacity)
        if step.blocks:
            return self._in_order(q, cache, step, capacity), cache
        # Around the ring: slots in use on each device, in this lap and in the one before.
        device, start = jax.lax.axis_index("context"), lap[0, 0]
        first = step.positions[0, 0] - start
        count = self.zigzag.num_local_slots_before(device, first) + k.shape[2]
        before = jnp.where(start > 0, self.k.capacity, 0)

        def attend(lap, end, count):
            begin = step.begin - lap
            offset = lap[:1, 0] if step.around_ring(self.zigzag) else lap[:, :1]
            return attend_to_slots(
                q, cache.k, cache.v, step, self.zigzag, begin, end - lap, count, offset
            )

        partial = merge(
            attend(lap, step.end, count),
            attend(lap - capacity, jnp.minimum(step.end, lap), before),
        )
        return merge_devices(partial, step, self.zigzag), cache

    def _in_order(self, q: jax.Array, cache: FullCache, step: Step, capacity: int) -> Partial:
        """Attends to the slots in the order of positions, which take a copy of them."""
        first = jnp.maximum(step.positions[0, -1] + 1 - capacity, 0)
        k, v = (
            jax.tree.map(lambda x: jnp.roll(x, -first, axis=2), store)
            for store in (cache.k, cache.v)
        )
        positions = first + jnp.arange(capacity)
        begin, end = step.begin - first, step.end - first
        return step.attend(q, k, v, begin, end, positions, step.blocks)

    def _written(
        self, k: jax.Array, v: jax.Array, step: Step, lap: jax.Array, capacity: int
    ) -> "RollingCache":
        # Padding behind a row's end would overwrite what its window still holds.
        valid = None if step.lengths is None else step.positions < step.lengths[:, None]
        first = step.positions[:, 0] - lap[:, 0]

        def put(store: KVArray, new: KVArray) -> KVArray:
            store = write_slots(store, new, first, step, self.zigzag, valid)
            if not step.decode or k.shape[2] == 1:
                return store
            # Drafts past the lap's end.
            return write_slots(store, new, first - capacity, step, self.zigzag)

        new_k, new_v = quantize_both(self.k, k, v)
        return self.replace(k=put(self.k, new_k), v=put(self.v, new_v))
