"""A rolling window of the last tokens beside the first ones, for the heads that need no more.

A window keeps the first tokens, the last tokens, and one compensation token that stands for all the
tokens dropped in between: it has the means of their keys and values, and counts as many times as
there are dropped tokens. With ALiBi it keeps only the last tokens, because the tokens that it drops
have next to no weight. Source: RazorAttention (arXiv 2407.15891).

With dual chunk attention each view of a query sees what is left of its range of keys, and the
compensation token as many times as tokens of that range were dropped.

The queries of a prefill chunk see the window as it was before the chunk, the compensation token,
and the chunk's tokens up to themselves. So tokens past the first windowful see less than with a
cache that is compressed after the whole prompt.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.attention.blockwise import QueryBlocks
from lsjax.attention.hadamard import hadamard_transform
from lsjax.attention.kv_array import KVArray, write_tokens
from lsjax.attention.partial import Partial, merge, merge_over_axis
from lsjax.cache.compensation_token import CompensationToken, attend_to_compensation_token
from lsjax.cache.protocol import Step
from lsjax.distributed.sequence_layout import CAPACITY_MULTIPLE, Zigzag
from lsjax.distributed.sharding import CACHE_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """The tokens that a window head keeps: the first ones, then a ring buffer of the last ones.

    Attributes:
      sinks: number of first tokens kept.
      last: number of last tokens kept.
      has_compensation: whether a compensation token stands for the dropped tokens.
    """

    sinks: int
    last: int
    has_compensation: bool = True

    @property
    def slots(self) -> int:
        return self.sinks + self.last

    def capacity(self, capacity: int, context: int) -> int:
        """Returns the number of slots to allocate, at most the `capacity` of the full cache.

        Rounded up to a multiple of CAPACITY_MULTIPLE on each of the `context` devices.
        """
        multiple = CAPACITY_MULTIPLE * context
        return min(capacity, -(-self.slots // multiple) * multiple)

    def slot(self, position: jax.Array) -> jax.Array:
        """Returns the slot of a position."""
        behind = self.sinks + (position - self.sinks) % self.last
        return jnp.where(position < self.sinks, position, behind)

    def positions(self, slots: jax.Array, length: jax.Array) -> jax.Array:
        """Returns [..., slots] positions that slots hold after `length` [...] tokens.

        A slot that is still empty gets a position of at least `length`.
        """
        newest = length[..., None] - 1
        rolled = newest - (newest - slots) % self.last
        return jnp.where((slots < self.sinks) | (rolled < self.sinks), slots, rolled)

    def slot_ranges(
        self, begin: jax.Array, end: jax.Array, length: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Returns the slots of those positions begin .. end - 1 that are kept.

        Args:
          begin, end: [..., queries] positions.
          length: [...] number of tokens of the text.

        Returns:
          Start and stop, [..., queries] each, of three ranges of slots: those of the sinks, of the
          ring buffer's present lap, and of the rest of the lap before.
        """
        length, sinks, last = length[..., None], self.sinks, self.last
        lap = sinks + jnp.maximum(length - 1 - sinks, 0) // last * last  # its first position
        oldest = jnp.clip(length - last, sinks, lap)

        def slots(first: jax.Array, stop: jax.Array, offset: jax.Array | int) -> tuple:
            return tuple(jnp.clip(at, first, stop) - offset for at in (begin, end))

        return (
            slots(jnp.zeros_like(length), jnp.minimum(length, sinks), 0),
            slots(lap, jnp.maximum(length, lap), lap - sinks),
            slots(oldest, lap, lap - last - sinks),
        )


@flax.struct.dataclass
class WindowCache:
    """The cache of heads that keep a window.

    Attributes:
      k, v: [batch, kv_heads, slots, head_dim]; slots are sharded over the context axis in order,
        not in zigzag order.
      compensation_token: the token that stands for the dropped ones, or None.
      next_evicted: key and value, [batch, kv_heads, head_dim] float32 each, of the token that the
        next token evicts; None if there is no compensation token, or no next token. They are read
        after a step's write, because XLA copies an array that is read before it is written.
      spec: the window, which says what each slot holds.
      zigzag: layout of a prefill chunk along the mesh's context axis.
    """

    k: KVArray
    v: KVArray
    compensation_token: CompensationToken | None
    next_evicted: tuple[jax.Array, jax.Array] | None
    spec: WindowSpec = flax.struct.field(pytree_node=False)
    zigzag: Zigzag = flax.struct.field(pytree_node=False)

    @property
    def block(self) -> None:
        return None

    def partition_specs(self) -> "WindowCache":
        k, v = (jax.tree.map(lambda _: CACHE_SPEC, store) for store in (self.k, self.v))
        if self.compensation_token is None:
            return self.replace(k=k, v=v)
        dropped = CompensationToken(FLOAT_TAIL_SPEC, FLOAT_TAIL_SPEC, TOKENS_SPEC)
        evicted = self.next_evicted and (FLOAT_TAIL_SPEC, FLOAT_TAIL_SPEC)
        return self.replace(k=k, v=v, compensation_token=dropped, next_evicted=evicted)

    def update_and_attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: Step
    ) -> tuple[Partial, "WindowCache"]:
        if self.k.scale is not None:
            q, k = hadamard_transform(q).astype(q.dtype), hadamard_transform(k)
        return (self._decode if step.decode else self._prefill)(q, k, v, step)

    def _decode(self, q, k, v, step):
        """Runs a decode step of a single token; see update_and_attend."""
        spec, position = self.spec, step.positions[:, 0]
        before, _ = self._slots()
        slot = spec.slot(position)

        def put(store: KVArray, new: jax.Array) -> KVArray:
            new = store.quantize(new)
            args = slot, slot - before, lambda s: s + before, step.platform
            return write_tokens(store, new, *args)

        cache = self.replace(k=put(self.k, k), v=put(self.v, v))
        partial = cache._attend_to_kept(q, step, step.end, position + 1)
        if self.compensation_token is None:
            return partial, cache
        token = self.compensation_token.add(*self.next_evicted, position >= spec.slots)
        evicted = next_evicted(cache, position + 1)
        cache = cache.replace(compensation_token=token, next_evicted=evicted)
        return merge(partial, cache._attend_to_dropped(q, step)), cache

    def _prefill(self, q, k, v, step):
        """Runs a chunk; see update_and_attend."""
        start, everyone, all_tokens = step.positions[0, 0], q, step
        if self.zigzag.devices > 1:
            # The window's shards stay where they are. All devices get all queries, and also the
            # chunk's keys and values, which each device needs for its own slots.
            everyone, k, v = (_in_order(x, self.zigzag) for x in (q, k, v))
            start = start // self.zigzag.block_length * self.zigzag.block_length
            at = jnp.broadcast_to(start + jnp.arange(k.shape[2]), (k.shape[0], k.shape[2]))
            all_tokens = step.replace(positions=at)
        before = jnp.minimum(start, step.lengths)  # tokens per row that the window has seen
        held = jnp.broadcast_to(before[:, None], all_tokens.positions.shape)
        partial = self._attend_to_kept(everyone, all_tokens, held, before)
        if self.zigzag.devices > 1:
            order = self.zigzag.permutation(k.shape[2]).reshape(self.zigzag.devices, -1)
            local_order = jnp.asarray(order)[jax.lax.axis_index("context")]
            partial = jax.tree.map(lambda x: jnp.take(x, local_order, axis=3), partial)
        chunk = KVArray(k, None), KVArray(v, None)
        end, positions = step.positions + 1 - start, start + jnp.arange(k.shape[2])
        blocks = QueryBlocks(k.shape[2], causal=True) if self.zigzag.devices == 1 else None
        partial = merge(partial, step.attend(q, *chunk, None, end, positions, blocks))
        if self.compensation_token is not None:
            partial = merge(partial, self._attend_to_dropped(q, step))
        after = jnp.minimum(start + k.shape[2], step.lengths)
        return partial, _rolled(self, k, v, start, before, after)

    def attend_to_held(self, q: jax.Array, step: Step, length: jax.Array) -> Partial:
        """Attends to what is held of a text, and writes nothing.

        Args:
          q: queries; see LayerCache. On a mesh each device has its own around the ring, and else
            all of them.
          step: the step. Its `end` is zero for queries that are padding, which may see nothing.
          length: [] number of tokens of the text.
        """
        everyone, all_tokens, around = q, step, step.around_ring(self.zigzag)
        if around:  # the window's shards stay where they are
            everyone = jax.lax.all_gather(q, "context", axis=3, tiled=True)
            positions, begin, end = jax.tree.map(
                lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True),
                (step.positions, step.begin, step.end),
            )
            all_tokens = step.replace(positions=positions, begin=begin, end=end)
        partial = self._attend_to_kept(everyone, all_tokens, all_tokens.end, length)
        if around:
            here, size = jax.lax.axis_index("context"), q.shape[3]
            partial = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, here * size, size, axis=3), partial
            )
        if self.compensation_token is None:
            return partial
        return merge(partial, self._attend_to_dropped(q, step))

    def _attend_to_kept(
        self, q: jax.Array, step: Step, end: jax.Array, length: jax.Array
    ) -> Partial:
        """Attends to the slots of all devices.

        Args:
          q: all devices' queries; see LayerCache.
          step: the step. Queries see what is kept from its `begin` on.
          end: [batch, queries] position before which they see it.
          length: [batch] or [] number of tokens of which the window is what is kept.
        """
        first, own_slots = self._slots()
        positions = self.spec.positions(own_slots, length)

        def attend(start: jax.Array | None, stop: jax.Array, blocks: QueryBlocks | None) -> Partial:
            start, stop = jax.tree.map(
                lambda slot: jnp.clip(slot - first, 0, self.k.capacity), (start, stop)
            )
            return step.attend(q, self.k, self.v, start, stop, positions, blocks)

        if step.begin is None:
            stop = jnp.minimum(jnp.minimum(end, length[..., None]), self.spec.slots)
            partial = attend(None, stop, QueryBlocks(q.shape[3], causal=False))
        else:
            ranges = self.spec.slot_ranges(step.begin, end, length)
            partial = functools.reduce(merge, (attend(*x, None) for x in ranges))
        return merge_over_axis(partial, "context") if self.zigzag.devices > 1 else partial

    def _attend_to_dropped(self, q: jax.Array, step: Step) -> Partial:
        """Attends to the compensation token."""
        token, count = self.compensation_token, None
        if step.begin is not None:
            count = token.count_between(step.begin, step.end, self.spec.sinks)
        return attend_to_compensation_token(q, token, count)

    def _slots(self) -> tuple[jax.Array, jax.Array]:
        """Returns this device's first slot, and all its slots."""
        first = jax.lax.axis_index("context") * self.k.capacity
        return first, first + jnp.arange(self.k.capacity)


def window_of(
    k: KVArray, v: KVArray, lengths: jax.Array, zigzag: Zigzag, spec: WindowSpec
) -> WindowCache:
    """Builds the window cache from the full keys and values of its heads."""
    each = k.capacity // zigzag.devices
    slots = jnp.arange(spec.capacity(k.capacity, zigzag.devices))
    at = spec.positions(slots, lengths)  # [batch, slots]
    index = zigzag.device(at) * each + zigzag.num_local_slots_before(zigzag.device(at), at)

    def gather_slots(x: jax.Array) -> jax.Array:
        where = jnp.minimum(index, x.shape[2] - 1).reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, where, axis=2)

    kept_k, kept_v = (jax.tree.map(gather_slots, x) for x in (k, v))
    if not spec.has_compensation:
        return WindowCache(kept_k, kept_v, None, None, spec, zigzag)
    # The position of each slot, device by device.
    device, slot = jnp.divmod(jnp.arange(k.capacity), each)
    position = zigzag.position(device, slot)
    dropped = (position >= spec.sinks) & (position < lengths[:, None] - spec.last)
    count = jnp.sum(dropped, axis=1)

    def mean(store: KVArray) -> jax.Array:
        total = jnp.sum(jnp.where(dropped[:, None, :, None], store.dequantize(), 0), axis=2)
        return total / jnp.maximum(count, 1)[:, None, None]

    next_evicted = tuple(floats_at(x, spec.slot(lengths)) for x in (kept_k, kept_v))
    token = CompensationToken(mean(k), mean(v), count)
    return WindowCache(kept_k, kept_v, token, next_evicted, spec, zigzag)


def floats_at(store: KVArray, slot: jax.Array) -> jax.Array:
    """Returns the dequantized entries at `slot` [batch], [batch, kv_heads, head_dim] float32.

    A row whose slot is outside `store` gets zeros.
    """
    inside = (slot >= 0) & (slot < store.capacity)
    at = jnp.clip(slot, 0, store.capacity - 1)

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1))(x, at)

    found = jax.tree.map(take, store).dequantize()[:, :, 0]
    return jnp.where(inside[:, None, None], found, 0)


def _in_order(x: jax.Array, zigzag: Zigzag) -> jax.Array:
    """All-gathers shards [..., length, head_dim] in zigzag order into the order of positions."""
    axis = x.ndim - 2
    x = jax.lax.all_gather(x, "context", axis=axis, tiled=True)
    return jnp.take(x, jnp.argsort(jnp.asarray(zigzag.permutation(x.shape[axis]))), axis=axis)


def _rolled(
    cache: WindowCache,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    before: jax.Array,
    after: jax.Array,
) -> WindowCache:
    """Returns the window after a chunk.

    Args:
      cache: window before the chunk.
      k, v: [batch, kv_heads, length, head_dim] keys and values of the whole chunk.
      start: first position of the chunk.
      before, after: [batch] number of tokens that the window has seen before and after the chunk.
    """
    spec, local_capacity = cache.spec, cache.k.capacity
    slots = jax.lax.axis_index("context") * local_capacity + jnp.arange(local_capacity)
    at = spec.positions(slots, after)
    comes = (at >= start) & (at < after[:, None])

    def put(store: KVArray, new: jax.Array) -> KVArray:
        def update_array(held: jax.Array, new: jax.Array) -> jax.Array:
            def by_slot(x: jax.Array) -> jax.Array:
                return x.reshape(x.shape[0], 1, local_capacity, *[1] * (held.ndim - 3))

            index = jnp.clip(at - start, 0, new.shape[2] - 1)
            return jnp.where(by_slot(comes), jnp.take_along_axis(new, by_slot(index), 2), held)

        return jax.tree.map(update_array, store, store.quantize(new))

    rolled = cache.replace(k=put(cache.k, k), v=put(cache.v, v))
    if cache.compensation_token is None:
        return rolled
    was, first = spec.positions(slots, before), (after - spec.last)[:, None]
    leave = (was >= spec.sinks) & (was < before[:, None]) & (was < first) & (slots < spec.slots)
    position = start + jnp.arange(k.shape[2])
    pass_by = (position >= spec.sinks) & (position < first)
    count = jnp.maximum(after - spec.last - spec.sinks, 0)
    more = count - cache.compensation_token.count

    def mean(old: jax.Array, store: KVArray, new: jax.Array) -> jax.Array:
        gone = jnp.sum(jnp.where(leave[:, None, :, None], store.dequantize(), 0), axis=2)
        gone = jax.lax.psum(gone, "context")
        new = jnp.where(pass_by[:, None, :, None], new.astype(jnp.float32), 0)
        total = gone + jnp.sum(new, axis=2)
        return old + (total - more[:, None, None] * old) / jnp.maximum(count, 1)[:, None, None]

    token = CompensationToken(
        mean(cache.compensation_token.k, cache.k, k),
        mean(cache.compensation_token.v, cache.v, v),
        count,
    )
    return rolled.replace(compensation_token=token, next_evicted=next_evicted(rolled, after))


def next_evicted(cache: WindowCache, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the key and value in the slot that the token at `position` [batch] will overwrite.

    Each is [batch, kv_heads, head_dim] float32; see WindowCache.
    """
    slot = cache.spec.slot(position) - jax.lax.axis_index("context") * cache.k.capacity
    # Only one device has the slot; the others give zeros.
    return jax.lax.psum(tuple(floats_at(store, slot) for store in (cache.k, cache.v)), "context")
