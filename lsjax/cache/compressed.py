"""The cache of a layer whose heads differ in reach: a few keep everything, the rest a window.

A head of short reach keeps the first tokens, the last ones, and one compensation token that stands
for all those dropped between: the means of their keys and values, weighing as much as they are.
With ALiBi it keeps the last ones only: what it drops has next to no weight.
Source: RazorAttention (arXiv 2407.15891).
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from lsjax.cache.kv_cache import LayerCache
from lsjax.cache.store import Store
from lsjax.cache.zigzag import GRANULE, Zigzag


@dataclasses.dataclass(frozen=True)
class WindowSpec:
    """What a head of short reach keeps: the first tokens, and the last ones in a ring behind them.

    Attributes:
      sinks: tokens kept from the first on.
      last: of the last tokens, how many are kept.
      compensates: whether a compensation token stands for those dropped.
    """

    sinks: int
    last: int
    compensates: bool = True

    @property
    def slots(self) -> int:
        return self.sinks + self.last

    def capacity(self, capacity: int, context: int) -> int:
        """Slots that are set up for rows of `capacity` slots in all: never more than those."""
        granule = GRANULE * context
        return min(capacity, -(-self.slots // granule) * granule)

    def slot(self, position: jax.Array) -> jax.Array:
        """Where a position is kept."""
        behind = self.sinks + (position - self.sinks) % self.last
        return jnp.where(position < self.sinks, position, behind)

    def positions(self, slots: jax.Array, length: jax.Array) -> jax.Array:
        """Which of `length` [...] tokens slots keep, [..., slots]; some later one for none yet."""
        newest = length[..., None] - 1
        turned = newest - (newest - slots) % self.last
        return jnp.where((slots < self.sinks) | (turned < self.sinks), slots, turned)


@flax.struct.dataclass
class Dropped:
    """The compensation token of each head: what stands for the tokens that it has dropped.

    Attributes:
      k, v: [batch, kv_heads, head_dim] float32, their means, keys as they are attended to.
      count: [batch] how many they are.
    """

    k: jax.Array
    v: jax.Array
    count: jax.Array

    def with_one_more(self, k: jax.Array, v: jax.Array, valid: jax.Array) -> "Dropped":
        """[batch, kv_heads, head_dim] float32 dropped as well, where `valid` [batch] says so."""
        count = self.count + valid
        share = (valid / jnp.maximum(count, 1))[:, None, None]
        return Dropped(self.k + share * (k - self.k), self.v + share * (v - self.v), count)


@flax.struct.dataclass
class WindowCache:
    """What the heads of short reach keep.

    Attributes:
      k, v: [batch, kv_heads, slots, head_dim], dealt out over the context axis slot by slot.
      dropped: what stands for the rest, or None.
      oldest: of a cache with such, keys and values, [batch, kv_heads, head_dim] float32 each, of
        the token that the next one drives out: read after a step's write, since XLA copies a store
        that is read before it.
      spec: which slot keeps what.
    """

    k: Store
    v: Store
    dropped: Dropped | None
    oldest: tuple[jax.Array, jax.Array] | None
    spec: WindowSpec = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CompressedCache:
    """Keys and values of one layer.

    On each device of the model axis heads come in this order.

    Attributes:
      whole: of the heads that keep everything; None where there are none.
      windows: of the others, those together that keep as much.
      stripe: how positions of prompts are dealt out to the mesh's context axis, see Zigzag.
    """

    whole: LayerCache | None
    windows: tuple[WindowCache, ...]
    stripe: int = flax.struct.field(pytree_node=False)

    @property
    def entries(self) -> tuple[LayerCache | WindowCache, ...]:
        """What there is, in the order of the heads."""
        return self.windows if self.whole is None else (self.whole, *self.windows)

    def with_entries(self, entries: Sequence[LayerCache | WindowCache]) -> "CompressedCache":
        """The same with other `entries`."""
        whole, windows = (None, entries) if self.whole is None else (entries[0], entries[1:])
        return self.replace(whole=whole, windows=tuple(windows))


@dataclasses.dataclass(frozen=True)
class Parts:
    """How many of a layer's heads keep what, on each shard of them and in this order.

    Attributes:
      whole: keep everything.
      windows: keep as much as each of these says.
    """

    whole: int
    windows: tuple[tuple[int, WindowSpec], ...]


def compress(
    cache: LayerCache, lengths: jax.Array, parts: Parts, shards: int, zigzag: Zigzag
) -> CompressedCache:
    """Drops what the heads of short reach do not keep.

    Args:
      cache: a layer's, with all positions.
      lengths: [batch] tokens of each row.
      parts: what each shard's heads keep.
      shards: that the heads lie in.
      zigzag: how positions lie in it.
    """
    heads = cache.k.data.shape[1] // shards

    def some(first: int, count: int, tree):
        def take(x: jax.Array) -> jax.Array:
            apart = x.reshape(x.shape[0], shards, heads, *x.shape[2:])
            return apart[:, :, first : first + count].reshape(x.shape[0], -1, *x.shape[2:])

        return jax.tree.map(take, tree)

    whole = some(0, parts.whole, cache) if parts.whole else None
    windows, first = [], parts.whole
    for count, spec in parts.windows:
        windows.append(_window(*some(first, count, (cache.k, cache.v)), lengths, zigzag, spec))
        first += count
    return CompressedCache(whole, tuple(windows), zigzag.stripe)


def _window(
    k: Store, v: Store, lengths: jax.Array, zigzag: Zigzag, spec: WindowSpec
) -> WindowCache:
    """What is kept of some heads' keys and values."""
    each = k.capacity // zigzag.devices
    slots = jnp.arange(spec.capacity(k.capacity, zigzag.devices))
    at = spec.positions(slots, lengths)  # [batch, slots]
    index = zigzag.device(at) * each + zigzag.slots_before(zigzag.device(at), at)

    def keep(x: jax.Array) -> jax.Array:
        where = jnp.minimum(index, x.shape[2] - 1).reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, where, axis=2)

    kept_k, kept_v = (jax.tree.map(keep, x) for x in (k, v))
    if not spec.compensates:
        return WindowCache(kept_k, kept_v, None, None, spec)
    # Which position lies where, device after device.
    device, slot = jnp.divmod(jnp.arange(k.capacity), each)
    position = zigzag.position(device, slot)
    dropped = (position >= spec.sinks) & (position < lengths[:, None] - spec.last)
    count = jnp.sum(dropped, axis=1)

    def mean(store: Store) -> jax.Array:
        total = jnp.sum(jnp.where(dropped[:, None, :, None], store.floats(), 0), axis=2)
        return total / jnp.maximum(count, 1)[:, None, None]

    oldest = tuple(floats_at(x, spec.slot(lengths)) for x in (kept_k, kept_v))
    return WindowCache(kept_k, kept_v, Dropped(mean(k), mean(v), count), oldest, spec)


def floats_at(store: Store, slot: jax.Array) -> jax.Array:
    """[batch, kv_heads, head_dim] float32 in each row's slot; zeros where that is not here."""
    inside = (slot >= 0) & (slot < store.capacity)
    at = jnp.clip(slot, 0, store.capacity - 1)

    def take(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, 1, axis=1))(x, at)

    found = jax.tree.map(take, store).floats()[:, :, 0]
    return jnp.where(inside[:, None, None], found, 0)
